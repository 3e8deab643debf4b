"""Datasets: facts that travel with a model, built-in tasks, the paper's six, and your own."""

from kiop_fast.data.registry import BUILT_IN, dataset, known, register
from kiop_fast.data.spec import Dataset, DatasetInfo, Split
from kiop_fast.data.torchvision_sets import data_folder, download

__all__ = [
    "BUILT_IN",
    "Dataset",
    "DatasetInfo",
    "Split",
    "data_folder",
    "dataset",
    "download",
    "known",
    "register",
]
