"""Frozen source models: build or load one by name, freeze it, tap its BatchNorm layers."""

from kiop_fast.source.batchnorm import (
    BatchNormTaps,
    batch_statistics,
    batchnorm_layers,
    check_each_runs_once,
    normalising_layers,
)
from kiop_fast.source.checkpoint import cache_folder, load_source, save_source
from kiop_fast.source.dropout import DropoutDraws
from kiop_fast.source.frozen import Source, fingerprint, freeze
from kiop_fast.source.spec import SourceSpec, parse_source
from kiop_fast.source.zoo import build, names

__all__ = [
    "BatchNormTaps",
    "DropoutDraws",
    "Source",
    "SourceSpec",
    "batch_statistics",
    "batchnorm_layers",
    "build",
    "cache_folder",
    "check_each_runs_once",
    "fingerprint",
    "freeze",
    "load_source",
    "names",
    "normalising_layers",
    "parse_source",
    "save_source",
]
