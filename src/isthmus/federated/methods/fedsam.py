"""FedSAM: local steps of sharpness-aware minimisation.

Qu, Li, Duan, Liu, Tang, Lu, "Generalized federated learning via sharpness aware minimization",
ICML 2022, algorithm 1. Claim: flatter local minima, so that the mean of unlike clients' models
generalises better than FedAvg's.

    client:  v <- v - lr g(v + rho g(v) / |g(v)|), both gradients on the same batch
    server:  w <- mean_S v_i

Two gradients a step. The norm is that of all trained tensors together. rho = 0 is FedAvg with
even weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from isthmus import catalogue
from isthmus.contracts import Meta
from isthmus.federated.method import Knobs, Method
from isthmus.federated.steps import even, uphill
from isthmus.learn.phase import Carry, Grad, Opt
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree


class Settings(Knobs):
    """rho: radius of the perturbation."""

    rho: float = Field(0.1, ge=0.0)


@catalogue.register("fedsam", place="method", status="verified")
class FedSAM(Method):
    """Overrides P and W."""

    Settings = Settings

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        g, _ = grad(params)
        g, _ = grad(uphill(params, g, self.knobs.rho))
        params, opt = opt.update(g, params)
        return params, opt, carry

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return even(meta)
