"""AFL: the model for the worst mixture of the clients, by descent in w and ascent in lambda.

Mohri, Sivek, Suresh, "Agnostic federated learning", ICML 2019, section 5 (Stochastic-AFL).
Claim: the best worst-client accuracy, where models trained on a fixed mixture favour some.

    goal:    min_w max_lambda  sum_i lambda_i F_i(w),  lambda on the simplex
    server:  w <- w + sum_S lambda_i (w_i - w) / sum_S lambda_i
             lambda <- P(lambda + gamma F),  P the Euclidean projection onto the simplex

F_i is the loss of w over all items of client i. The paper takes one gradient a round; here a
client takes its local steps, and with a partial cohort only those present climb
(reconstructed). The server sends lambda along with w, and a client sends lambda_i (w_i - w) and
F_i in its own of N places, so that what the server reads is a mean of uploads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated.measured import Measured
from isthmus.federated.method import Knobs, Known, State
from isthmus.federated.steps import even
from isthmus.learn.phase import Carry, Visit
from isthmus.tree import Tree

LAMBDA, LOSSES = "afl/lambda", "afl/losses"


class Settings(Knobs):
    """gamma: step of the ascent in lambda; 0 is FedAvg with even weights."""

    gamma: float = Field(0.1, ge=0.0)


@catalogue.register("afl", place="method", status="verified")
class AFL(Measured):
    """Overrides D, S, F, L (to measure F_i), U, W, V."""

    Settings = Settings

    def init(self, tensors: Tree) -> State:
        state = super().init(tensors)
        like = next(iter(state["shared"].values()))
        n = self.population
        return {**state, "lambda": {LAMBDA: torch.full((n,), 1.0 / n, dtype=like.dtype)}}

    def send(self, state: State, known: Known) -> Tree:
        return {**state["shared"], **state["lambda"]}

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        place = (torch.arange(self.population) == visit.client).to(carry["F"].dtype)
        own = (place * down[LAMBDA]).sum()
        delta = {name: own * x for name, x in update.delta.items()}
        return Update(delta={**delta, LOSSES: place * carry["F"]}), local

    def nothing(self, state: State) -> Reduced:
        return Reduced(tree.zeros_like({**state["shared"], LOSSES: state["lambda"][LAMBDA]}))

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return even(meta)

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        lam = state["lambda"][LAMBDA]
        if not meta:
            return {**state, "shared": tree.add(state["shared"], reduced.tensors)}
        weight = (self.weigh(meta) if reduced.weights is None else reduced.weights).to(lam.dtype)
        present = torch.tensor([m.client for m in meta])
        total = float(weight @ lam[present])
        w = tree.add(state["shared"], reduced.tensors, alpha=1.0 / total if total > 0 else 0.0)
        losses = reduced.tensors[LOSSES][present] / weight
        lam = lam.index_add(0, present, self.knobs.gamma * losses)
        return {"shared": w, "lambda": {LAMBDA: onto_simplex(lam)}}


def onto_simplex(x: Tensor) -> Tensor:
    """The nearest point of `{y >= 0, sum y = 1}` to x `[n]` (Duchi et al., ICML 2008, figure 1).

    >>> onto_simplex(torch.tensor([0.5, 0.7, -3.0]))
    tensor([0.4000, 0.6000, 0.0000])
    """
    falling = x.sort(descending=True).values
    excess = falling.cumsum(0) - 1.0
    count = torch.arange(1, len(x) + 1, dtype=x.dtype)
    last = int((falling * count > excess).sum()) - 1
    return (x - excess[last] / count[last]).clamp_min(0.0)
