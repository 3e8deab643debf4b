"""The synthesize period: contrastive model inversion fills the banks."""

from kiop_fast.synthesize.banks import FeatureBank, ImageBank, quantise
from kiop_fast.synthesize.generator import Generator
from kiop_fast.synthesize.losses import TERMS, ProjectionHead
from kiop_fast.synthesize.period import (
    SynthesisDraws,
    Synthesised,
    Synthesizer,
    draw_synthesis,
    generator_channels,
)
from kiop_fast.synthesize.start import MetaStart

__all__ = [
    "TERMS",
    "FeatureBank",
    "Generator",
    "ImageBank",
    "MetaStart",
    "ProjectionHead",
    "SynthesisDraws",
    "Synthesised",
    "Synthesizer",
    "draw_synthesis",
    "generator_channels",
    "quantise",
]
