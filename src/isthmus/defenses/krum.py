"""Krum and Multi-Krum: keep the uploads that lie closest to their neighbours.

Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine
Tolerant Gradient Descent", NeurIPS 2017, arXiv:1703.02757, section 4. With at most f hostile
uploads among n >= 2f + 3, the score of upload i is

    s(i) = sum of || u_i - u_j ||^2 over the n - f - 2 uploads j != i that are nearest to u_i .

Krum takes the upload of the smallest score (the first of equal ones); Multi-Krum averages the m
uploads of the smallest scores. Claim: the result stays within a bounded distance of the honest
mean whatever the f hostile uploads are. The theory covers m <= n - f - 2; the usual m = n - f is
the default here.

Neighbours are n - f - 2 and distances are squared, as in the paper. Only deltas enter distances.
Uploads that are not finite are infinitely far from all. `iterative=True` is the variant that
takes Krum's choice out of the pool and scores the rest again while more than 2f + 2 remain
(Shejwalkar and Houmansadr, NDSS 2021), so that it keeps n - 2f - 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isthmus import catalogue
from isthmus.contracts import Context, Selection, Updates
from isthmus.errors import InputError


def squared_distances(gram: Tensor) -> Tensor:
    """Squared distances `[n, n]` of n rows from their inner products, in float64."""
    gram = gram.double()
    own = gram.diagonal()
    apart = (own[:, None] + own[None, :] - 2.0 * gram).clamp(min=0.0)
    return apart.nan_to_num(nan=math.inf, posinf=math.inf)


def scores(distances: Tensor, f: int) -> Tensor:
    """Krum's score of each upload: `[n]` from squared distances `[n, n]`.

    Raises `InputError` unless f >= 0 and n >= 2f + 3.
    """
    n = len(distances)
    if f < 0 or n < 2 * f + 3:
        most = (n - 3) // 2
        allowed = f"0 to {most}" if most >= 0 else "no f at all"
        raise InputError("krum.f", f, f"{allowed} with {n} uploads (n >= 2f + 3)")
    others = distances.clone().fill_diagonal_(math.inf)
    return others.sort(dim=1).values[:, : n - f - 2].sum(dim=1)


def krum(rows: Tensor, f: int) -> Tensor:
    """The row of `[n, d]` with the smallest score.

    >>> krum(torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 2.5], [9.0, 0.0], [0.0, 4.0]]), 1)
    tensor([0., 2.])
    """
    return rows[int(scores(_distances(rows), f).argmin())]


def multi_krum(rows: Tensor, f: int, m: int | None = None) -> Tensor:
    """The mean of the m rows of `[n, d]` with the smallest scores (m = n - f when not given)."""
    return rows[_lowest(_distances(rows), f, m)].mean(dim=0)


def _distances(rows: Tensor) -> Tensor:
    rows = rows.double()
    return squared_distances(rows @ rows.T)


def _lowest(distances: Tensor, f: int, m: int | None) -> Tensor:
    m = len(distances) - f if m is None else m
    if not 1 <= m <= len(distances):
        raise InputError("multi-krum.m", m, f"1 to {len(distances)}, the number of uploads")
    return scores(distances, f).argsort(stable=True)[:m]


def _one_by_one(distances: Tensor, f: int) -> Tensor:
    """Krum's choice again and again, each taken out of the pool, while more than 2f + 2 remain."""
    pool, chosen = list(range(len(distances))), []
    while len(pool) > 2 * f + 2:
        inside = torch.tensor(pool)
        best = int(scores(distances[inside][:, inside], f).argmin())
        chosen.append(pool.pop(best))
    return torch.tensor(chosen)


def _tolerated(f: int | None, n: int) -> int:
    """The given f, or the largest that n uploads allow."""
    return max((n - 3) // 2, 0) if f is None else f


@catalogue.register("krum", place="selector", status="verified")
@dataclass(frozen=True)
class Krum:
    """Krum as selector: one upload with weight 1. Without `f`, the largest that n allows."""

    f: int | None = None
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        _not_negative("krum.f", self.f)

    def min_clients(self) -> int:
        """The fewest uploads for which the rule is legal."""
        return 2 * (self.f or 0) + 3

    def select(self, updates: Updates, ctx: Context) -> Selection:
        """The upload of the smallest score."""
        values = scores(squared_distances(updates.gram()), _tolerated(self.f, len(updates)))
        accepted = torch.zeros(len(updates), dtype=torch.bool)
        accepted[values.argmin()] = True
        return Selection(accepted.double(), accepted, {"scores": values})


@catalogue.register("multi-krum", place="selector", status="verified")
@dataclass(frozen=True)
class MultiKrum:
    """Multi-Krum as selector: m uploads of equal weight, or of their own weights when asked.

    `m` is n - f when not given. `iterative` chooses one by one and needs no `m`.
    """

    f: int | None = None
    m: int | None = None
    iterative: bool = False
    weighted: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        _not_negative("multi-krum.f", self.f)
        if self.iterative and self.m is not None:
            raise InputError("multi-krum.m", self.m, "none, when iterative (it keeps n - 2f - 2)")

    def min_clients(self) -> int:
        """The fewest uploads for which the rule is legal."""
        return 2 * (self.f or 0) + 3

    def select(self, updates: Updates, ctx: Context) -> Selection:
        """The m uploads of the smallest scores."""
        distances = squared_distances(updates.gram())
        f = _tolerated(self.f, len(updates))
        values = scores(distances, f)
        chosen = _one_by_one(distances, f) if self.iterative else _lowest(distances, f, self.m)
        accepted = torch.zeros(len(updates), dtype=torch.bool)
        accepted[chosen] = True
        weights = None if self.weighted else accepted.double() / len(chosen)
        return Selection(weights, accepted, {"scores": values})


def _not_negative(field: str, f: int | None) -> None:
    if f is not None and f < 0:
        raise InputError(field, f, "0 or more")
