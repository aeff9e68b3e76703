"""FedSynSAM: sharpness-aware local steps whose ascent is looked up on the server's synthetic data.

"FedSynSAM", arXiv 2602.11584. Claim: compressing updates sharpens the loss, most with unlike
clients; a local gradient is a poor guess of the global ascent there and the last update of the
model a worse one, while a synthetic set learned at the server estimates it well.

    rounds up to R0:  FedAvg with compressed updates; the server keeps w_0 .. w_R0
    round R0:         the synthetic set (see `isthmus.federated.distilled`), once to each client
    from then on, each local step:
        a = g(v) on the batch,  b = g(v) on the set,  d = (1 - m) a / |a| + m b / |b|
        v' = v + rho d / |d|;   v <- v - lr g(v') on the batch
    server:           w <- mean_S v_i, of what the run's codec left of v_i - w

(reconstructed) from the abstract: the mixture d and its default m, the averaging with even
weights, and that the same set serves until the next one is learned. m = 0 is FedSAM, m = 1 looks
at the set alone, rho = 0 is FedAvg with even weights. The set is part of the base: a client is
sent what it lacks when it is next asked, and its bytes are counted then. Three gradients a step,
one of them on the whole set; before the set is there, rho is 0 and two of them come to nothing. The
work of the server is not in the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue
from isthmus.contracts import Meta
from isthmus.federated import distilled
from isthmus.federated.distilled import Distilled, measures, soft_loss
from isthmus.federated.method import State
from isthmus.federated.steps import even, norm, uphill
from isthmus.learn.phase import Carry, Grad, Opt
from isthmus.models.factors import Places
from isthmus.tasks.contract import Batch, Role
from isthmus.tree import Tree

X, Y, ASKED = "synthetic.x", "synthetic.y", "synthetic.asked"
_EPS = 1e-12


class Settings(distilled.Settings):
    """rho: radius of the perturbation; m: share of the synthetic direction."""

    rho: float = Field(0.05, ge=0.0)
    m: float = Field(0.5, ge=0.0, le=1.0)


class Synthetic(nn.Module):
    """The client's copy of the set, and what a gradient is asked on: `asked` has one axis more
    where it is the set and not the batch."""

    def __init__(self, n: int, shape: tuple[int, ...], classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("x", torch.zeros(n, *shape, dtype=dtype))
        self.register_buffer("y", torch.zeros(n, classes, dtype=dtype))
        self.register_buffer("asked", torch.zeros((), dtype=dtype))


@catalogue.register("fedsynsam", place="method", status="miniature")
class FedSynSAM(Distilled):
    """Overrides L, P, W, V, and what is part of the base."""

    Settings = Settings
    keeps_base = True

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        shape, classes = measures(module, knobs.shape)
        dtype = next(module.parameters()).dtype
        module.add_module("synthetic", Synthetic(knobs.ipc * classes, shape, classes, dtype))
        return module

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return {name: "frozen" if name in (X, Y, ASKED) else role for name, role in given.items()}

    def base(self, state: State) -> Tree:
        return {X: state["synthetic"]["x"], Y: state["synthetic"]["y"]}

    def catch_up(self, state: State, version: int) -> Tree:
        return self.base(state) if version < self.version(state) else {}

    def version(self, state: State) -> int:
        return int(state["count"]["sets"])

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        held = model.synthetic
        if held.asked.ndim:
            return soft_loss(model, held.x, held.y), {}
        return super().loss(model, batch, carry)

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        a, _ = grad(params)
        b, _ = grad({**params, ASKED: batch.weight.new_zeros(1)})
        b = {name: b[name] for name in a}
        there = norm(b) > 0  # of no set (all its y are 0) the gradient is 0
        d = mixed(a, b, self.knobs.m)
        g, _ = grad(uphill(params, d, self.knobs.rho * there, _EPS))
        params, opt = opt.update(g, params)
        return params, opt, carry

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return even(meta)


def mixed(a: Tree, b: Tree, m: float) -> Tree:
    """(1 - m) a / |a| + m b / |b|."""
    left, right = (1 - m) / (norm(a) + _EPS), m / (norm(b) + _EPS)
    return {name: left * x + right * b[name] for name, x in a.items()}
