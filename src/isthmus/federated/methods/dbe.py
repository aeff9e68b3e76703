"""DBE, the domain bias eliminator: a client's own shift takes its bias out of shared features.

Zhang, Hua, Cao, Wang, Song, Xue, Ma, Guan, "Eliminating domain bias for federated learning in
representation space", NeurIPS 2023, sections 4.2 and 4.3. Claim: methods with DBE generalise and
personalise better than without, and pass ten personalised ones by a large margin.

    warm-up, all clients:  train as FedAvg, send mu_i alone;  m = sum_i n_i / n mu_i
    client i, each batch:  h = features(x);  mu_i <- (1 - beta) mu_i + beta mean(h), from mu_i = 0
        min  l(head(h + z_i), y) + kappa mean_k (mu_ik - m_k)^2 / 2;      z_i stays with the client
    personal model:  head(features(x) + z_i);      global model:  head(features(x)), that is z_i = 0

The gradient of the regulariser flows through the newest batch mean only. The mean over k makes
its strength depend on the number K of features: 50, the authors' for K = 512, is far too much for
K = 32, so kappa is scaled by K / 512 unless `scaled` is off (reconstructed). With beta < 1 the
running mean is drawn to its start at 0, as in the authors' code; `debias` divides it by
1 - (1 - beta)^t (reconstructed).

m is a frozen tensor of the model that the server changes once, so it goes to each client once.
What the warm-up has trained is thrown away, and its weights are those of the rounds: n_i / n,
unless the method behind it weighs otherwise (SCAFFOLD: evenly).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated.between import halves, shares, watched
from isthmus.federated.method import Knobs, Method, State
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Step, Visit, update_once
from isthmus.models.factors import Places
from isthmus.tasks.contract import Batch, Role
from isthmus.tree import Tree

Z, MU, M = "head.z", "head.mu", "head.m"
MEAN = "mean"
"""The name of mu_i in the upload of the warm-up."""


class Settings(Knobs):
    """kappa: strength of the regulariser; scaled: times K / 512; beta: share of the newest batch
    in the running mean; debias: undo the mean's start at 0; shift: train z_i, else it stays 0.
    """

    kappa: float = Field(50.0, ge=0.0)
    scaled: bool = True
    beta: float = Field(1.0, gt=0.0, le=1.0)
    debias: bool = False
    shift: bool = True


@catalogue.register("dbe", place="method", status="miniature")
class DBE(Method):
    """Overrides F (the warm-up), L (the regulariser), P (the running mean), U and V (m)."""

    Settings = Settings
    plugs_in: ClassVar[bool] = True

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        module = super().attach(module, knobs, seed)
        _, head = halves(module, "dbe")
        zeros = head.weight.new_zeros(head.in_features)
        head.register_parameter("z", nn.Parameter(zeros.clone()))
        head.register_parameter("mu", nn.Parameter(zeros.clone()))
        head.register_buffer("m", zeros.clone())
        head.register_forward_pre_hook(shifted)
        return module

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return {**super().roles(given, places), Z: "local", MU: "local", M: "frozen"}

    def init(self, tensors: Tree) -> State:
        told = torch.zeros((), dtype=torch.int64)
        return {**super().init(tensors), "dbe": {M: tensors[M], "told": told}}

    def base(self, state: State) -> Tree:
        return {**super().base(state), M: state["dbe"][M]}

    def version(self, state: State) -> int:
        return super().version(state) + int(state["dbe"]["told"])

    def catch_up(self, state: State, version: int) -> Tree:
        missed = {M: state["dbe"][M]} if version < self.version(state) else {}
        return {**super().catch_up(state, version), **missed}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, carry = super().start(visit, down, kept)
        t = torch.zeros_like(visit.lr)
        return {**params, MU: torch.zeros_like(params[MU])}, {**carry, "t": t}

    def phases(self, purpose: str) -> list[Phase]:
        if purpose == "warm-up":
            (plain,) = Method.phases(self, "train")
            names = tuple(name for name in plain.trainable if name != Z)
            gather = self.gather
            return [replace(plain, name=purpose, trainable=names, loss=self.bare, step=gather)]
        phases = super().phases(purpose)
        if self.knobs.shift:
            return phases
        return [replace(p, trainable=tuple(n for n in p.trainable if n != Z)) for p in phases]

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        with watched(model.features) as calls:
            value, aux = super().loss(model, batch, carry)
        head, mean = model.head, batch_mean(calls[0].made, batch.weight)
        mu = self.mean_of(self.running(head.mu.detach(), mean), carry["t"] + 1.0)
        apart = (mu - head.m).square().mean() / 2.0
        return value + self.strength(len(mu)) * apart + handed(head.mu, mean), aux

    def bare(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the warm-up: that of the task."""
        with watched(model.features) as calls:
            value, aux = self.stage.loss(model, batch)
        return value + handed(model.head.mu, batch_mean(calls[0].made, batch.weight)), aux

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        if MU not in params:  # a phase of the method behind, with layers of its own
            return super().step(grad, params, opt, carry, batch)
        return self.measured(super().step, grad, params, opt, carry, batch)

    def gather(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """A step of the warm-up: that of FedAvg."""
        return self.measured(update_once, grad, params, opt, carry, batch)

    def measured(
        self, step: Step, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """A step, and the running mean after it."""
        means: list[Tensor] = []

        def without_mean(params: Tree) -> tuple[Tree, dict[str, Tensor]]:
            grads, aux = grad(params)
            means.append(grads[MU])
            return {name: g for name, g in grads.items() if name != MU}, aux

        new, opt, carry = step(without_mean, params, opt, carry, batch)
        mu = self.running(params[MU], means[0])
        return {**new, MU: mu}, opt, {**carry, "t": carry["t"] + 1.0}

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        if visit.purpose != "warm-up":
            return super().finish(visit, params, down, carry, kept)
        return Update(delta={MEAN: self.mean_of(params[MU], visit.steps.clamp_min(1.0))}), kept

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        if MEAN not in reduced.tensors:
            return {**super().server(state, reduced, meta), "dbe": state["dbe"]}
        told = torch.ones_like(state["dbe"]["told"])
        return {**state, "dbe": {M: reduced.tensors[MEAN], "told": told}}

    def running(self, mu: Tensor, mean: Tensor) -> Tensor:
        """The running mean after a batch of this mean."""
        return (1.0 - self.knobs.beta) * mu + self.knobs.beta * mean

    def mean_of(self, mu: Tensor, t: Tensor) -> Tensor:
        """What the running mean says after t batches."""
        return mu / (1.0 - (1.0 - self.knobs.beta) ** t) if self.knobs.debias else mu

    def strength(self, features: int) -> float:
        """kappa for a model of this many features."""
        return self.knobs.kappa * (features / 512 if self.knobs.scaled else 1.0)


def shifted(head: Any, given: tuple[Tensor, ...]) -> tuple[Tensor]:
    """What the head of a personal model is given: h + z."""
    return (given[0] + head.z,)


def batch_mean(h: Tensor, weight: Tensor) -> Tensor:
    """The mean of the features `[b, ..., K]` of a batch: `[K]`."""
    each = h.reshape(h.shape[0], -1, h.shape[-1]).mean(1)
    return shares(weight, each) @ each


def handed(mu: Tensor, mean: Tensor) -> Tensor:
    """0, with `mean` as its gradient by mu: a step sees what a loss has measured in gradients."""
    return ((mu - mu.detach()) * mean.detach()).sum()
