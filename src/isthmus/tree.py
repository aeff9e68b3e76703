"""Named tensors: the one shape in which weights, updates and states are held.

A *tree* is a flat `dict[str, Tensor]`. A *stacked* tree has one more leading axis,
one entry per client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Tree = dict[str, Tensor]


class Slot(NamedTuple):
    """Where one tensor lies in the flat vector: `flat[start:stop].view(shape)`."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


Layout = tuple[Slot, ...]


def tree_map(
    function: Callable[..., Tensor], first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]
) -> Tree:
    """Apply `function` name by name; every tree has the names of `first`."""
    return {name: function(x, *(other[name] for other in rest)) for name, x in first.items()}


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float = 1.0) -> Tree:
    """a + alpha * b, over the names of `a`."""
    return {name: torch.add(x, b[name], alpha=alpha) for name, x in a.items()}


def sub(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """a - b, over the names of `a`."""
    return {name: x - b[name] for name, x in a.items()}


def scale(a: Mapping[str, Tensor], factor: float | Tensor) -> Tree:
    """factor * a."""
    return {name: x * factor for name, x in a.items()}


def zeros_like(a: Mapping[str, Tensor]) -> Tree:
    return {name: torch.zeros_like(x) for name, x in a.items()}


def clone(a: Mapping[str, Tensor]) -> Tree:
    return {name: x.detach().clone() for name, x in a.items()}


def norm(a: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm of all entries together (a scalar tensor)."""
    return torch.stack([x.float().square().sum() for x in a.values()]).sum().sqrt()


def stack(trees: Sequence[Mapping[str, Tensor]]) -> Tree:
    """n trees of equal shapes -> one stacked tree `[n, *shape]`."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def cat(stacked: Sequence[Mapping[str, Tensor]]) -> Tree:
    """Stacked trees of equal names, one behind the other: `[n_1 + n_2 + ..., *shape]`."""
    return {name: torch.cat([part[name] for part in stacked]) for name in stacked[0]}


def unstack(stacked: Mapping[str, Tensor]) -> list[Tree]:
    """One stacked tree -> the list of its n trees (views)."""
    rows = zip(*(x.unbind() for x in stacked.values()), strict=True)
    return [dict(zip(stacked, row, strict=True)) for row in rows]


def row(stacked: Mapping[str, Tensor], i: int) -> Tree:
    """The i-th tree of a stacked tree (views)."""
    return {name: x[i] for name, x in stacked.items()}


def weighted_mean(stacked: Mapping[str, Tensor], weights: Tensor) -> Tree:
    """sum_i w_i x_i over the leading axis, for weights `[n]` that sum to what the caller wants.

    >>> weighted_mean({"x": torch.tensor([[1.0], [4.0]])}, torch.tensor([0.25, 0.75]))
    {'x': tensor([3.2500])}
    """
    out: Tree = {}
    if (matrix := rows(stacked)) is not None:
        mean, start = torch.mv(matrix.T, cast(weights, matrix.dtype)), 0
        for name, x in stacked.items():
            shape = x.shape[1:]
            out[name] = mean.as_strided(shape, _strides(shape), start)
            start += shape.numel()
        return out
    for name, x in stacked.items():
        weights = cast(weights, x.dtype)
        out[name] = torch.mv(x.view(x.shape[0], -1).T, weights).view(x.shape[1:])
    return out


def cast(few: Tensor, dtype: torch.dtype) -> Tensor:
    """A few numbers in another type; for the usual ones by numpy, which starts faster."""
    if few.dtype == dtype:
        return few
    if dtype == torch.float32 and few.device.type == "cpu" and not few.requires_grad:
        return torch.from_numpy(few.numpy().astype(np.float32))
    return few.to(dtype)


def layout(tree: Mapping[str, Tensor], stacked: bool = False) -> Layout:
    """The places of the tensors in the flat vector, in the order of the tree."""
    slots, start = [], 0
    for name, x in tree.items():
        shape = tuple(x.shape[1:] if stacked else x.shape)
        stop = start + math.prod(shape)
        slots.append(Slot(name, start, stop, shape))
        start = stop
    return tuple(slots)


def flatten(tree: Mapping[str, Tensor]) -> Tensor:
    """All entries as one vector `[d]`, in the order of the tree."""
    return torch.cat([x.reshape(-1) for x in tree.values()])


def flatten_stacked(stacked: Mapping[str, Tensor]) -> Tensor:
    """All entries of each client as one row: `[n, d]`."""
    return torch.cat([x.reshape(x.shape[0], -1) for x in stacked.values()], dim=1)


def unflatten(flat: Tensor, slots: Layout) -> Tree:
    """The inverse of `flatten` (`flat` is `[d]`) and of `flatten_stacked` (`[n, d]`); views."""
    lead = flat.shape[:-1]
    parts = flat.split_with_sizes([stop - start for _, start, stop, _ in slots], -1)
    return {
        slot.name: part if len(slot.shape) == 1 else part.view((*lead, *slot.shape))
        for slot, part in zip(slots, parts, strict=True)
    }


def rows(stacked: Mapping[str, Tensor]) -> Tensor | None:
    """The tensors as one matrix `[n, d]` (a view) where they lie side by side, else None.

    That is how a recording leaves what is sent and how a parcel is read, and one operation on
    all tensors costs less than one on each.
    """
    first: Tensor | None = None
    n = start = step = d = 0
    for x in stacked.values():
        shape, strides = x.shape, x.stride()
        if first is None:
            first, n, start, step = x, shape[0], x.data_ptr(), strides[0]
        elif x.data_ptr() != start + d * x.element_size() or x.dtype is not first.dtype:
            return None
        width = _width(shape, strides)
        if width is None or shape[0] != n or (strides[0] != step and n > 1):
            return None
        d += width
    if first is None or not n * d:
        return None
    step, origin = max(step, d) if n == 1 else step, first.storage_offset()
    # Tensors that are neighbours by chance, in storages of their own, are not one matrix.
    last = (origin + (n - 1) * step + d) * first.element_size()
    if step < d or last > first.untyped_storage().nbytes():
        return None
    return first.as_strided((n, d), (step, 1), origin)


@lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor of this shape in row-major order."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@lru_cache(maxsize=1024)
def _width(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Entries of one row, where every row lies without gaps in row-major order."""
    width = 1
    for size, stride in zip(reversed(shape[1:]), reversed(strides[1:]), strict=True):
        if size != 1 and stride != width:
            return None
        width *= size
    return width


def nbytes(tree: Mapping[str, Tensor]) -> int:
    """Bytes of the values alone."""
    return sum(x.numel() * x.element_size() for x in tree.values())


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """True when names, shapes, dtypes and bits agree."""
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype and x.shape == b[name].shape and torch.equal(x, b[name])
        for name, x in a.items()
    )
