"""FedProto: clients share the mean feature of each class, and no weights.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang, "FedProto: federated prototype learning across heterogeneous
clients", AAAI 2022, algorithm 1. Claim: personal models that agree in feature space, of any shapes,
at a fraction of the traffic.

    client:   w_i <- w_i - lr * grad [CE + lam * d(z, C[y])]  for classes y that have a prototype
              then send  c_i[y] = mean of the features z of class y, and their number
    server:   C[y] = sum_i n_i[y] c_i[y] / sum_i n_i[y]
    predict:  the class whose prototype is nearest to z, or (`by` head) the client's own head

d is the mean over coordinates of the squared difference, taken per item. Sums and numbers go up
instead of means and numbers: the same facts, and a plain sum at the server. A class that nobody
sent keeps its last prototype; one that nobody has ever sent comes last in a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated import halves
from isthmus.federated.method import Knobs, Method, State
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Visit
from isthmus.models import optim
from isthmus.models.factors import Places
from isthmus.tasks.contract import Batch, Role
from isthmus.tasks.items import weighted_mean
from isthmus.tree import Tree

C, SEEN = "prototypes", "prototypes_seen"
SUMS, COUNTS = "prototypes/sums", "prototypes/counts"


class Settings(Knobs):
    """lam: strength of the pull to the prototypes; by: what predicts."""

    lam: float = Field(1.0, ge=0.0)
    by: Literal["prototypes", "head"] = "prototypes"


@catalogue.register("fedproto", place="method", status="verified")
class FedProto(Method):
    """Overrides S, F (train, then measure), L, U, W, V, E."""

    Settings = Settings
    sends_values = True

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        weight = halves.linear_head(module, cls).weight
        module.register_buffer(C, torch.zeros_like(weight.detach()))
        module.register_buffer(SEEN, weight.new_zeros(len(weight)))
        return module

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return halves.personal(given, lambda name: name not in (C, SEEN))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.idle, self.once = optim.sgd(), replace(self.local, epochs=1, steps=None)

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        return params, {
            SUMS: torch.zeros_like(down[C]),
            COUNTS: torch.zeros_like(down[SEEN]),
        }

    def phases(self, purpose: str) -> list[Phase]:
        if purpose != "train":
            return []
        measure = Phase("measure", (), self.along, self.idle, self.measure, plans=self.once.plans)
        return [*super().phases(purpose), measure]

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        value, aux, z = self.seen(model, batch)
        apart = (z - getattr(model, C)[batch.y]).square().mean(-1)
        known = getattr(model, SEEN)[batch.y]
        return value + self.knobs.lam * weighted_mean(known * apart, batch.weight), aux

    def seen(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The stage's loss, its scalars, and the features `[b, K]`."""
        features: list[Tensor] = []

        def watched(*inputs: Tensor) -> Tensor:
            features.append(model.features(*inputs))
            return model.head(features[0])

        value, aux = self.stage.loss(watched, batch)
        return value, aux, features[0]

    def along(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        """sum_b <C[y_b], z_b>, whose gradient for C are the sums of the features by class."""
        _, _, z = self.seen(model, batch)
        each = (getattr(model, C)[batch.y] * z.detach()).sum(-1)
        return (batch.weight * each).sum(), {}

    def measure(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        sums, counts = carry[SUMS], carry[COUNTS]
        g, _ = grad({C: torch.zeros_like(sums)})
        hit = (batch.y[:, None] == torch.arange(len(counts))).to(counts.dtype)
        return params, opt, {SUMS: sums + g[C], COUNTS: counts + batch.weight @ hit}

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        return Update(values=carry), {name: params[name] for name in self.names.local}

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return torch.full((len(meta),), 1.0 / len(meta), dtype=torch.float64)

    def nothing(self, state: State) -> Reduced:
        zeros = {n: torch.zeros_like(state["shared"][of]) for n, of in ((SUMS, C), (COUNTS, SEEN))}
        return Reduced({}, values=zeros)

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        old, counts = state["shared"], reduced.values[COUNTS]
        here = counts > 0
        mean = reduced.values[SUMS] / torch.where(here, counts, torch.ones_like(counts))[:, None]
        return {
            "shared": {
                C: torch.where(here[:, None], mean, old[C]),
                SEEN: torch.maximum(old[SEEN], here.to(old[SEEN].dtype)),
            }
        }

    def predict(self, task: Any, model: Any, inputs: Tree, context: Any, kept: Tree) -> Any:
        if self.knobs.by == "head":
            return task.predict(model, inputs, context)
        return task.predict(lambda *x: nearness(model, model.features(*x)), inputs, context)


def nearness(model: Any, z: Tensor) -> Tensor:
    """Minus the squared distance of features `[b, K]` to each prototype: `[b, C]`.

    Of the client's own head before there is any prototype.
    """
    known = getattr(model, SEEN) > 0
    distance = (z[:, None] - getattr(model, C)).square().sum(-1)
    last = distance.amax(1, keepdim=True) + 1.0
    return torch.where(known.any(), -torch.where(known, distance, last), model.head(z))
