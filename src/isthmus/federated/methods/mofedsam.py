"""MoFedSAM: sharpness-aware local steps, mixed with the mean direction of the round before.

Qu, Li, Duan, Liu, Tang, Lu, "Generalized federated learning via sharpness aware minimization",
ICML 2022, algorithm 2. Claim: the momentum carries what the others know into each client, so it
converges faster than FedSAM and FedAvg.

    client:  v <- v - lr (beta g(v + rho g(v) / |g(v)|) + (1 - beta) Delta)
    server:  Delta <- mean_S (w - v_i) / (K lr);  w <- w + server_lr mean_S (v_i - w)

It is FedCM (whose notes on Delta hold here too) on FedSAM's gradients: rho = 0 is FedCM, beta = 1
is FedSAM.
"""

from __future__ import annotations

from pydantic import Field

from isthmus import catalogue
from isthmus.federated.method import Knobs
from isthmus.federated.methods.fedcm import FedCM
from isthmus.federated.steps import uphill
from isthmus.learn.phase import Grad
from isthmus.tree import Tree


class Settings(Knobs):
    """rho: radius of the perturbation; beta: share of the own gradient; server_lr as in FedCM."""

    rho: float = Field(0.1, ge=0.0)
    beta: float = Field(0.1, gt=0.0, le=1.0)
    server_lr: float = Field(1.0, gt=0.0)


@catalogue.register("mofedsam", place="method", status="verified")
class MoFedSAM(FedCM):
    """Differs from FedCM in the gradient."""

    Settings = Settings

    @property
    def share(self) -> float:
        return self.knobs.beta

    def slope(self, grad: Grad, v: Tree) -> Tree:
        g, _ = grad(v)
        return grad(uphill(v, g, self.knobs.rho))[0]
