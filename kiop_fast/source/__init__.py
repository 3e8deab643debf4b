"""Frozen source models: build or load one by name, freeze it, tap its BatchNorm layers."""

from kiop_fast.source.batchnorm import BatchNormTaps, batch_statistics, batchnorm_layers
from kiop_fast.source.frozen import Source, fingerprint, freeze

__all__ = [
    "BatchNormTaps",
    "Source",
    "batch_statistics",
    "batchnorm_layers",
    "fingerprint",
    "freeze",
]
