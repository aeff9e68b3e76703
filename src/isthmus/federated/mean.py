"""The reducer of FedAvg: the weighted mean of the deltas, values and buffers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from isthmus import tree
from isthmus.contracts import Context, Reduced, Updates


class Mean:
    """sum_i w_i u_i, for weights that need not sum to 1."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def reduce(self, updates: Updates, weights: Tensor, ctx: Context) -> Reduced:
        return Reduced(
            tree.weighted_mean(updates.delta, weights),
            weights=weights,
            values=tree.weighted_mean(updates.values, weights),
            buffers=tree.weighted_mean(updates.buffers, weights),
        )
