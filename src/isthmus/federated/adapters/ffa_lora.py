"""FFA-LoRA: freeze A, train and average B alone.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
arXiv 2403.12313. Claim: half the traffic, no covariance error of averaged factors, and under
differential privacy no product of two noises, hence better accuracy than averaging both.

    A drawn once from a seed all share;    B' = sum_i p_i B_i

Exact for any weights that sum to one: `sum_i p_i s B_i A = s B' A`. The row space of the
adapter never changes, which makes it the slowest learner of those here. The rank and alpha
are (reconstructed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.errors import InputError
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.adapters.product import Global, Lora, mean_factors, members
from isthmus.federated.method import State
from isthmus.models.factors import Factors, Places
from isthmus.tasks.contract import Role
from isthmus.tree import Tree

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
    """The weighted mean of B beside the A of `down`, which every upload must still hold.

    Raises `NonFinite` and `InputError` (ranks, shapes, weights, an A that was trained).
    """
    terms = members(uploads, weights, down, one_rank=True)
    for i, x in enumerate(uploads):
        if not torch.equal(x.A, down.A):
            raise InputError(f"uploads[{i}].A", "changed", "the frozen A all clients share")
    return Global(Factors(mean_factors(terms).B, down.A, down.scale))


@catalogue.register("ffa-lora", place="method", status="verified")
class FFALora(LoraMethod):
    """A stays as the shared seed drew it; only B travels."""

    Settings = Knobs

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        frozen = {at.A for at in places.values()}
        return {name: "frozen" if name in frozen else role for name, role in given.items()}

    def init(self, tensors: Tree) -> State:
        return {**super().init(tensors), "A": {at.A: tensors[at.A] for at in self.places.values()}}

    def given(self, state: State, down: Tree) -> Tree:
        return {**state["A"], **super().given(state, down)}

    rule = staticmethod(aggregate)


def upload(d: int, k: int, r: int) -> int:
    """Parameters a client sends for a layer `[d, k]`: B alone."""
    return r * d


def download(d: int, k: int, r: int) -> int:
    """Parameters a client receives; A comes from the seed."""
    return r * d
