"""FedADMM: an augmented Lagrangian for each client; what goes up is a change of x_i + eta lambda_i.

Wang, Marella, Anderson, "FedADMM: a federated primal-dual algorithm allowing partial
participation", CDC 2022, algorithm 1 (without a regulariser at the server). Claim: convergence
without assumptions on how unlike the clients are, with inexact local solutions and few
participants, where FedAvg is off.

    client:  x_i ~ argmin_x  f_i(x) + <lambda_i, x - z> + |x - z|^2 / (2 eta),  by K steps from z
             lambda_i <- lambda_i + (x_i - z) / eta;  z_i = x_i + eta lambda_i;  send z_i - z_i_old
    server:  z <- z + (|S| / N) mean_S (z_i - z_i_old),  which is the mean of all N z_i

A client keeps lambda_i and z_i. Where local steps start and the default of eta are
(reconstructed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated.method import Knobs, Method, State
from isthmus.federated.steps import even, moving, plain_sgd
from isthmus.learn.phase import Carry, Grad, Opt, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

LAMBDA, Z = "lambda/", "z/"


class Settings(Knobs):
    """eta: inverse strength of the penalty."""

    eta: float = Field(10.0, gt=0.0)


@catalogue.register("fedadmm", place="method", status="verified")
class FedADMM(Method):
    """Overrides S, P, U, W, V."""

    Settings = Settings

    def __post_init__(self) -> None:
        plain_sgd(self)

    def keep(self, tensors: Tree) -> Tree:
        names = moving(self.names)
        lambda_i = {LAMBDA + name: torch.zeros_like(tensors[name]) for name in names}
        return {**super().keep(tensors), **lambda_i, **{Z + n: tensors[n] for n in names}}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        x, _ = super().start(visit, down, kept)
        names = moving(self.names)
        return x, {
            "z - eta lambda_i": {n: down[n] - self.knobs.eta * kept[LAMBDA + n] for n in names}
        }

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        g, _ = grad(params)
        centre = carry["z - eta lambda_i"]
        pull = {n: g[n] + (params[n] - x) / self.knobs.eta for n, x in centre.items()}
        params, opt = opt.update({**g, **pull}, params)
        return params, opt, carry

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        for name in moving(self.names):
            lambda_i = kept[LAMBDA + name] + update.delta[name] / self.knobs.eta
            z_i = params[name] + self.knobs.eta * lambda_i
            update.delta[name] = z_i - kept[Z + name]
            local[LAMBDA + name], local[Z + name] = lambda_i, z_i
        return update, local

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return even(meta)

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        part = len(meta) / self.population if meta else 1.0
        return {"shared": tree.add(state["shared"], reduced.tensors, alpha=part)}
