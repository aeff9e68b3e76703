"""Ditto: beside the global model each client trains one of its own, tied to the global one.

Li, Hu, Beirami, Smith, "Ditto: fair and robust federated learning through personalization", ICML
2021, algorithm 1. Claim: simple, and both fairer and more robust than methods for either.

    w_i <- w;  E epochs of  w_i <- w_i - lr * grad F_i(w_i);  send w_i, averaged as in FedAvg
    E epochs of             v_i <- v_i - lr * (grad F_i(v_i) + lam (v_i - w));  v_i stays

w is the model that the client received. v_i takes as many steps as w_i.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from isthmus import catalogue
from isthmus.federated.method import Knobs
from isthmus.federated.twin import Twin, parameters
from isthmus.learn.phase import Carry, Phase, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree


class Settings(Knobs):
    """lam: strength of the tie (the paper searches 0.05 to 2)."""

    lam: float = Field(1.0, ge=0.0)


@catalogue.register("ditto", place="method", status="verified")
class Ditto(Twin):
    """Overrides S (remember w) and F (a second phase); the first phase is FedAvg's to the bit."""

    Settings = Settings

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        return params, {"w": {copy: params[name] for copy, name in self.of.items()}}

    def phases(self, purpose: str) -> list[Phase]:
        if purpose != "train":
            return []
        own = Phase("personal", self.mine, self.tied, self.local.optimiser)
        return [*super().phases(purpose), own]

    def tied(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        value, aux = self.stage.loss(self.personal(model, batch.key), batch)
        v = parameters(model)
        for name, w in carry["w"].items():
            value = value + 0.5 * self.knobs.lam * (v[name] - w).square().sum()
        return value, aux
