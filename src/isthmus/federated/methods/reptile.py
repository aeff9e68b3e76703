"""Reptile: the model from which each client's own training leads furthest in few steps.

Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", arXiv:1803.02999, algorithms 1
and 2. Claim: as good as MAML without its second derivatives.

    client:   phi_i = SGD from phi on its own data
    server:   phi <- phi + alpha_t mean_i (phi_i - phi),   alpha_t = alpha (1 - t / T)
    predict:  SGD from phi on the client's own data

t counts rounds from 0 and T is the number after which the step is zero; at T = 0 it stays alpha.
alpha = 1, T = 0 is FedAvg with even weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced
from isthmus.federated.method import Knobs, Method, State
from isthmus.learn.phase import Phase
from isthmus.tree import Tree


class Settings(Knobs):
    """alpha: the server's first step; T: rounds until it is zero, 0 for a constant one."""

    alpha: float = Field(1.0, gt=0.0)
    T: int = Field(0, ge=0)


@catalogue.register("reptile", place="method", status="verified")
class Reptile(Method):
    """Overrides F (for the purpose `score`), W and V."""

    Settings = Settings

    def init(self, tensors: Tree) -> State:
        return {**super().init(tensors), "count": {"rounds": torch.tensor(0)}}

    def phases(self, purpose: str) -> list[Phase]:
        if purpose != "score":
            return super().phases(purpose)
        return [replace(phase, name=f"score {phase.name}") for phase in self.phases("train")]

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return torch.full((len(meta),), 1.0 / len(meta), dtype=torch.float64)

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        t, phi = state["count"]["rounds"], state["shared"]
        alpha_t = self.knobs.alpha
        if self.knobs.T:
            alpha_t *= max(0.0, 1.0 - int(t) / self.knobs.T)
        moved = tree.add(phi, reduced.tensors, alpha=alpha_t)
        return {**state, "shared": moved, "count": {"rounds": t + 1}}
