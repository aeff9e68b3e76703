"""FedCM: every local step is mixed with the mean direction of the round before.

Xu, Wang, Wang, Yao, "FedCM: federated learning with client-level momentum", arXiv 2106.10874,
algorithm 2. Claim: robust to few participants and unlike clients, without state at the clients
or a second upload.

    client:  v <- v - lr (alpha g(v) + (1 - alpha) Delta)
    server:  Delta <- mean_S (w - v_i) / (K lr);  w <- w + server_lr mean_S (v_i - w)

The server holds -lr Delta, the mean update of one step, and the client divides by its rate; so
with a rate that decays, Delta is larger by the ratio of two rounds' rates. Where clients take
unequal numbers of steps, K is their mean: Delta is the mean over all steps taken. In the paper
the server's rate is server_lr K lr.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced
from isthmus.federated.method import Knobs, Known, Method, State
from isthmus.federated.steps import even, moving, plain_sgd
from isthmus.learn.phase import Carry, Grad, Opt, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

D = "direction/"


class Settings(Knobs):
    """alpha: share of the own gradient (1: FedAvg); server_lr: factor on the mean update."""

    alpha: float = Field(0.1, gt=0.0, le=1.0)
    server_lr: float = Field(1.0, gt=0.0)


@catalogue.register("fedcm", place="method", status="verified")
class FedCM(Method):
    """Overrides D, S, P, W, V."""

    Settings: ClassVar[type[Knobs]] = Settings

    def __post_init__(self) -> None:
        plain_sgd(self)

    @property
    def share(self) -> float:
        """alpha of the paper."""
        return self.knobs.alpha

    def init(self, tensors: Tree) -> State:
        d = {D + name: torch.zeros_like(tensors[name]) for name in moving(self.names)}
        return {**super().init(tensors), "direction": d}

    def send(self, state: State, known: Known) -> Tree:
        return {**state["shared"], **state["direction"]}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        v, _ = super().start(visit, down, kept)
        return v, {"Delta": {n: -down[D + n] / visit.lr for n in moving(self.names)}}

    def slope(self, grad: Grad, v: Tree) -> Tree:
        """The gradient of the client's loss that a step takes."""
        return grad(v)[0]

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        g = self.slope(grad, params)
        mixed = {n: torch.lerp(x, g[n], self.share) for n, x in carry["Delta"].items()}
        params, opt = opt.update({**g, **mixed}, params)
        return params, opt, carry

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return even(meta)

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        update = reduced.tensors
        steps = max(1.0, sum(m.steps for m in meta) / max(1, len(meta)))
        return {
            "shared": tree.add(state["shared"], update, alpha=self.knobs.server_lr),
            "direction": {D + n: update[n] / steps for n in moving(self.names)},
        }
