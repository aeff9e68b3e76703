"""FedFomo: each client mixes in the models of those whose models would serve it better.

Zhang, Sapra, Fidler, Yeung, Alvarez, "Personalized federated learning with first order model
optimization", ICLR 2021, equations 4 to 6. Claim: clients reach their own targets, also ones that
differ from what they train on, with no global model.

    server:  sends client i the models of M others: with probability 1 - eps those with the largest
             p_ij, else any M;  p_i <- p_i + w_i
    client:  w_in = (L_i(theta_i) - L_i(theta_n)) / ||theta_n - theta_i||, on its validation items
             theta_i <- theta_i + sum_n max(w_in, 0) / sum_m max(w_im, 0) * (theta_n - theta_i)
             E epochs of  theta_i <- theta_i - lr * grad f_i(theta_i);  send (theta_i, w_i)

theta_i is the client's own model, which it keeps. Its validation items are every s-th of its items,
and are not trained on; s = 0 weighs on the training items. Which M are tried depends on client and
round alone (reconstructed). eps stays as it is; the paper lets it decay. A model at a distance of
rounding weighs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from isthmus import catalogue, seeds, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.errors import InputError
from isthmus.federated import judge
from isthmus.federated.method import Knobs, Known, State
from isthmus.federated.portion import Portion
from isthmus.federated.rows import Rows
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Visit
from isthmus.models.factors import Places
from isthmus.tasks.contract import Batch, Role
from isthmus.tree import Tree

OTHERS, OWN, WEIGHTS = "others/", "theta/", "weights"


class Settings(Knobs):
    """M: models a client is sent; eps: share of rounds that explore; s: every s-th item judges."""

    M: int = Field(5, ge=1)
    eps: float = Field(0.3, ge=0.0, le=1.0)
    s: int = Field(5, ge=0)

    @field_validator("s")
    @classmethod
    def _not_all(cls, s: int) -> int:
        if s == 1:
            raise ValueError("0, or 2 and more: with 1 nothing is left to train on")
        return s


@catalogue.register("fedfomo", place="method", status="verified")
class FedFomo(Rows):
    """Overrides D, S, F (mix, then train), U, V."""

    Settings = Settings
    sends_values = True

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        return judge.attach(module)

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return judge.roles(given)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.population < 2:
            raise InputError("clients", self.population, "two or more with method fedfomo")
        self.m, s = min(self.knobs.M, self.population - 1), self.knobs.s
        once = replace(self.local, epochs=1, steps=None)
        self.judging = Portion(once, s) if s else once
        self.training = Portion(self.local, s, rest=True) if s else self.local

    def init(self, tensors: Tree) -> State:
        n = self.population
        zero = torch.zeros(n, n, dtype=torch.float64)
        return {**super().init(tensors), "p": zero, "round": torch.zeros((), dtype=torch.int64)}

    def keep(self, tensors: Tree) -> Tree:
        own = {OWN + name: tensors[name] for name in self.names.shared}
        return {**super().keep(tensors), **own}

    def chosen(self, state: State, client: int) -> Tensor:
        """The M clients whose models this one is sent, int64 `[M]`."""
        key = seeds.key("fedfomo", client, int(state["round"]))
        order = seeds.permutation(key, self.population)
        order = order[order != client]
        if float(seeds.uniform(seeds.fold(key, 1), (), torch.float64)) >= self.knobs.eps:
            order = order[state["p"][client][order].argsort(descending=True, stable=True)]
        return order[: self.m]

    def send(self, state: State, known: Known) -> Tree:
        who = self.chosen(state, known.client)
        return {OTHERS + name: x[who] for name, x in state["clients"].items()}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        own = {name: kept[OWN + name] for name in self.names.shared}
        params, _ = super().start(visit, own, kept)
        models = {
            name: torch.cat([own[name][None], down[OTHERS + name]]) for name in self.names.shared
        }
        losses = torch.zeros_like(next(iter(own.values())).reshape(-1)[:1].expand(self.m + 1))
        return params, {
            "models": models,
            "losses": losses,
            "items": losses[0],
            "w": losses[1:],
        }

    def phases(self, purpose: str) -> list[Phase]:
        if purpose == "warm-up":
            return []
        (train,) = super().phases("train")
        mix = replace(
            train,
            name="mix",
            loss=self.judged,
            step=self.mix,
            plans=self.judging.plans,
            follow=None,
        )
        return [mix, replace(train, plans=self.training.plans)] if purpose == "train" else [mix]

    def judged(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        return judge.weighted(self.stage, model, carry["models"], batch), {}

    def mix(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """Add up the losses; the tensors become the mixture by the losses so far."""
        many = batch.weight.sum()
        losses = carry["losses"] + many * judge.losses(grad, self.m + 1, batch)
        items = carry["items"] + many
        models = carry["models"]
        gaps = {name: x[1:] - x[:1] for name, x in models.items()}
        distance = tree.flatten_stacked(gaps).square().sum(1).sqrt()
        gain = (losses[0] - losses[1:]) / items
        size = tree.flatten({name: x[0] for name, x in models.items()}).square().sum().sqrt()
        # Of a model that is the same but for rounding the quotient would be noise.
        least = torch.finfo(distance.dtype).eps ** 0.5 * size
        w = torch.where(distance > least, gain / distance.clamp_min(1e-30), 0.0)
        better = w.clamp_min(0.0)
        total = better.sum()
        share = better / torch.where(total > 0, total, torch.ones_like(total))
        toward = judge.mixed(share, {name: gaps[name] for name in params})
        own = {name: models[name][0] + toward[name] for name in params}
        return own, opt, {**carry, "losses": losses, "items": items, "w": w}

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        theta = {name: params[name] for name in self.names.shared}
        local = {name: params[name] for name in self.names.local}
        own = {OWN + name: x for name, x in theta.items()}
        return Update(values={**theta, WEIGHTS: carry["w"]}), {**local, **own}

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        who = torch.tensor([m.client for m in meta], dtype=torch.int64)
        rows = {n: x.index_copy(0, who, reduced.values[n]) for n, x in state["clients"].items()}
        p = state["p"].clone()
        for client, w in zip(who.tolist(), reduced.values[WEIGHTS].double(), strict=True):
            p[client, self.chosen(state, client)] += w
        return {"clients": rows, "p": p, "round": state["round"] + 1}
