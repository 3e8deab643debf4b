"""The prompt: rings, label mapping, a model seen through them, and the file that holds them."""

from kiop_fast.prompt.mapping import (
    bank_logits,
    bank_mapping,
    check_class_counts,
    count_table,
    disjoint_mappings,
    frequency_mapping,
    likelihood_mapping,
    random_mapping,
)
from kiop_fast.prompt.prompted import PromptedModel, calibrate, frozen_logits
from kiop_fast.prompt.rings import Prompt

__all__ = [
    "Prompt",
    "PromptedModel",
    "bank_logits",
    "bank_mapping",
    "calibrate",
    "check_class_counts",
    "count_table",
    "disjoint_mappings",
    "frequency_mapping",
    "frozen_logits",
    "likelihood_mapping",
    "random_mapping",
]
