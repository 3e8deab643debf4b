"""The same algorithm in plain eager PyTorch, as upstream runs it: the oracle and the baseline.

Nothing here uses ``kernels``.  It takes the draws of the fast rooms and must give their numbers;
it keeps upstream's structure, and with it upstream's cost: two teacher passes, the projection of
every row, features in host memory, images in PNG files behind a DataLoader, an ``.item()`` a step.
"""

from kiop_fast.reference.banks import FeatureBank, ImageBank, quantise
from kiop_fast.reference.losses import (
    Distilled,
    adversarial_loss,
    contrastive_loss,
    core_loss,
    kl,
    provider_loss,
    vanilla_loss,
)
from kiop_fast.reference.networks import Generator, Head
from kiop_fast.reference.prompted import ReferencePromptedModel, pad_through
from kiop_fast.reference.storing import Storing, store
from kiop_fast.reference.synthesizing import Synthesizer

__all__ = [
    "Distilled",
    "FeatureBank",
    "Generator",
    "Head",
    "ImageBank",
    "ReferencePromptedModel",
    "Storing",
    "Synthesizer",
    "adversarial_loss",
    "contrastive_loss",
    "core_loss",
    "kl",
    "pad_through",
    "provider_loss",
    "quantise",
    "store",
    "vanilla_loss",
]
