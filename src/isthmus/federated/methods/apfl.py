"""APFL: each client predicts with a mixture of a private and the global model, and learns how much.

Deng, Kamani, Mahdavi, "Adaptive personalized federated learning", arXiv:2003.13461, algorithm 1.
Claim: the mixture generalises better on a client's data than either model alone.

    m_i = alpha_i v_i + (1 - alpha_i) w_i
    each local step:  w_i <- w_i - lr * grad f_i(w_i)
                      v_i <- v_i - lr * alpha_i grad f_i(m_i)
    the first also:   alpha_i <- alpha_i - lr * <v_i - w_i, grad f_i(m_i)>, kept within [0, 1]
    send w_i, averaged as in FedAvg;  v_i and alpha_i stay;  predict with m_i

The two other updates are those of gradient descent on f_i(m_i) with w_i held fixed, and are written
so. alpha_i moves once a visit, while w_i still is the global model: later in it w_i has learned the
client's data too, faster than v_i, and alpha_i would fall to 0. What a client keeps is v_i, never
the mixture, into which w would enter again in every round. alpha 0 is FedAvg, 1 local training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue
from isthmus.federated.method import Knobs
from isthmus.federated.twin import Twin, parameters
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Visit, update_once
from isthmus.models.bind import bind
from isthmus.models.factors import Places
from isthmus.tasks.contract import Batch, Role
from isthmus.tree import Tree

ALPHA = "apfl_alpha"


class Settings(Knobs):
    """alpha: share of the private model, at first or for good; adaptive: whether it is learned."""

    alpha: float = Field(0.5, ge=0.0, le=1.0)
    adaptive: bool = True


@catalogue.register("apfl", place="method", status="verified")
class APFL(Twin):
    """Overrides S, F, L, P, E; the shared model's path is FedAvg's."""

    Settings = Settings

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        share = next(module.parameters()).new_tensor(knobs.alpha)
        module = super().attach(module, knobs, seed)
        module.register_parameter(ALPHA, nn.Parameter(share))
        return module

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return {**super().roles(given, places), ALPHA: "local"}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        return params, {"first": torch.ones_like(params[ALPHA])}

    def phases(self, purpose: str) -> list[Phase]:
        learned = (ALPHA,) if self.knobs.adaptive else ()
        names = (*self.ours, *self.mine, *learned)
        return [replace(phase, trainable=names) for phase in super().phases(purpose)]

    def mixture(self, model: Any, key: Tensor | None = None) -> Any:
        named = parameters(model)
        alpha = named[ALPHA]
        mixed = {
            name: alpha * named[copy] + (1 - alpha) * named[name].detach()
            for copy, name in self.of.items()
        }
        return bind(model, mixed, key)

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        shared, aux = self.stage.loss(model, batch)
        mixed, _ = self.stage.loss(self.mixture(model, batch.key), batch)
        return shared + mixed, aux

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        after, opt, carry = update_once(grad, params, opt, carry, batch)
        if self.knobs.adaptive:
            moved = after[ALPHA].clamp(0.0, 1.0)
            after = {**after, ALPHA: torch.where(carry["first"] > 0, moved, params[ALPHA])}
        return after, opt, {"first": torch.zeros_like(carry["first"])}

    def predict(self, task: Any, model: Any, inputs: Tree, context: Any, kept: Tree) -> Any:
        return task.predict(self.mixture(model), inputs, context)
