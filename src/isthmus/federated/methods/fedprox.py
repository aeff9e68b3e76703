"""FedProx: local training is pulled back to the global model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated optimization in heterogeneous networks",
MLSys 2020, equation 2. Claim: more robust convergence than FedAvg on heterogeneous clients.

    client:  min_v  F_i(v) + (mu / 2) ||v - w||^2

The rest is FedAvg; mu = 0 is FedAvg to the bit.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from isthmus import catalogue
from isthmus.federated.method import Knobs, Method
from isthmus.learn.phase import Carry, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree


class Settings(Knobs):
    """mu: strength of the proximal term."""

    mu: float = Field(0.01, ge=0.0)


@catalogue.register("fedprox", place="method", status="verified")
class FedProx(Method):
    """Overrides S (remember w) and L (the proximal term)."""

    Settings = Settings

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        w = {name: params[name] for name in self.names.trainable if name in self.names.shared}
        return params, {"w": w}

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        value, aux = super().loss(model, batch, carry)
        v = dict(model.named_parameters())
        for name, w in carry["w"].items():
            value = value + 0.5 * self.knobs.mu * (v[name] - w).square().sum()
        return value, aux
