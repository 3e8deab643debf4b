"""Datasets: facts that travel with a model, built-in tasks, the paper's six, and your own.

Batches of any of them: ``open_loader(dataset(name).train(side), info, batch=64).epoch(0)`` yields
``(images, labels)``; ``loading=LoadingConfig(loader="dali")`` or ``"torch"`` says who makes them.
"""

from kiop_fast.data.files import FileBank, FileSplit
from kiop_fast.data.loader import Feed, Loader, held, open_feed, open_loader, uses_dali
from kiop_fast.data.registry import BUILT_IN, dataset, known, register
from kiop_fast.data.spec import Dataset, DatasetInfo, Split
from kiop_fast.data.torchvision_sets import data_folder, download

__all__ = [
    "BUILT_IN",
    "Dataset",
    "DatasetInfo",
    "Feed",
    "FileBank",
    "FileSplit",
    "Loader",
    "Split",
    "data_folder",
    "dataset",
    "download",
    "held",
    "known",
    "open_feed",
    "open_loader",
    "register",
    "uses_dali",
]
