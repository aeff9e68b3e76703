"""FLoRA: stack the clients' adapters, merge the stack into the backbone, start afresh.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, arXiv 2409.05976. Claim: aggregation free of noise, for clients
of different ranks, better than averaging the factors.

    L = [B_1 .. B_n],    R = [p_1 s_1 A_1; ..; p_n s_n A_n],    W += L R
    B' = 0,              A' fresh

Exact, since `L R = sum_i p_i s_i B_i A_i`; the weight stands on one side only. Nothing of
the learned directions is left in the adapter. Drawing the fresh A from a key all share, and
rank and alpha, are (reconstructed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.contracts import LowRank
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.adapters.product import Global, Lora, members, working
from isthmus.federated.method import Known, State
from isthmus.learn.phase import Carry, Visit
from isthmus.models.factors import Factors, fresh
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
    """The stack as a pair for the backbone (any ranks and scales), and a new start.

    Raises `NonFinite` and `InputError` (shapes, weights).
    """
    terms = members(uploads, weights, down)
    work = working(down.B)
    left = torch.cat([x.B.to(work) for _, x in terms], 1)
    right = torch.cat([p * x.scale * x.A.to(work) for p, x in terms], 0)
    start = fresh(key, down.rank, down.A.shape[1], down.A.dtype).to(down.A.device)
    return Global(
        Factors(torch.zeros_like(down.B), start, down.scale),
        [LowRank(left, right)],
        {"stack_rank": left.shape[1]},
    )


@catalogue.register("flora", place="method", status="verified")
class FLoRA(LoraMethod):
    """Every round starts at B = 0 and an A that server and clients draw from one key.

    So the pair itself never goes down: the stack does, as a change of the backbone.
    """

    Settings = Knobs
    keeps_base = True
    one_rank = False
    product_space = True

    def send(self, state: State, known: Known) -> Tree:
        return {name: state["shared"][name] for name in self.rest}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        return super().start(visit, {**down, **self._begun(visit.round, visit.lr.dtype)}, kept)

    def _begun(self, round: Tensor | int, dtype: torch.dtype) -> Tree:
        """The pairs of a round's start, as every party draws them."""
        begun: Tree = {}
        for number, at in enumerate(self.places.values()):
            d, k = at.shape
            drawn = seeds.fold(seeds.fold(_FRESH, round), number)
            begun[at.A] = fresh(drawn, at.rank, k, dtype)
            begun[at.B] = torch.zeros(d, at.rank, dtype=dtype)
        return begun

    def origin(self, state: State, down: Tree, round: int) -> Tree:
        return self._begun(round, next(iter(state["shared"].values())).dtype)

    rule = staticmethod(aggregate)


_FRESH = seeds.key("flora")


def upload(d: int, k: int, r: int) -> int:
    """Parameters a client of rank r sends for a layer `[d, k]`."""
    return r * (d + k)


def download(d: int, k: int, stack_rank: int) -> int:
    """Parameters a client receives: the stack of N = sum r_i directions, or the dense change."""
    return min(stack_rank * (d + k), d * k)
