"""FedRep: first the personal head under the received body, then the body under the new head.

Collins, Hassani, Mokhtari, Shakkottai, "Exploiting shared representations for personalized
federated learning", ICML 2021, algorithm 1. Claim: many cheap updates of low-dimensional heads
per update of the representation learn a shared representation that helps every client.

    client:  tau_h passes  h_i <- h_i - lr * grad_h l(phi, h_i)
             then          phi_i <- phi_i - lr * grad_phi l(phi_i, h_i);  send phi_i
    server:  phi <- sum_i (n_i / n) phi_i

The passes over the body are those of the run. The paper weighs participants evenly; here, as in
all that is compared with it, by their items.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from isthmus import catalogue
from isthmus.federated import halves
from isthmus.federated.method import Knobs
from isthmus.federated.methods.fedper import FedPer
from isthmus.learn.phase import Phase


class Settings(Knobs):
    """tau_h: passes over the client's items that train the head, before the body's."""

    tau_h: int = Field(10, ge=1)


@catalogue.register("fedrep", place="method", status="verified")
class FedRep(FedPer):
    """Overrides F: two phases."""

    Settings = Settings

    def __post_init__(self) -> None:
        super().__post_init__()
        self.often = replace(self.local, epochs=self.knobs.tau_h, steps=None)

    def phases(self, purpose: str) -> list[Phase]:
        if purpose != "train":
            return []
        (both,) = super().phases(purpose)
        head = tuple(n for n in both.trainable if halves.is_head(n))
        body = tuple(n for n in both.trainable if not halves.is_head(n))
        return [
            replace(both, name="head", trainable=head, plans=self.often.plans),
            replace(both, name="body", trainable=body),
        ]
