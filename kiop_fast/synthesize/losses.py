"""The terms of the synthesis loss (paper eqs. 2 and 3; SPEC section 4, steps 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiop_fast.kernels import info_nce, mapped_kl
from kiop_fast.runtime.linear import Product, linear

TERMS = ("bn", "oh", "adv", "cr", "total")


def adversarial_loss(student: Tensor, teacher: Tensor, mapping: Tensor | None) -> Tensor:
    """L_adv = -mean_i(1[argmax t_i = argmax s_i] KL(softmax t_i ‖ softmax s_i)), 0-d.

    Args:
        student: (N, classes of A) unmapped logits.
        teacher: (N, classes of the teacher) logits.
        mapping: A's class for each of the teacher's; None where A is the teacher.
    """
    return -mapped_kl(student, teacher, mapping, only_agreeing=True).loss


class ProjectionHead(nn.Module):
    """The paper's discriminator 𝒟: features → (N, dim) of unit length.

    Args:
        features: width of the input.
        hidden: width of the hidden layer; 0 for as wide as the input.
        dim: width of the embedding.
        product: of two matrices, in both layers; None: torch's.
    """

    def __init__(
        self, features: int, hidden: int, dim: int, product: Product | None = None
    ) -> None:
        super().__init__()
        self.product = product
        self.first = nn.Linear(features, hidden or features)
        self.second = nn.Linear(hidden or features, dim)

    def weights(self, dtype: torch.dtype) -> list[Tensor]:
        """Both layers' weight and bias as ``dtype``, cast once for all calls of a step."""
        return [parameter.to(dtype) for parameter in self.parameters()]

    def forward(
        self, features: Tensor, rows: Tensor | None = None, weights: list[Tensor] | None = None
    ) -> Tensor:
        """Embed features and what follows them, (N + M, dim); only features pass a gradient.

        Args:
            features: (N, features).
            rows: (N + M, features): room for the features, then M constants; None: no constants.
            weights: made by :meth:`weights`; None: the parameters.
        """
        first, first_bias, second, second_bias = weights or self.parameters()
        hidden = linear(features, first, first_bias, rows, self.product).relu_()
        return F.normalize(linear(hidden, second, second_bias, product=self.product), dim=1)


def head_weights(rng: np.random.Generator, head: ProjectionHead) -> dict[str, Tensor]:
    """torch's default for Linear, U(±1/√fan_in) for weights and biases, from a named draw."""
    weights = {}
    for name, layer in (("first", head.first), ("second", head.second)):
        bound = 1.0 / math.sqrt(layer.in_features)
        for part in ("weight", "bias"):
            shape = getattr(layer, part).shape
            values = rng.uniform(-bound, bound, tuple(shape)).astype(np.float32)
            weights[f"{name}.{part}"] = torch.from_numpy(values)
    return weights


def contrastive_loss(
    head: Callable[[Tensor, Tensor], Tensor],
    local: Tensor,
    global_: Tensor,
    local_rows: Tensor,
    global_rows: Tensor,
    temperature: float,
    count: Tensor | None = None,
) -> Tensor:
    """InfoNCE of [local; cached local] against [global; cached global], 0-d (paper eq. 3).

    Keys are detached, so the head's second half runs without a graph, and the cached rows pass
    no gradient to their inputs.  Rows of the batch and cached rows are averaged separately and
    added; with an empty bank there is no cached term.

    Args:
        head: the projection head, of features and of rows with room for them.
        local, global_: (N, F) features of this batch.
        local_rows, global_rows: (N + n, F): room for the batch, which is written there, then rows
            of the feature bank.
        count: how many of the cached rows hold features, 0-d on the device; None: all.
    """
    batch, cached = len(local), len(local_rows) - len(local)
    # Keys come first.  Both halves of the bank's rows lie in one buffer, and what the queries need
    # for the backward pass must be written last; and what the keys take is free again by then.
    with torch.no_grad():
        keys = head(global_, global_rows)
    queries = head(local, local_rows)
    weights = local.new_full((batch + cached,), 1.0 / batch)
    if cached:
        weights[batch:] = 1.0 / (cached if count is None else count.clamp(min=1))
    valid = None if count is None else count + batch
    return info_nce(queries, keys, temperature, weights, num_keys=valid)
