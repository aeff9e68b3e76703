"""FedEx-LoRA: average the factors and correct the backbone by what the average misses.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", ACL 2025, arXiv 2410.09432. Claim: exact aggregation at little extra
traffic, better than FedIT and FFA-LoRA on reasoning and language understanding.

    B' = sum_i p_i B_i,    A' = sum_i p_i A_i
    W += s (sum_i p_i B_i A_i - B' A') = s sum_i p_i (B_i - B')(A_i - A')

The correction is written down with (n - 1) r directions and no SVD: let H `[n, n - 1]` be an
orthonormal basis of the complement of q = sqrt(p). With l_i = q_i B_i and m_i = q_i A_i,
`sum_j (sum_i H_ij l_i)(sum_i H_ij m_i) = sum_i l_i m_i - (sum_i q_i l_i)(sum_i q_i m_i)`,
which is the bracket, because H H^T = I - q q^T. That form and weighted means (the paper
writes 1/n) are (reconstructed), as are rank and alpha.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.contracts import LowRank
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.adapters.product import (
    Global,
    Lora,
    Member,
    mean_factors,
    members,
    recompress,
    working,
)
from isthmus.models.factors import Factors


class Knobs(Lora):
    """The adapter, and how much of the correction is kept."""

    residual_rank: int | None = Field(
        default=None, ge=0, description="keep the nearest correction of this rank; None keeps all"
    )


DEFAULTS = Knobs()


def covariance(terms: Sequence[Member]) -> LowRank:
    """s sum_i p_i (B_i - B')(A_i - A') with (n - 1) r directions; weights sum to one."""
    first = terms[0].factors
    work = working(first.B)
    p = torch.tensor([w for w, _ in terms], dtype=torch.float64)
    q = (p / p.sum()).sqrt()
    basis = torch.linalg.qr(q[:, None], mode="complete")[0][:, 1:]
    mix = (basis * q[:, None]).to(first.B.device, work)
    B = torch.stack([x.B.to(work) for _, x in terms])
    A = torch.stack([x.A.to(work) for _, x in terms])
    left = torch.einsum("ij,idr->djr", mix, B).flatten(1)
    right = torch.einsum("ij,irk->jrk", mix, A).flatten(0, 1)
    root = first.scale**0.5
    return LowRank(root * left, root * right)


def aggregate(
    uploads: Sequence[Factors],
    weights: Tensor,
    down: Factors,
    knobs: Knobs = DEFAULTS,
    *,
    key: seeds.Key = 0,
) -> Global:
    """The mean of each factor, and the correction for the backbone.

    Raises `NonFinite` and `InputError` (ranks, shapes, weights).
    """
    terms = members(uploads, weights, down, one_rank=True)
    residual = covariance(terms)
    if knobs.residual_rank is not None:
        residual = recompress([residual], knobs.residual_rank)
    rank = residual.left.shape[1]
    return Global(mean_factors(terms), [residual] if rank else [], {"residual_rank": rank})


@catalogue.register("fedex-lora", place="method", status="verified")
class FedExLora(LoraMethod):
    """Factors are averaged apart; what that misses goes into the backbone."""

    Settings = Knobs
    keeps_base = True
    product_space = True

    rule = staticmethod(aggregate)


def upload(d: int, k: int, r: int) -> int:
    """Parameters a client sends for a layer `[d, k]`."""
    return r * (d + k)


def download(d: int, k: int, r: int, residual_rank: int) -> int:
    """Parameters a client receives; the correction has rank (n - 1) r, or is sent dense."""
    return r * (d + k) + min(residual_rank * (d + k), d * k)
