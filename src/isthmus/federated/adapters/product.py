"""What the aggregations of LoRA share: who counts, the stacked product, its exact SVD.

The weight a client trains is `W + s_i B_i A_i`, linear in the *product*, so the mean of the
clients' functions (to first order) is the mean product `D = sum_i p_i s_i B_i A_i`. With
`L = [sqrt(p_i s_i) B_i]` (d x N) and `R = [sqrt(p_i s_i) A_i]` (N x k), `N = sum_i r_i`,
`L R = D` without ever forming a d x k matrix, and the SVD of D follows from

    L = Q_L T_L,   R^T = Q_R T_R,   T_L T_R^T = P S Q^T,   U = Q_L P,   V = Q_R Q

in `4 N^2 (d + k) + O(N^3)` operations and `N (d + k)` memory. It is exact, unlike a
randomised SVD; a Gram matrix would square the condition number.

Weights need not sum to one: what is missing stays with `down`, the pair the clients were
given, so that a round in which nobody counts changes nothing and `p` may shrink a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from isthmus import seeds
from isthmus.contracts import LowRank
from isthmus.errors import InputError
from isthmus.federated.method import Knobs
from isthmus.models.factors import Factors

_CORE_IN_DOUBLE = 512
_NO_WEIGHT = 1e-6  # float32 weights sum to one within this


class Lora(Knobs):
    """The adapter every method here trains."""

    rank: int = Field(default=8, ge=1, description="r, directions per layer")
    alpha: float = Field(default=16.0, gt=0, description="the scale is alpha / rank")
    targets: str | tuple[str, ...] = Field(
        default="all-linear", description="endings of layer paths"
    )
    rslora: bool = Field(default=False, description="scale alpha / sqrt(rank)")


class NonFinite(InputError):
    """Uploads with NaN or infinite entries; `clients` are their positions."""

    def __init__(self, clients: list[int]) -> None:
        self.clients = clients
        super().__init__("uploads", f"non-finite factors at {clients}", "finite factors")


@dataclass(frozen=True)
class Global:
    """One layer after a round: the next pair, and what the backbone takes over.

    The served weight is `W + sum left right + factors.scale * factors.B factors.A`; the pairs
    of `base_delta` carry no further scale.
    """

    factors: Factors
    base_delta: list[LowRank] = field(default_factory=list)
    diag: dict[str, Any] = field(default_factory=dict)


class Member(NamedTuple):
    """One term of a mean: its weight (positive) and its pair."""

    weight: float
    factors: Factors


class Svd(NamedTuple):
    """U `[d, m]`, S `[m]` (float64, decreasing), V `[k, m]`: the matrix is U diag(S) V^T."""

    U: Tensor
    S: Tensor
    V: Tensor


def finite(uploads: Sequence[Factors]) -> Tensor:
    """Which uploads hold finite numbers only: bool `[n]`."""
    good = [bool(torch.isfinite(x.B).all() & torch.isfinite(x.A).all()) for x in uploads]
    return torch.tensor(good, dtype=torch.bool)


def check(uploads: Sequence[Factors], weights: Tensor, down: Factors) -> list[float]:
    """The weights as floats, once shapes, scales, weights and entries have been looked at.

    Raises `NonFinite` (never let NaN reach an SVD) and `InputError`.
    """
    p = [float(x) for x in weights.detach().double()]
    if len(p) != len(uploads):
        raise InputError("weights", f"{len(p)} for {len(uploads)} uploads", "one for each upload")
    if any(not 0.0 <= x <= 1.0 + _NO_WEIGHT for x in p) or sum(p) > 1.0 + _NO_WEIGHT:
        raise InputError("weights", p, "weights from 0 to 1 with a sum of at most 1")
    if not down.scale > 0.0:
        raise InputError("scale", down.scale, "a positive number")
    d, k = down.B.shape[0], down.A.shape[1]
    for i, x in enumerate(uploads):
        if x.B.shape != (d, x.rank) or x.A.shape != (x.rank, k) or not x.scale > 0.0:
            given = f"B {list(x.B.shape)}, A {list(x.A.shape)}, scale {x.scale}"
            raise InputError(f"uploads[{i}]", given, f"B [{d}, r], A [r, {k}], scale above 0")
    if not (good := finite(uploads)).all():
        raise NonFinite((~good).nonzero().flatten().tolist())
    return p


def members(
    uploads: Sequence[Factors], weights: Tensor, down: Factors, one_rank: bool = False
) -> list[Member]:
    """The terms of the mean: uploads of positive weight, then `down` with the weight missing.

    `one_rank`: factors themselves are averaged, so every rank must be that of `down` and
    every pair is brought to its scale.
    """
    p = check(uploads, weights, down)
    if one_rank:
        for i, x in enumerate(uploads):
            if x.rank != down.rank:
                raise InputError(f"uploads[{i}]", f"rank {x.rank}", f"rank {down.rank}")
        uploads = [x.at(down.scale) for x in uploads]
    terms = [Member(w, x) for w, x in zip(p, uploads, strict=True) if w > 0.0]
    rest = 1.0 - sum(p)
    return [*terms, Member(rest, down)] if rest > _NO_WEIGHT else terms


def working(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 for float64 factors."""
    return torch.promote_types(x.dtype, torch.float32)


def stacked(terms: Sequence[Member]) -> LowRank:
    """L `[d, N]` and R `[N, k]` with `L R = sum_i p_i s_i B_i A_i`, equally conditioned."""
    work = working(terms[0].factors.B)
    roots = [(w * x.scale) ** 0.5 for w, x in terms]
    left = [root * x.B.to(work) for root, (_, x) in zip(roots, terms, strict=True)]
    right = [root * x.A.to(work) for root, (_, x) in zip(roots, terms, strict=True)]
    return LowRank(torch.cat(left, 1), torch.cat(right, 0))


def mean_factors(terms: Sequence[Member]) -> Factors:
    """sum p_i B_i and sum p_i A_i, for terms of one rank and one scale."""
    first = terms[0].factors
    work = working(first.B)
    B = sum((w * x.B.to(work) for w, x in terms[1:]), terms[0].weight * first.B.to(work))
    A = sum((w * x.A.to(work) for w, x in terms[1:]), terms[0].weight * first.A.to(work))
    return Factors(B.to(first.B.dtype), A.to(first.A.dtype), first.scale)


def svd(pair: LowRank) -> Svd:
    """The SVD of `left right`, exact; signs such that each column of U peaks upwards.

    Never dense while N < min(d, k) / 2; otherwise a d x k matrix is no larger than the work.
    """
    L, R = pair
    (d, n), k = L.shape, R.shape[1]
    if 2 * n < min(d, k):
        QL, TL = torch.linalg.qr(L)
        QR, TR = torch.linalg.qr(R.mT)
        core = torch.float64 if n <= _CORE_IN_DOUBLE else L.dtype
        P, S, Qh = torch.linalg.svd(TL.to(core) @ TR.to(core).mT, full_matrices=False)
        U, V = QL @ P.to(L.dtype), QR @ Qh.mT.to(L.dtype)
    else:
        core = torch.float64 if min(d, k) <= _CORE_IN_DOUBLE else L.dtype
        U, S, Vh = torch.linalg.svd(L.to(core) @ R.to(core), full_matrices=False)
        U, V = U.to(L.dtype), Vh.mT.to(L.dtype)
    peak = U.gather(0, U.abs().argmax(0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(U.dtype)
    return Svd(U * sign, S.double(), V * sign)


def numerical_rank(S: Tensor, dtype: torch.dtype, n: int, eps: float = 0.0) -> int:
    """How many of the decreasing S stand above eps S_1 and above the rounding of n columns."""
    if S.numel() == 0 or float(S[0]) == 0.0:
        return 0
    floor = max(eps, 4.0 * torch.finfo(dtype).eps * n**0.5)
    return int((floor * S[0] < S).sum())


def part(usv: Svd, start: int, stop: int) -> LowRank:
    """Components start..stop-1 as a pair of equal norms, S included: merged as it is."""
    root = usv.S[start:stop].sqrt().to(usv.U.dtype)
    right = (usv.V[:, start:stop] * root).mT.contiguous()
    return LowRank(usv.U[:, start:stop] * root, right)


def recompress(pairs: Sequence[LowRank], rank: int | None = None) -> LowRank:
    """The sum of pairs as one: of its own rank, or the nearest of at most `rank` directions."""
    joined = LowRank(torch.cat([x for x, _ in pairs], 1), torch.cat([x for _, x in pairs], 0))
    usv = svd(joined)
    own = numerical_rank(usv.S, joined.left.dtype, joined.left.shape[1])
    return part(usv, 0, own if rank is None else min(rank, own))


def fresh_rows(kept: Tensor, count: int, norm: float, key: seeds.Key) -> Tensor:
    """`count` new rows `[count, k]` of length `norm`, orthogonal to the columns `kept` `[k, m]`.

    Orthogonal to each other too, as far as k leaves room; beyond that only random.
    """
    k, m = kept.shape
    draws = seeds.normal(key, (count, k), torch.float64).to(kept.device)
    basis, _ = torch.linalg.qr(torch.cat([kept.double(), draws.mT], 1))
    rows = torch.cat([basis[:, m:].mT, draws[max(0, k - m) :]])[:count]
    return (norm * torch.nn.functional.normalize(rows, dim=1)).to(kept.dtype)
