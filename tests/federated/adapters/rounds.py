"""Rounds to aggregate: clients of random factors, and what the mean product must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.federated.adapters.product import Global
from isthmus.models.factors import Factors

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Round(NamedTuple):
    uploads: list[Factors]
    weights: Tensor
    down: Factors


def draw(
    seed: int,
    d: int = 23,
    k: int = 31,
    ranks: Sequence[int] = (3, 3, 3, 3),
    *,
    rank: int | None = None,
    scale: float = 1.7,
    scales: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Round:
    """Unequal weights that sum to one, factors of unequal sizes, `down` of the largest rank."""
    g = torch.Generator().manual_seed(seed)

    def pair(r: int, s: float) -> Factors:
        size = 0.5 + torch.rand((), generator=g, dtype=torch.float64)
        B = size * torch.randn(d, r, generator=g, dtype=torch.float64)
        A = torch.randn(r, k, generator=g, dtype=torch.float64) / k**0.5
        return Factors(B.to(dtype), A.to(dtype), s)

    n = len(ranks)
    p = torch.rand(n, generator=g, dtype=torch.float64) + 0.2
    uploads = [pair(r, s) for r, s in zip(ranks, scales or [scale] * n, strict=True)]
    return Round(uploads, p / p.sum(), pair(rank or max(ranks), scale))


def double(x: Factors) -> Factors:
    return Factors(x.B.double(), x.A.double(), x.scale)


def mean_product(uploads: Sequence[Factors], weights: Tensor) -> Tensor:
    """sum p_i s_i B_i A_i, dense, in float64."""
    return sum(
        (float(p) * double(x).delta() for p, x in zip(weights, uploads, strict=True)),
        torch.zeros(uploads[0].B.shape[0], uploads[0].A.shape[1], dtype=torch.float64),
    )


def served(result: Global) -> Tensor:
    """What the round adds to the weight the clients started from, dense, in float64."""
    return double(result.factors).delta() + sum(
        left.double() @ right.double() for left, right in result.base_delta
    )


def rel(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())
