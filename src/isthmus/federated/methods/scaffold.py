"""SCAFFOLD: control variates take the client drift out of local steps.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: stochastic controlled averaging for
federated learning", ICML 2020, algorithm 1 with option II. Claim: convergence that client
heterogeneity does not slow down, with fewer rounds than FedAvg.

    client, K steps:  y <- y - lr (g(y) - c_i + c)
    client, end:      c_i+ = c_i - c + (x - y) / (K lr);  send (y - x, c_i+ - c_i);  c_i <- c_i+
    server:           x <- x + mean_S (y_i - x);  c <- c + (|S| / N) mean_S (c_i+ - c_i)

c is always the mean of all N clients' c_i. Option II takes local steps to be plain SGD steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated.method import Known, Method, State
from isthmus.federated.steps import even, moving, plain_sgd
from isthmus.learn.phase import Carry, Grad, Opt, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

C = "control/"


@catalogue.register("scaffold", place="method", status="verified")
class Scaffold(Method):
    """Overrides D, S, P, U, W, V. The model is averaged evenly over the participants."""

    def __post_init__(self) -> None:
        plain_sgd(self)

    @property
    def controlled(self) -> list[str]:
        return moving(self.names)

    def init(self, tensors: Tree) -> State:
        state = super().init(tensors)
        c = {C + name: torch.zeros_like(tensors[name]) for name in self.controlled}
        return {**state, "c": c}

    def keep(self, tensors: Tree) -> Tree:
        c_i = {C + name: torch.zeros_like(tensors[name]) for name in self.controlled}
        return {**super().keep(tensors), **c_i}

    def send(self, state: State, known: Known) -> Tree:
        return {**state["shared"], **state["c"]}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        x, _ = super().start(visit, down, kept)
        return x, {"c - c_i": {n: down[C + n] - kept[C + n] for n in self.controlled}}

    def slope(self, grad: Grad, y: Tree) -> Tree:
        """The gradient of the client's loss that a step takes."""
        return grad(y)[0]

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        g = self.slope(grad, params)
        params, opt = opt.update({**g, **tree.add(carry["c - c_i"], g)}, params)
        return params, opt, carry

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        k = visit.steps.clamp_min(1.0) * visit.lr
        for name in self.controlled:
            change = -down[C + name] - update.delta[name] / k
            change = torch.where(visit.steps > 0, change, torch.zeros_like(change))
            update.delta[C + name] = change
            local[C + name] = kept[C + name] + change
        return update, local

    def nothing(self, state: State) -> Reduced:
        return Reduced(tree.zeros_like({**state["shared"], **state["c"]}))

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return even(meta)

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        part = len(meta) / self.population
        c = tree.add(state["c"], reduced.tensors, alpha=part)
        return {"shared": tree.add(state["shared"], reduced.tensors), "c": c}
