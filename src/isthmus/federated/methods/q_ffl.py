"""q-FFL by q-FedAvg: clients with a higher loss weigh more, by a power q of it.

Li, Sanjabi, Beirami, Smith, "Fair resource allocation in federated learning", ICLR 2020,
algorithm 2. Claim: a more even accuracy over the clients than FedAvg's at the same mean.

    goal:    min_w  sum_i F_i(w)^(q+1) / (q + 1)
    client:  D_i = L (w - w_i),  L = 1 / lr;  h_i = q F_i^(q-1) |D_i|^2 + L F_i^q
             send F_i^q D_i and h_i
    server:  w <- w - sum_i F_i^q D_i / sum_i h_i

F_i is the loss of w over all items of the client. Both sums are divided by L and n here, which
their ratio does not see; all that the server reads is a mean. q = 0 is FedAvg with even weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated.measured import Measured
from isthmus.federated.method import Knobs, State
from isthmus.federated.steps import even, plain_sgd
from isthmus.learn.phase import Carry, Visit
from isthmus.tree import Tree

NORMALISER = "q-ffl/h"
_LEAST = 1e-10  # as in the authors' code: F^(q-1) has no value at F = 0


class Settings(Knobs):
    """q: 0 is FedAvg with even weights, infinity looks at the worst client alone."""

    q: float = Field(1.0, ge=0.0)


@catalogue.register("q-ffl", place="method", status="verified")
class QFFL(Measured):
    """Overrides S, F, L (all to measure F_i), U, W, V."""

    Settings = Settings

    def __post_init__(self) -> None:
        plain_sgd(self)

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        q, loss = self.knobs.q, carry["F"] + _LEAST
        square = sum(x.square().sum() for x in update.delta.values())
        h = loss**q + q * loss ** (q - 1) * square / visit.lr
        delta = {name: loss**q * x for name, x in update.delta.items()}
        return Update(delta={**delta, NORMALISER: h.view(1)}), local

    def nothing(self, state: State) -> Reduced:
        zero = tree.zeros_like(state["shared"])
        return Reduced({**zero, NORMALISER: next(iter(zero.values())).new_zeros(1)})

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        return even(meta)

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        h = reduced.tensors[NORMALISER]
        w = {n: x + reduced.tensors[n] / (h + (h == 0)) for n, x in state["shared"].items()}
        return {"shared": w}
