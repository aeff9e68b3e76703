"""FedSMOO: FedDyn whose sharpness perturbations are drawn to a common one as the models are.

Sun, Shen, Chen, Ding, Tao, "Dynamic regularized sharpness aware minimization in federated
learning: approaching global consistency and smooth landscape", ICML 2023, algorithm 1. Claim: a
global flat minimum, with faster convergence and better accuracy than FedSAM, FedDyn, FedSpeed.

    client, K steps:  c = g(v) - mu_i - s;  e = rho c / (|c| + 1e-7);  mu_i <- mu_i + e - s
                      v <- v - lr (g(v + e) + alpha (v - w + h_i))
    client, end:      h_i <- h_i + (v - w);  send v - w and mu_i
    server:           s <- rho m / (|m| + 1e-7),  m = mean_S mu_i
                      w <- mean_S v_i + mean over all clients of h_j

s, the common perturbation, travels with the model. As in the authors' code it is taken from the
duals mu_i alone, without the last e of each client that the paper's box adds. Two gradients a
step. rho = 0 is FedDyn to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated.method import Known, State
from isthmus.federated.methods import feddyn
from isthmus.federated.methods.feddyn import FedDyn
from isthmus.federated.steps import moving, uphill
from isthmus.learn.phase import Carry, Grad, Opt, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

MU, S = "mu/", "s/"
_EPS = 1e-7


class Settings(feddyn.Settings):
    """alpha: strength of the quadratic term; rho: radius of the perturbation."""

    rho: float = Field(0.1, ge=0.0)


@catalogue.register("fedsmoo", place="method", status="verified")
class FedSMOO(FedDyn):
    """Overrides D, S, P, U, V of FedDyn."""

    Settings = Settings

    def init(self, tensors: Tree) -> State:
        state = super().init(tensors)
        return {**state, "s": {S + n: torch.zeros_like(x) for n, x in state["h"].items()}}

    def keep(self, tensors: Tree) -> Tree:
        mu_i = {MU + name: torch.zeros_like(tensors[name]) for name in moving(self.names)}
        return {**super().keep(tensors), **mu_i}

    def send(self, state: State, known: Known) -> Tree:
        return {**state["shared"], **state["s"]}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        v, carry = super().start(visit, down, kept)
        s = {name: down[S + name] for name in moving(self.names)}
        mu_i = {name: kept[MU + name] for name in moving(self.names)}
        return v, {**carry, "s": s, "mu_i": mu_i}

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        s, mu_i = carry["s"], carry["mu_i"]
        g, _ = grad(params)
        c = {name: g[name] - mu_i[name] - s[name] for name in s}
        e = uphill(tree.zeros_like(s), c, self.knobs.rho, _EPS)
        mu_i = {name: mu_i[name] + e[name] - s[name] for name in s}

        def there(params: Tree) -> tuple[Tree, dict[str, torch.Tensor]]:
            return grad({**params, **tree.add(e, params)})

        params, opt, _ = super().step(there, params, opt, carry, batch)
        return params, opt, {**carry, "mu_i": mu_i}

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        mu_i = {MU + name: x for name, x in carry["mu_i"].items()}
        return Update(delta={**update.delta, **mu_i}), {**local, **mu_i}

    def nothing(self, state: State) -> Reduced:
        mu = {MU + n.removeprefix(S): x for n, x in state["s"].items()}
        return Reduced(tree.zeros_like({**state["shared"], **mu}))

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        state = super().server(state, reduced, meta)
        m = {name: reduced.tensors[MU + name.removeprefix(S)] for name in state["s"]}
        return {**state, "s": uphill(tree.zeros_like(m), m, self.knobs.rho, _EPS)}
