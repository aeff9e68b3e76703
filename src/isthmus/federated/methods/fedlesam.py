"""FedLESAM: a sharpness perturbation along the global ascent, as far as a client can see it.

Fan, Hu, Yao, Tian, Zhang, Sugiyama, Wang, "Locally estimated global perturbations are better
than local perturbations for federated sharpness-aware minimization", ICML 2024, algorithm 1.
Claim: better than FedSAM and its like on unlike clients, at the cost of one gradient a step.

    client:  e = rho (w_old - w) / |w_old - w|,  w_old the global model of its last visit
             v <- v - lr g(v + e);  at the end  w_old <- w
    server:  w <- mean_S v_i

A client that was never asked holds the first global model, as in the paper. The norm is that
of all tensors together, as in the text. rho = 0 is FedAvg with even weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Update
from isthmus.federated.method import Knobs, Method
from isthmus.federated.steps import even, moving, uphill
from isthmus.learn.phase import Carry, Grad, Opt, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

OLD = "old/"


class Settings(Knobs):
    """rho: radius of the perturbation."""

    rho: float = Field(0.1, ge=0.0)


@catalogue.register("fedlesam", place="method", status="verified")
class FedLESAM(Method):
    """Overrides S, P, U, W."""

    Settings = Settings

    def keep(self, tensors: Tree) -> Tree:
        old = {OLD + name: tensors[name] for name in moving(self.names)}
        return {**super().keep(tensors), **old}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        v, _ = super().start(visit, down, kept)
        back = {name: kept[OLD + name] - down[name] for name in moving(self.names)}
        e = uphill(tree.zeros_like(back), back, self.knobs.rho)
        return v, {"e": e}

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        e = carry["e"]
        g, _ = grad({name: v + e[name] if name in e else v for name, v in params.items()})
        params, opt = opt.update(g, params)
        return params, opt, carry

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        return update, {**local, **{OLD + name: down[name] for name in moving(self.names)}}

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return even(meta)
