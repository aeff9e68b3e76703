"""FedAsync: every upload is mixed into the model the moment it arrives.

Xie, Koyejo and Gupta, "Asynchronous federated optimization", arXiv:1903.03934, algorithm 1.
Claim: fast convergence that tolerates staleness.

    w <- (1 - alpha s(u)) w + alpha s(u) w_i        u: mixes since client i started

s is 1 for u = 0 and never rises (`rule`, `a`, `b`); a client that has come back starts again.
"""

from __future__ import annotations

from dataclasses import dataclass

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.federated.schedule import Action, Arrival, Mix
from isthmus.federated.schedulers.concurrent import Concurrent


@catalogue.register("fedasync", place="schedule", status="verified")
@dataclass
class FedAsync(Concurrent):
    """alpha: weight of an upload that is not stale."""

    alpha: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise InputError("alpha", self.alpha, "above 0, at most 1")

    def arrived(self, arrival: Arrival, now: float) -> list[Action]:
        weight = self.alpha * self.s(self.version - arrival.version)
        self.version += 1
        return [Mix((arrival.number,), (weight,), from_now=True), self.next(arrival.client)]
