"""FlexLoRA: average products, redistribute them by SVD at every client's own rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", NeurIPS 2024, arXiv 2402.11505. Claim: clients with more resources train
larger ranks and the whole federation generalises better than at the smallest common rank.

    D = sum_i p_i s_i B_i A_i = U S V^T
    client j receives  B = U_{r_j} S_{r_j} / s_j,    A = V_{r_j}^T

The product is right for any scale, `s_j B A = U_r S_r V_r^T` (with sqrt(S) in B alone it
would not be). What lies beyond rank r_j is lost. Directions with no singular value keep
B = 0 beside a fresh orthogonal row of A (reconstructed), so that they can be learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.adapters.product import (
    Global,
    Lora,
    fresh_rows,
    members,
    numerical_rank,
    stacked,
    svd,
)
from isthmus.models.factors import Factors

Knobs = Lora
DEFAULTS = Knobs()


def aggregate(
    uploads: Sequence[Factors],
    weights: Tensor,
    down: Factors,
    knobs: Knobs = DEFAULTS,
    *,
    key: seeds.Key = 0,
) -> Global:
    """The mean product at the largest rank present; `serve` cuts it to a client's.

    Raises `NonFinite` and `InputError` (shapes, weights).
    """
    pair = stacked(members(uploads, weights, down))
    usv = svd(pair)
    rank = max([down.rank, *(x.rank for x in uploads)])
    m = min(rank, numerical_rank(usv.S, pair.left.dtype, pair.left.shape[1]))
    B = pair.left.new_zeros(pair.left.shape[0], rank)
    B[:, :m] = usv.U[:, :m] * (usv.S[:m] / down.scale).to(B.dtype)
    V = usv.V[:, :m]
    A = torch.cat([V.mT, fresh_rows(V, rank - m, 1.0, key)])
    lost = usv.S[m:].square().sum().sqrt()
    return Global(
        Factors(B.to(down.B.dtype), A.to(down.A.dtype), down.scale),
        diag={"singular_values": usv.S, "lost": float(lost)},
    )


def serve(factors: Factors, rank: int, scale: float) -> Factors:
    """What a client of this rank and scale receives of the global pair."""
    return factors.prefix(rank).at(scale)


@catalogue.register("flexlora", place="method", status="verified")
class FlexLora(LoraMethod):
    """Each client trains, sends and receives the pair of its own rank."""

    Settings = Knobs
    one_rank = False
    product_space = True

    rule = staticmethod(aggregate)


def upload(d: int, k: int, r: int) -> int:
    """Parameters a client of rank r sends for a layer `[d, k]`."""
    return r * (d + k)


def download(d: int, k: int, r: int) -> int:
    """Parameters a client of rank r receives."""
    return r * (d + k)
