"""The reducer that keeps every upload, for methods that make a model for each client.

`Reduced.tensors`, `.values` and `.buffers` are then stacked `[n, ...]`, row i from `meta[i]`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from isthmus.contracts import Context, Reduced, Updates


class Stack:
    """Nothing is mixed; `weights` are handed on."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def reduce(self, updates: Updates, weights: Tensor, ctx: Context) -> Reduced:
        return Reduced(
            dict(updates.delta),
            weights=weights,
            values=dict(updates.values),
            buffers=dict(updates.buffers),
        )
