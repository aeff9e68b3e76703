"""FedDyn: a quadratic term around the global model, its bias taken out by a memory of updates.

Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, "Federated learning based on dynamic
regularization", ICLR 2021, algorithm 1. Claim: local and global stationary points agree, so
that fewer rounds are needed than by SCAFFOLD, FedAvg or FedProx, with unlike clients and few
of them in a round.

    client:  v <- v - lr (g(v) + alpha (v - w + h_i));  at the end  h_i <- h_i + (v - w)
    server:  h <- h + (|S| / N) mean_S (v_i - w);  w <- mean_S v_i + h

Here h_i = -grad_i / alpha is the sum of the client's own updates, in place of the paper's
grad_i, and h the mean of all N of them; the client keeps h_i, so the server holds one tensor
more than the model. What the server adds is what it decoded: with a codec that loses, h is no
longer the exact mean of the clients' h_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated.method import Knobs, Method, State
from isthmus.federated.steps import even, moving, plain_sgd
from isthmus.learn.phase import Carry, Grad, Opt, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

H = "h/"


class Settings(Knobs):
    """alpha: strength of the quadratic term."""

    alpha: float = Field(0.1, gt=0.0)


@catalogue.register("feddyn", place="method", status="verified")
class FedDyn(Method):
    """Overrides S, P, U, W, V. The model is averaged evenly over the participants."""

    Settings: ClassVar[type[Knobs]] = Settings

    def __post_init__(self) -> None:
        plain_sgd(self)

    @property
    def strength(self) -> float:
        """alpha of the paper."""
        return self.knobs.alpha

    def init(self, tensors: Tree) -> State:
        h = {name: torch.zeros_like(tensors[name]) for name in moving(self.names)}
        return {**super().init(tensors), "h": h}

    def keep(self, tensors: Tree) -> Tree:
        h_i = {H + name: torch.zeros_like(tensors[name]) for name in moving(self.names)}
        return {**super().keep(tensors), **h_i}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        v, _ = super().start(visit, down, kept)
        return v, {"w - h_i": {n: down[n] - kept[H + n] for n in moving(self.names)}}

    def slope(self, grad: Grad, v: Tree) -> Tree:
        """The gradient of the client's loss that a step takes."""
        return grad(v)[0]

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        g = self.slope(grad, params)
        pull = {n: g[n] + self.strength * (params[n] - x) for n, x in carry["w - h_i"].items()}
        params, opt = opt.update({**g, **pull}, params)
        return params, opt, carry

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        h_i = {H + n: kept[H + n] + update.delta[n] for n in moving(self.names)}
        return update, {**local, **h_i}

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return even(meta)

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        part = len(meta) / self.population
        h = tree.add(state["h"], reduced.tensors, alpha=part)
        w = tree.add(state["shared"], reduced.tensors)
        if meta:  # noise alone, of a round that nobody took part in, is no mean of models
            w = {**w, **tree.add(h, w)}
        return {**state, "shared": w, "h": h}
