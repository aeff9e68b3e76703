"""FedOpt: the server treats the mean update as a gradient and steps with momentum.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive federated
optimization", ICLR 2021, algorithm 2 (FedAdagrad, FedAdam, FedYogi); FedAvgM: Hsu, Qi, Brown,
"Measuring the effects of non-identical data distribution for federated visual classification",
arXiv 1909.06335. Claim: faster and better convergence than FedAvg on heterogeneous clients.

    D = sum_i w_i (w_i - w)
    FedAvgM:  m <- beta1 m + D;               w <- w + lr_s m
    others:   m <- beta1 m + (1 - beta1) D;   w <- w + lr_s m / (sqrt(v) + tau)
    FedAdagrad:  v <- v + D^2
    FedAdam:     v <- beta2 v + (1 - beta2) D^2
    FedYogi:     v <- v - (1 - beta2) D^2 sign(v - D^2)

v starts at tau^2, as in the paper; no bias correction, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced
from isthmus.federated.method import Knobs, Method, State
from isthmus.tree import Tree


class MomentumSettings(Knobs):
    """server_lr: step of the server; beta1: momentum."""

    server_lr: float = Field(1.0, gt=0.0)
    beta1: float = Field(0.9, ge=0.0, lt=1.0)


class AdagradSettings(Knobs):
    """server_lr: step of the server; beta1: momentum, none in the paper; tau: adaptivity."""

    server_lr: float = Field(0.01, gt=0.0)
    beta1: float = Field(0.0, ge=0.0, lt=1.0)
    tau: float = Field(1e-3, gt=0.0)


class AdaptiveSettings(AdagradSettings):
    """beta1, beta2: decay of the moments."""

    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.99, ge=0.0, lt=1.0)


@catalogue.register("fedavgm", place="method", status="verified")
class FedAvgM(Method):
    """Server momentum; beta1 = 0 and server_lr = 1 is FedAvg."""

    Settings = MomentumSettings

    def init(self, tensors: Tree) -> State:
        state = super().init(tensors)
        return {**state, "m": tree.zeros_like(state["shared"])}

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        m = tree.add(reduced.tensors, state["m"], alpha=self.knobs.beta1)
        return {"shared": tree.add(state["shared"], m, alpha=self.knobs.server_lr), "m": m}


@catalogue.register("fedadagrad", place="method", status="verified")
class FedAdagrad(Method):
    """v is the sum of D^2."""

    Settings: ClassVar[type[Knobs]] = AdagradSettings

    def init(self, tensors: Tree) -> State:
        state = super().init(tensors)
        start = self.knobs.tau**2
        v = {name: torch.full_like(x, start) for name, x in state["shared"].items()}
        return {**state, "m": tree.zeros_like(state["shared"]), "v": v}

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        k, d = self.knobs, reduced.tensors
        m = tree.tree_map(lambda m, d: k.beta1 * m + (1 - k.beta1) * d, state["m"], d)
        v = tree.tree_map(lambda v, d: self.second(v, d.square()), state["v"], d)
        w = tree.tree_map(
            lambda w, m, v: w + k.server_lr * m / (v.sqrt() + k.tau), state["shared"], m, v
        )
        return {"shared": w, "m": m, "v": v}


@catalogue.register("fedadam", place="method", status="verified")
class FedAdam(FedAdagrad):
    """v is the decayed mean of D^2."""

    Settings = AdaptiveSettings

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return self.knobs.beta2 * v + (1 - self.knobs.beta2) * square


@catalogue.register("fedyogi", place="method", status="verified")
class FedYogi(FedAdam):
    """Differs from FedAdam in v alone, which moves towards D^2 by a fixed share of D^2."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.knobs.beta2) * square * torch.sign(v - square)
