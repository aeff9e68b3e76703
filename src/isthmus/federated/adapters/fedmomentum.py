"""FedMomentum: average products, keep the learned directions, fold the rest into the backbone.

"FedMomentum", arXiv 2603.08014. Claim: faster convergence and better final accuracy than
earlier federated LoRA, because aggregation neither adds noise nor forgets the directions
along which the adapter was moving.

    D = sum_i p_i s_i B_i A_i = U S V^T            exact, by the QR of the stacked factors
    B' = U_r (S_r / s)^1/2,  A' = (S_r / s)^1/2 V_r^T                 (split "balanced")
    B' = U_r S_r / (s c),    A' = c V_r^T                             (split "orth_a")
    W += U_e S_e V_e^T       components r+1 .. e, with no further s: S contains it
    e = the fewest components with a share tau of sum_j S_j^2

At tau = 1 the round is exact, `W' + s B' A' = W + D`; otherwise it misses at most
sqrt(1 - tau) ||D||. Among rank-r pairs B' A' is the nearest to D (Eckart and Young). With
G = dLoss/dW a step of size h moves the weight by `-h s^2 (G A^T A + B B^T G)`: the factors
are the memory that the name speaks of, and clients start every round with a fresh optimiser.

(reconstructed), from the abstract and public descriptions: the balanced split, the exact SVD
in place of a randomised one, and tau. Added here:
- a client of rank r_i < r trains the first r_i of the ordered directions and holds the others
  frozen; the server adds that tail to its product, so that absent weight shrinks nothing;
- directions with S_j <= eps S_1 restart with B = 0 and a fresh row of A orthogonal to the
  kept ones: with both halves zero they would have zero gradient for ever;
- `align` rotates the pair towards the last one, same product and still balanced, for
  optimisers that look at single coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.errors import InputError
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.adapters.product import (
    Global,
    Lora,
    Member,
    Svd,
    check,
    fresh_rows,
    numerical_rank,
    part,
    stacked,
    svd,
    working,
)
from isthmus.models.factors import Factors

_FRESH_ROW = 3.0**-0.5  # length of a row that peft draws uniform in +-1/sqrt(k)
_NO_WEIGHT = 1e-6


class Knobs(Lora):
    """The adapter, and how a mean product is split between adapter and backbone."""

    split: Literal["balanced", "orth_a"] = Field(
        default="balanced", description="S shared by both factors, or orthonormal A times c"
    )
    c: float = Field(default=_FRESH_ROW, gt=0, description="length of the rows of A in orth_a")
    tau: float = Field(
        default=0.9999, gt=0, le=1, description="share of the squared singular values kept in all"
    )
    eps: float = Field(
        default=1e-6, ge=0, lt=1, description="directions below eps times the largest start afresh"
    )
    align: bool = Field(default=False, description="rotate towards the last pair; equal ranks only")


DEFAULTS = Knobs()


def aggregate(
    uploads: Sequence[Factors],
    weights: Tensor,
    down: Factors,
    knobs: Knobs = DEFAULTS,
    *,
    key: seeds.Key = 0,
) -> Global:
    """The next pair at the rank and scale of `down`, and the residual for the backbone.

    Uploads may have any ranks and scales. `diag`: singular_values `[m]`, live (directions
    kept), residual_rank, kept (share of the squared singular values).
    Raises `NonFinite` and `InputError` (shapes, weights, align with unequal ranks).
    """
    if knobs.align and any(x.rank != down.rank for x in uploads):
        raise InputError("align", True, "False when ranks differ (prefixes need the order of S)")
    pair = stacked(_with_tail(uploads, weights, down))
    usv = svd(pair)
    n, dtype = pair.left.shape[1], pair.left.dtype
    live = min(down.rank, numerical_rank(usv.S, dtype, n, knobs.eps))
    end = max(live, min(_enough(usv.S, knobs.tau), numerical_rank(usv.S, dtype, n)))
    B, A = _split(usv, live, down, knobs, key)
    if knobs.align:
        B, A = _aligned(B, A, down)
    energy = usv.S.square()
    kept = float(energy[:end].sum() / energy.sum()) if end else 1.0
    return Global(
        Factors(B.to(down.B.dtype), A.to(down.A.dtype), down.scale),
        [part(usv, live, end)] if end > live else [],
        {"singular_values": usv.S, "live": live, "residual_rank": end - live, "kept": kept},
    )


def _with_tail(uploads: Sequence[Factors], weights: Tensor, down: Factors) -> list[Member]:
    """The uploads, and of `down` each direction with the weight of those who did not train it."""
    p = check(uploads, weights, down)
    terms = [Member(w, x) for w, x in zip(p, uploads, strict=True) if w > 0.0]
    absent = [1.0 - sum(w for w, x in terms if x.rank > j) for j in range(down.rank)]
    missing = [j for j, w in enumerate(absent) if w > _NO_WEIGHT]
    root = torch.tensor([absent[j] ** 0.5 for j in missing], dtype=torch.float64)
    root = root.to(down.B.device, working(down.B))
    tail = Factors(down.B[:, missing] * root, root[:, None] * down.A[missing], down.scale)
    return [*terms, Member(1.0, tail)] if missing else terms


def _enough(S: Tensor, tau: float) -> int:
    """The fewest components whose squares reach tau of the whole; at tau = 1 all of them."""
    if tau == 1.0:  # the smallest squares would vanish in the rounding of the sum
        return S.numel()
    energy = S.square().cumsum(0)
    return int((energy < tau * energy[-1]).sum()) + 1


def _split(
    usv: Svd, live: int, down: Factors, knobs: Knobs, key: seeds.Key
) -> tuple[Tensor, Tensor]:
    """The first `live` components as a pair of the scale of `down`, the others made fresh."""
    U, V, S = usv.U[:, :live], usv.V[:, :live], usv.S[:live].to(usv.U.dtype) / down.scale
    if knobs.split == "balanced":
        B, A = U * S.sqrt(), S.sqrt()[:, None] * V.mT
        norm = float(A.norm(dim=1).mean()) if live else _FRESH_ROW
    else:
        B, A, norm = U * (S / knobs.c), knobs.c * V.mT, knobs.c
    new = down.rank - live
    blank = U.new_zeros(U.shape[0], new)
    return torch.cat([B, blank], 1), torch.cat([A, fresh_rows(V, new, norm, key)])


def _aligned(B: Tensor, A: Tensor, down: Factors) -> tuple[Tensor, Tensor]:
    """B Q and Q^T A with the rotation Q that brings them nearest to the pair of `down`."""
    near = B.mT @ down.B.to(B.dtype) + A @ down.A.to(A.dtype).mT
    left, _, right = torch.linalg.svd(near)
    Q = left @ right
    return B @ Q, Q.mT @ A


def serve(factors: Factors, rank: int, scale: float) -> Factors:
    """What a client of this rank and scale trains: the leading directions, still balanced."""
    root = (factors.scale / scale) ** 0.5
    B, A, _ = factors.prefix(rank)
    return Factors(B * root, A * root, scale)


@catalogue.register("fedmomentum", place="method", status="miniature")
class FedMomentum(LoraMethod):
    """The whole pair goes down, also to a client that trains only its first directions."""

    Settings = Knobs
    keeps_base = True
    one_rank = False
    product_space = True
    slices_download = False

    rule = staticmethod(aggregate)


def upload(d: int, k: int, r: int) -> int:
    """Parameters a client of rank r sends for a layer `[d, k]`."""
    return r * (d + k)


def download(d: int, k: int, r: int, residual_rank: int) -> int:
    """Parameters a client receives: the pair, and the residual or its dense sum if smaller."""
    return r * (d + k) + min(residual_rank * (d + k), d * k)
