"""kiop_fast: the knowledge of several trained models in one prompt, without their data."""

__version__ = "0.1.0"
