"""DynaFed: the server tunes each averaged model on data distilled from its models' trajectory.

Pi, Zhang, Xie, Gao, Wang, Kim, Chen, "DynaFed: tackling client data heterogeneity with global
dynamics", CVPR 2023. Claim: faster convergence and better accuracy under strong skew, without
any data at the server: the set that stands for the rounds seen so far mends the mean.

    rounds up to R0:  FedAvg; the server keeps w_0 .. w_R0
    round R0:         the synthetic set (see `isthmus.federated.distilled`)
    from then on:     w <- w + sum_i (n_i / n) (w_i - w);  then T steps of SGD on the set

T and its rate lr_s are (reconstructed). The clients' half is FedAvg's; the work of the server is
not in the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from isthmus import catalogue
from isthmus.contracts import Meta, Reduced
from isthmus.federated import distilled
from isthmus.federated.distilled import Distilled
from isthmus.federated.method import State
from isthmus.tree import Tree


class Settings(distilled.Settings):
    """T: steps of the server after each mean; lr_s: their rate."""

    T: int = Field(20, ge=0)
    lr_s: float = Field(0.01, gt=0.0)


@catalogue.register("dynafed", place="method", status="reconstructed")
class DynaFed(Distilled):
    """Overrides V."""

    Settings = Settings

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        new = super().server(state, reduced, meta)
        if not int(new["count"]["sets"]):
            return new
        return {**new, "shared": self.tuned(new["shared"], new["synthetic"])}

    def tuned(self, w: Tree, synthetic: Tree) -> Tree:
        """T steps down the loss on the set."""
        for _ in range(self.knobs.T):
            g = torch.func.grad(self.loss_on)(w, synthetic["x"], synthetic["y"])
            w = {name: x - self.knobs.lr_s * g[name] for name, x in w.items()}
        return {name: x.detach() for name, x in w.items()}
