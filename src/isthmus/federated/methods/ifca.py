"""IFCA: each client picks, among k models, the one that suits its data best, and trains that one.

Ghosh, Chung, Yin, Ramchandran, "An efficient framework for clustered federated learning", NeurIPS
2020, algorithm 1 with model averaging. Claim: alternating between cluster estimates and descent
converges to every cluster's optimum from a fair start.

    client:  j = argmin_j f_i(w_j);  E epochs of  v <- v - lr * grad f_i(v)  from w_j;  send (v, j)
    server:  w_j <- sum_{i: j_i = j} n_i v_i / sum_{i: j_i = j} n_i

All k models go down, one comes up. The first model is the task's; the others are it with the
entries of every tensor in another order (reconstructed), which is a fresh draw of weights that were
drawn alike and leaves constants alone. With pretrained weights it is a poor start. What is served
is the model of most clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue, seeds, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated import judge
from isthmus.federated.method import Knobs, Known, Method, State
from isthmus.federated.stack import Stack
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Visit
from isthmus.models.factors import Places
from isthmus.tasks.contract import Batch, Role
from isthmus.tree import Tree

MODELS, PICK = "clusters/", "pick"


class Settings(Knobs):
    """k: clusters."""

    k: int = Field(2, ge=1)


@catalogue.register("ifca", place="method", status="verified")
class IFCA(Method):
    """Overrides D, S, F (choose, then train), U, V."""

    Settings = Settings
    stacks = True
    sends_values = True

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        return judge.attach(module)

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return judge.roles(given)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reducer = Stack()
        self.once = replace(self.local, epochs=1, steps=None)

    def init(self, tensors: Tree) -> State:
        def drawn(name: str, j: int) -> Tensor:
            x = tensors[name]
            if j == 0:
                return x
            order = seeds.permutation(seeds.key("ifca", name, j), x.numel())
            return x.reshape(-1)[order].view(x.shape)

        k = range(self.knobs.k)
        models = {name: torch.stack([drawn(name, j) for j in k]) for name in self.names.shared}
        return {"clusters": models, "members": torch.zeros(self.knobs.k, dtype=torch.float64)}

    def served(self, state: State) -> Tree:
        return tree.row(state["clusters"], int(state["members"].argmax()))

    def send(self, state: State, known: Known) -> Tree:
        return {MODELS + name: x for name, x in state["clusters"].items()}

    def nothing(self, state: State) -> Reduced:
        return Reduced({name: x[:0] for name, x in state["clusters"].items()})

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        models = {name: down[MODELS + name] for name in self.names.shared}
        first = {name: x[0] for name, x in models.items()}
        params, _ = super().start(visit, first, kept)
        zero = torch.zeros_like(next(iter(first.values())).reshape(-1)[:1].expand(self.knobs.k))
        return params, {"models": models, "losses": zero, "pick": zero}

    def phases(self, purpose: str) -> list[Phase]:
        if purpose == "warm-up":
            return []
        (train,) = super().phases("train")
        choose = replace(
            train,
            name="choose",
            loss=self.judged,
            step=self.choose,
            plans=self.once.plans,
            follow=None,
        )
        return [choose, train] if purpose == "train" else [choose]

    def judged(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        return judge.weighted(self.stage, model, carry["models"], batch), {}

    def choose(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """Add up the losses; the tensors become those of the best model so far."""
        many = batch.weight.sum()
        losses = carry["losses"] + many * judge.losses(grad, self.knobs.k, batch)
        pick = (torch.arange(self.knobs.k) == losses.argmin()).to(losses.dtype)
        own = judge.mixed(pick, {name: carry["models"][name] for name in params})
        return own, opt, {**carry, "losses": losses, "pick": pick}

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        chosen = judge.mixed(carry["pick"], carry["models"])
        update, local = super().finish(visit, params, chosen, carry, kept)
        return replace(update, values={PICK: carry["pick"]}), local

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        pick = reduced.values[PICK].double()
        items = torch.tensor([m.n_examples for m in meta], dtype=torch.float64)
        weights = pick * items[:, None]
        share = weights / weights.sum(0).clamp_min(1e-30)
        models = {
            name: x + torch.tensordot(share.T.to(x.dtype), reduced.tensors[name], 1)
            for name, x in state["clusters"].items()
        }
        return {"clusters": models, "members": pick.sum(0)}
