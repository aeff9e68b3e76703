"""What coordinate rules share: one rule, applied to every tensor of the accepted uploads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from isthmus.contracts import Reduced, Updates
from isthmus.tree import Tree

Rule = Callable[[Tensor, Tensor], Tensor]
"""Uploads `[n, *shape]` and their weights `[n]` -> one tensor `[*shape]`."""


def coordinatewise(updates: Updates, weights: Tensor, rule: Rule) -> Reduced:
    """`rule` on every tensor of the uploads whose weight is not 0 (zeros when there are none).

    Deltas, values and buffers alike: a buffer that was merely averaged would let one upload move
    it without bound. Whole-number buffers are reduced in float64 and rounded.
    """
    keep = weights > 0

    def reduce(stacked: Mapping[str, Tensor]) -> Tree:
        return {name: one(x[keep]) for name, x in stacked.items()}

    def one(x: Tensor) -> Tensor:
        if not len(x):
            return x.new_zeros(x.shape[1:])
        if x.is_floating_point():
            return rule(x, weights[keep])
        return rule(x.double(), weights[keep]).round().to(x.dtype)

    return Reduced(
        tensors=reduce(updates.delta),
        values=reduce(updates.values),
        buffers=reduce(updates.buffers),
        diag={"accepted": int(torch.count_nonzero(keep))},
    )
