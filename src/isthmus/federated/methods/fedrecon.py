"""FedRecon: the personal part is rebuilt from nothing at every visit, so clients keep no state.

Singhal, Sidahmed, Garrett, Wu, Rush, Prakash, "Federated reconstruction: partially local federated
learning", NeurIPS 2021, algorithm 1. Claim: partly local models for clients that are met once, as
good as those that keep state, also for clients never seen.

    client, on half of its items:   k_r passes  l_i <- l_i - lr * grad_l f_i(g, l_i),  from l_0
            on the other half:      g_i <- g_i - lr * grad_g f_i(g_i, l_i);  send g_i, forget l_i
    server:                         g <- sum_i (n_i / n) g_i
    predict:                        l_i is rebuilt on all of the client's items

The personal part is the head. The halves are the items of even and of odd number (reconstructed:
the paper splits by chance); n_i counts both. The server's optimiser is SGD with step 1.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from isthmus import catalogue
from isthmus.contracts import Update
from isthmus.federated import halves
from isthmus.federated.method import Knobs
from isthmus.federated.methods.fedper import FedPer
from isthmus.federated.portion import Portion
from isthmus.learn.phase import Carry, Phase, Visit
from isthmus.tree import Tree


class Settings(Knobs):
    """k_r: passes that rebuild the personal part."""

    k_r: int = Field(5, ge=1)


@catalogue.register("fedrecon", place="method", status="verified")
class FedRecon(FedPer):
    """Overrides F (rebuild, then update) and U (nothing stays)."""

    Settings = Settings

    def __post_init__(self) -> None:
        super().__post_init__()
        self.often = replace(self.local, epochs=self.knobs.k_r, steps=None)
        self.even, self.odd = Portion(self.often, 2), Portion(self.local, 2, rest=True)

    def phases(self, purpose: str) -> list[Phase]:
        if purpose == "warm-up":
            return []
        (both,) = super().phases("train")
        head = tuple(n for n in both.trainable if halves.is_head(n))
        body = tuple(n for n in both.trainable if not halves.is_head(n))
        rebuild = replace(both, name="rebuild", trainable=head, plans=self.even.plans)
        if purpose == "score":
            return [replace(rebuild, name="rebuild on all", plans=self.often.plans)]
        return [rebuild, replace(both, name="update", trainable=body, plans=self.odd.plans)]

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, _ = super().finish(visit, params, down, carry, kept)
        return update, {name: kept[name] for name in self.names.local}
