"""pFedMe: clients descend Moreau envelopes of their losses; the inner minimiser is personal.

Dinh, Tran, Nguyen, "Personalized federated learning with Moreau envelopes", NeurIPS 2020,
algorithm 1. Claim: faster convergence and better personal models than Per-FedAvg.

    F_i(w) = min_theta f_i(theta) + (lam / 2) ||theta - w||^2;  grad F_i(w) = lam (w - theta_i(w))
    each local step, on its batch:
        K times  theta <- theta - lr * (grad f_i(theta) + lam (theta - w_i))
        w_i <- w_i - eta lam (w_i - theta)
    server:  w <- (1 - beta) w + beta mean_i w_i

theta starts a visit at w (reconstructed: the algorithm leaves it open) and goes on from where the
last step left it. The inner solver is the run's optimiser. theta_i stays and predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated.method import Knobs, State
from isthmus.federated.twin import Twin
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree


class Settings(Knobs):
    """lam: strength of the envelope; K: inner steps; eta: step of w_i; beta: step of the server."""

    lam: float = Field(15.0, gt=0.0)
    K: int = Field(5, ge=1)
    eta: float = Field(0.005, gt=0.0)
    beta: float = Field(1.0, ge=0.0)


@catalogue.register("pfedme", place="method", status="verified")
class PFedMe(Twin):
    """Overrides S, F, L, P, U, W (participants count evenly) and V."""

    Settings = Settings

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        w = {copy: params[name] for copy, name in self.of.items()}
        return {**params, **w}, {"w": w}

    def phases(self, purpose: str) -> list[Phase]:
        if purpose != "train":
            return []
        return [Phase("train", self.mine, self.loss, self.local.optimiser, self.step)]

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        return self.stage.loss(self.personal(model, batch.key), batch)

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        k, theta, w = self.knobs, params, carry["w"]
        for _ in range(k.K):
            g, _ = grad(theta)
            g = tree.tree_map(lambda g, t, w: g + k.lam * (t - w), g, theta, w)
            theta, opt = opt.update(g, theta)
        w = tree.tree_map(lambda w, t: w - k.eta * k.lam * (w - t), w, theta)
        return theta, opt, {"w": w}

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        w = {self.of[copy]: x for copy, x in carry["w"].items()}
        return super().finish(visit, {**params, **w}, down, carry, kept)

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return torch.full((len(meta),), 1.0 / len(meta), dtype=torch.float64)

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        return {"shared": tree.add(state["shared"], reduced.tensors, alpha=self.knobs.beta)}
