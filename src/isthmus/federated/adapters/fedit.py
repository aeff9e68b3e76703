"""FedIT (Shepherd): federated averaging of the LoRA factors for instruction tuning.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning",
arXiv 2305.05644. Claim: clients with different kinds of instructions train together a model
that is judged better than one trained on a single client's instructions.

    B' = sum_i p_i B_i,    A' = sum_i p_i A_i

The served product is off by the weighted covariance of the factors,
`D - s B' A' = s sum_i p_i (B_i - B')(A_i - A')`, so it is exact only where clients agree in
one factor. Knobs are the authors' defaults (attention queries only, rank 16, scale 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.adapters.product import Global, Lora, mean_factors, members
from isthmus.models.factors import Factors


class Knobs(Lora):
    """The adapter of the authors' code."""

    rank: int = Field(default=16, ge=1, description="r")
    targets: str | tuple[str, ...] = Field(
        default=("q_proj",), description="endings of layer paths"
    )


DEFAULTS = Knobs()


def aggregate(
    uploads: Sequence[Factors],
    weights: Tensor,
    down: Factors,
    knobs: Knobs = DEFAULTS,
    *,
    key: seeds.Key = 0,
) -> Global:
    """The weighted mean of each factor, for uploads of the rank of `down`.

    Raises `NonFinite` and `InputError` (ranks, shapes, weights).
    """
    return Global(mean_factors(members(uploads, weights, down, one_rank=True)))


@catalogue.register("fedit", place="method", status="miniature")
class FedIT(LoraMethod):
    """Both factors travel and are averaged apart."""

    Settings = Knobs

    rule = staticmethod(aggregate)


def upload(d: int, k: int, r: int) -> int:
    """Parameters a client sends for a layer `[d, k]`."""
    return r * (d + k)


def download(d: int, k: int, r: int) -> int:
    """Parameters a client receives."""
    return r * (d + k)
