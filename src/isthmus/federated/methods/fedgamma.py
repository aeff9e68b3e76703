"""FedGAMMA: SCAFFOLD's control variates on sharpness-aware local steps.

Dai, Yang, Sun, Jin, Tao, Shen, "FedGAMMA: federated learning with global sharpness-aware
minimization", IEEE TNNLS 2023, algorithm 1. Claim: the perturbed steps of unlike clients, each
of which looks for a flat place of its own, are corrected towards a flat place of the mean.

    client, K steps:  y <- y - lr (g(y + rho g(y) / |g(y)|) - c_i + c)
    the rest:         as in SCAFFOLD with option II, on the perturbed gradients

Two gradients a step. rho = 0 is SCAFFOLD to the bit.
"""

from __future__ import annotations

from pydantic import Field

from isthmus import catalogue
from isthmus.federated.method import Knobs
from isthmus.federated.methods.scaffold import Scaffold
from isthmus.federated.steps import uphill
from isthmus.learn.phase import Grad
from isthmus.tree import Tree


class Settings(Knobs):
    """rho: radius of the perturbation."""

    rho: float = Field(0.1, ge=0.0)


@catalogue.register("fedgamma", place="method", status="verified")
class FedGamma(Scaffold):
    """Differs from SCAFFOLD in the gradient."""

    Settings = Settings

    def slope(self, grad: Grad, y: Tree) -> Tree:
        g, _ = grad(y)
        return grad(uphill(y, g, self.knobs.rho))[0]
