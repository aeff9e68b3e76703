"""Per-FedAvg: learn the model from which one gradient step on its own data serves each client best.

Fallah, Mokhtari, Ozdaglar, "Personalized federated learning with theoretical guarantees: a
model-agnostic meta-learning approach", NeurIPS 2020, algorithm 1, in both practical forms (section
5). Claim: after one step it is more accurate than FedAvg after one step.

    each local step, on fresh batches D, D' (and D''):
        u = w - alpha grad f_i(w; D);  g = grad f_i(u; D')
        FO:  w <- w - beta g
        HF:  w <- w - beta (g - alpha d),
             d = (grad f_i(w + delta g; D'') - grad f_i(w - delta g; D'')) / (2 delta)
    server:   w <- mean_i w_i
    predict:  w - alpha grad f_i(w; D)

beta is the run's learning rate. A step's two or three batches are dealt out from one of two or
three times the run's size. FO leaves the Hessian out, HF takes its product with g by a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue, tree
from isthmus.contracts import Meta
from isthmus.federated.method import Knobs, Method
from isthmus.learn.phase import Carry, Grad, Opt, Phase
from isthmus.models.factors import Places
from isthmus.tasks.contract import Batch, Role
from isthmus.tree import Tree

DEALT = "dealt_batch"
"""Which of a step's batches a gradient is taken on: a scalar beside the model's tensors."""


class Settings(Knobs):
    """alpha: step of the adaptation; form: fo or hf; delta: width of the difference in hf."""

    alpha: float = Field(0.01, ge=0.0)
    form: Literal["fo", "hf"] = "fo"
    delta: float = Field(1e-3, gt=0.0)


@catalogue.register("per-fedavg", place="method", status="verified")
class PerFedAvg(Method):
    """Overrides F, L, P and W (participants count evenly)."""

    Settings = Settings

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        module.register_buffer(DEALT, next(module.parameters()).new_zeros(()))
        return module

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return {**given, DEALT: "frozen"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wide = replace(self.local, batch=self.deals * self.local.batch)
        self.one = replace(self.local, steps=1)

    @property
    def deals(self) -> int:
        """Batches in a step."""
        return 2 if self.knobs.form == "fo" else 3

    def phases(self, purpose: str) -> list[Phase]:
        if purpose == "warm-up":
            return []
        (phase,) = super().phases("train")
        if purpose == "train":
            return [replace(phase, plans=self.wide.plans)]
        return [
            replace(phase, name="adapt", loss=self.whole, step=self.adapt, plans=self.one.plans)
        ]

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        weight = batch.weight
        turn = ((weight > 0).cumsum(0) - 1) % self.deals
        dealt = weight * (turn.to(weight.dtype) == getattr(model, DEALT)).to(weight.dtype)
        return self.stage.loss(model, Batch(batch.columns, dealt, batch.key))

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        def on(number: int, w: Tree) -> Tree:
            which = torch.full((), float(number), dtype=batch.weight.dtype)
            g, _ = grad({**w, DEALT: which})
            return {name: g[name] for name in w}

        alpha, delta = self.knobs.alpha, self.knobs.delta
        g = on(1, tree.add(params, on(0, params), alpha=-alpha))
        if self.knobs.form == "hf":
            there, back = (on(2, tree.add(params, g, alpha=by)) for by in (delta, -delta))
            g = tree.add(g, tree.sub(there, back), alpha=-alpha / (2 * delta))
        params, opt = opt.update(g, params)
        return params, opt, carry

    def whole(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        return self.stage.loss(model, batch)

    def adapt(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        g, _ = grad(params)
        return tree.add(params, g, alpha=-self.knobs.alpha), opt, carry

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return torch.full((len(meta),), 1.0 / len(meta), dtype=torch.float64)
