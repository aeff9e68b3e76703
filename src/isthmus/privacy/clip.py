"""Bounding what one party can contribute: one Euclidean bound over everything it sends.

The norm is taken over all fields together, in float64, so that float32 squares cannot overflow.
A clipped upload is shrunk by a few units of rounding more than needed: its norm stays at or below
the bound after rounding, which is what the sensitivity of a privacy mechanism rests on. For the
same reason an upload with a value that is not finite becomes zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.errors import InputError
from isthmus.tree import Tree


def norms(stacked: Mapping[str, Tensor]) -> Tensor:
    """The joint norm of each row of a stacked tree: float64 `[n]`."""
    squares = [x.double().reshape(x.shape[0], -1).square().sum(dim=1) for x in stacked.values()]
    return torch.stack(squares).sum(dim=0).sqrt()


def clip_rows(stacked: Mapping[str, Tensor], bound: float) -> Tree:
    """Each row of a stacked tree `[n, *shape]` scaled to joint norm at most `bound`.

    Rows within the bound keep their bits; an infinite bound keeps all.
    """
    if not bound > 0.0:
        raise InputError("clip", bound, "a positive number, or inf for none")
    for name, x in stacked.items():
        if not x.is_floating_point():
            raise InputError(name, x.dtype, "floating tensors; declare the field public otherwise")
    if math.isinf(bound) or not stacked:
        return dict(stacked)
    size = norms(stacked)
    slack = 1.0 - 4.0 * max(torch.finfo(x.dtype).eps for x in stacked.values())
    factor = torch.where(size <= bound, 1.0, bound * slack / size)
    finite = torch.isfinite(size)

    def shrink(x: Tensor) -> Tensor:
        each = (-1,) + (1,) * (x.ndim - 1)
        shrunk = torch.where(factor.view(each) < 1.0, (x * factor.view(each)).to(x.dtype), x)
        return torch.where(finite.view(each), shrunk, 0.0)

    return {name: shrink(x) for name, x in stacked.items()}


def clip(tree: Mapping[str, Tensor], bound: float) -> Tree:
    """One tree scaled to joint norm at most `bound`: u * min(1, bound / ||u||).

    >>> clip({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 10.0)
    {'w': tensor([3.]), 'b': tensor([4.])}
    >>> {
    ...     k: round(x.item(), 4)
    ...     for k, x in clip({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0).items()
    ... }
    {'w': 0.6, 'b': 0.8}
    """
    rows = clip_rows({name: x.unsqueeze(0) for name, x in tree.items()}, bound)
    return {name: x[0] for name, x in rows.items()}
