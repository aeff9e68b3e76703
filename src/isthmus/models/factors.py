"""LoRA factors as plain tensors: what a pair means, where it lies in a tree, how it merges.

A linear layer with frozen weight `W [d, k]` (d outputs, k inputs) and a LoRA pair
`B [d, r]`, `A [r, k]` acts as `W + s B A` with `s = alpha / r`, or `alpha / sqrt(r)` for
rank-stabilised LoRA (Hu et al., "LoRA", ICLR 2022, eq. 3; Kalajdzievski, arXiv 2312.03732).
Training works on named tensors, so each adapted layer is described once by a `Place`, and
`read`, `write` and `merged` are pure functions of a tree. `isthmus.models.adapter` makes the
places out of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.tree import Tree

Pair = tuple[Tensor, Tensor]
"""A low-rank change of a weight: L `[d, m]` and R `[m, k]`, meaning `W += L R` with no scale."""


class Factors(NamedTuple):
    """A LoRA pair and its scale, worth `scale * B A`: B `[..., d, r]`, A `[..., r, k]`."""

    B: Tensor
    A: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def delta(self) -> Tensor:
        """scale * B A, dense `[..., d, k]`: for tests and small layers."""
        return (self.B @ self.A) * self.scale

    def prefix(self, rank: int) -> Factors:
        """The first `rank` directions: what a client of that rank holds and sends."""
        return Factors(self.B[..., :rank], self.A[..., :rank, :], self.scale)

    def at(self, scale: float) -> Factors:
        """The same product under another scale; B takes the whole change."""
        if scale == self.scale:
            return self
        return Factors(self.B * (self.scale / scale), self.A, scale)


class Place(NamedTuple):
    """Where one adapted layer lies among the model's named tensors.

    `transposed`: the weight is stored `[k, d]` (Conv1D). `tied`: names of other tensors that
    are this same weight but do not follow this adapter, so that a merge would change them too.
    """

    B: str
    A: str
    weight: str
    scale: float
    rank: int
    shape: tuple[int, int]
    transposed: bool = False
    tied: tuple[str, ...] = ()


Places = dict[str, Place]


def fresh(key: seeds.Key, rank: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A new A `[rank, k]`, uniform in +-1/sqrt(k) as peft starts it."""
    return (2.0 * seeds.uniform(key, (rank, k), dtype) - 1.0) / math.sqrt(k)


def read(tree: Mapping[str, Tensor], places: Places) -> dict[str, Factors]:
    """The factors of every layer, out of named tensors (stacked or not; views)."""
    return {name: Factors(tree[at.B], tree[at.A], at.scale) for name, at in places.items()}


def write(factors: Mapping[str, Factors], places: Places) -> Tree:
    """The inverse of `read`: named tensors, brought to each place's own scale."""
    tree: Tree = {}
    for name, given in factors.items():
        at = places[name]
        tree[at.B], tree[at.A], _ = given.at(at.scale)
    return tree


def add_pair(weight: Tensor, pair: Pair, transposed: bool = False) -> Tensor:
    """weight + L R as a new tensor: added in float32 (float64 for float64) and cast once."""
    if not weight.is_floating_point():
        raise InputError(
            "merge", weight.dtype, "a floating point weight; hold() for quantised ones"
        )
    work = torch.promote_types(weight.dtype, torch.float32)
    left, right = (x.detach().to(weight.device, work) for x in pair)
    if transposed:
        left, right = right.mT, left.mT
    return torch.addmm(weight.detach().to(work), left, right).to(weight.dtype)


def merged(
    tree: Mapping[str, Tensor], places: Places, deltas: Mapping[str, Sequence[Pair]]
) -> Tree:
    """The backbone weights that `deltas` change, by name: `W + sum L R`, pairs in their order.

    Raises `InputError` where a weight is tied to a module that does not follow the adapter.
    """
    changed: Tree = {}
    for name, pairs in deltas.items():
        at = places[name]
        if pairs and at.tied:
            raise InputError(
                "targets",
                name,
                f"all modules of a tied weight, or none (also {', '.join(at.tied)})",
            )
        for pair in pairs:
            weight = changed.get(at.weight, tree[at.weight])
            changed[at.weight] = add_pair(weight, pair, at.transposed)
    return changed


def prefix_mask(ranks: Sequence[int] | Tensor, rank: int) -> Tensor:
    """Which directions each client trains: bool `[n, rank]`, the first r_i of each row.

    >>> prefix_mask([1, 3], 3).int().tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    return torch.arange(rank) < torch.as_tensor(ranks).reshape(-1, 1)


def pad(factors: Factors, rank: int, tail: Factors | None = None) -> Factors:
    """Widen to `rank` directions, with those of `tail` (frozen) or with zeros behind the own."""
    missing = rank - factors.rank
    if missing < 0:
        raise InputError("rank", rank, f"{factors.rank} or more")
    if tail is not None:
        rest = tail.at(factors.scale)
        B, A = rest.B[..., factors.rank : rank], rest.A[..., factors.rank : rank, :]
    else:
        B = factors.B.new_zeros(*factors.B.shape[:-1], missing)
        A = factors.A.new_zeros(*factors.A.shape[:-2], missing, factors.A.shape[-1])
    return Factors(torch.cat([factors.B, B], -1), torch.cat([factors.A, A], -2), factors.scale)


def stack(clients: Sequence[Factors], down: Factors) -> Factors:
    """n clients of any rank -> one stacked pair `[n, ...]` at the rank of `down`, tails from it."""
    wide = [pad(each.at(down.scale), down.rank, tail=down) for each in clients]
    return Factors(torch.stack([x.B for x in wide]), torch.stack([x.A for x in wide]), down.scale)


def unstack(stacked: Factors, ranks: Sequence[int]) -> list[Factors]:
    """What crosses: of each client's padded pair the slice of its own rank."""
    return [
        Factors(B, A, stacked.scale).prefix(rank)
        for B, A, rank in zip(stacked.B, stacked.A, ranks, strict=True)
    ]


def dead(factors: Factors) -> Tensor:
    """Directions with zero gradient for ever: bool `[..., r]`, column of B and row of A both 0."""
    return (factors.B == 0).all(-2) & (factors.A == 0).all(-1)
