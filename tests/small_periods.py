"""Both periods of one provider behind one prompt, small enough to run many times in a test."""

from __future__ import annotations

from typing import Any

import torch
from stand_ins import tiny_source, wave
from torch import Tensor

from kiop_fast.config import StoringConfig, SynthesisConfig
from kiop_fast.prompt import Prompt, PromptedModel
from kiop_fast.runtime import optimizers
from kiop_fast.runtime.execution import PLAIN, Execution
from kiop_fast.store import Storing, Term, core_loss, draw_storing, provider_loss
from kiop_fast.synthesize import ImageBank, Synthesizer, draw_synthesis


def parts(device: torch.device, steps: int = 6, execution: Execution = PLAIN) -> Any:
    """Synthesizer and storing of one provider behind one prompt."""
    facts = {"mean": (0.5, 0.4, 0.45), "std": (0.25, 0.3, 0.2)}
    a, b = tiny_source("a", 7, 1, **facts), tiny_source("b", 5, 2, **facts)
    for source in (a, b):
        source.model.to(device)
    prompt = Prompt(8, (11, 20)).to(device)
    mapping = torch.tensor([3, 0, 6, 1, 5], device=device)
    core, seen = PromptedModel(a, prompt, 1), PromptedModel(a, prompt, 2, mapping)
    config = SynthesisConfig(batch=6, steps=steps, latent=12, width=5, pad=2, negatives=40)
    made = Synthesizer(
        b, config, b.info, side=8, bank_rows=64, seed=0, task="b", device=device,
        execution=execution,
    )  # fmt: skip
    banks = {name: ImageBank(3, 8, device, 60) for name in "ab"}
    for bank in banks.values():
        bank.add((wave(9, 3, 8, 8).abs() * 255).to(torch.uint8), torch.zeros(9, dtype=torch.int64))
    terms = [
        Term("a", 1.0, banks["a"], a, False, core_loss(core, 3.0, "prompted")),
        Term("b", 1.0, banks["b"], b, False, provider_loss(seen, b, 3.0, "provider")),
    ]
    optimizer = optimizers.sgd(prompt.parameters(), 0.5, 0.9, 1e-4)
    storing = Storing(terms, optimizer, steps, execution)

    def synthesize(epoch: int, on_step: Any = None) -> Any:
        drawn = draw_synthesis(
            config, b, 8, seed=0, epoch=epoch, task="b", call=0, stored=made.features.stored
        )
        prompt.requires_grad_(False)
        result = made.synthesize(drawn, seen.logits, mapping, on_step)
        prompt.requires_grad_(True)
        return result

    def store(epoch: int, on_step: Any = None) -> Tensor:
        drawn = {
            term.name: draw_storing(
                StoringConfig(steps=steps, batch=5), term.source.info, len(term.bank.images), 5,
                seed=0, epoch=epoch, task=term.name,
            )
            for term in terms
        }  # fmt: skip
        return storing.run(drawn, on_step)

    return made, storing, prompt, synthesize, store
