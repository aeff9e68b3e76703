"""FedNova: updates are divided by their numbers of local steps before they are averaged.

Wang, Liu, Liang, Joshi, Poor, "Tackling the objective inconsistency problem in heterogeneous
federated optimization", NeurIPS 2020, equations 11 and 12, for plain SGD (a_i is a vector of
tau_i ones). Claim: no objective inconsistency when clients take unequal numbers of steps, and
fast convergence all the same.

    client:  send d_i = (w_i - w) / tau_i,  tau_i the number of local steps
    server:  w <- w + tau_eff sum_i p_i d_i,  tau_eff = sum_i p_i tau_i,  p_i = n_i / n

With equal tau_i it is FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated.method import Method, State
from isthmus.federated.steps import plain_sgd
from isthmus.learn.phase import Carry, Visit
from isthmus.tree import Tree


@catalogue.register("fednova", place="method", status="verified")
class FedNova(Method):
    """Overrides U and V."""

    reads_meta = True

    def __post_init__(self) -> None:
        plain_sgd(self)

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        tau = visit.steps.clamp_min(1.0)
        return Update(delta={name: x / tau for name, x in update.delta.items()}), local

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        tau_eff = 1.0
        if meta:
            p = self.weigh(meta) if reduced.weights is None else reduced.weights
            tau = torch.tensor([m.steps for m in meta], dtype=p.dtype)
            tau_eff = float(p @ tau)
        return {"shared": tree.add(state["shared"], reduced.tensors, alpha=tau_eff)}
