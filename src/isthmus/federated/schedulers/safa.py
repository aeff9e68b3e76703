"""SAFA: a round ends when a share C of the clients has come back; nobody's work is thrown away.

Wu, He, Lin, Mao, Maple and Jarvis, "SAFA: a semi-asynchronous protocol for fast federated learning
with low overhead", IEEE Transactions on Computers 2021, arXiv:1910.01355. Claim: shorter rounds and
less futile work than FedAvg and FedCS where many clients are slow or lost.

    start:     who is up to date (has come back) or deprecated (works on a model more than tau
               versions old) is sent w(t-1); the tolerable in between go on with what they have
    select:    P: the first C n arrivals of clients that P of the last round left out; the others
               wait in Q, and fill P in their order when no more come or the time is over
    before:    c_k = w_k of P;  w(t-1) of the deprecated that are not in P;  else as it was
    mix:       w(t) = sum_k n_k / n c_k          over all clients;  c_k = w(0) at first
    bypass:    c_k = w_k of Q, after the mix

(reconstructed): the equations are as remembered, the paper was not at hand. A client whose visit is
lost starts again with the model of the next round; when all at work are lost and nobody has come,
at once. A round whose time is over while nobody has come ends with the next arrival.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.federated.schedule import Action, Arrival, Renew, Start, Stop, Wake


@catalogue.register("safa", place="schedule", status="reconstructed")
@dataclass
class Safa:
    """c: share of the clients that ends a round; tau: lag that is tolerated, in rounds; limit:
    seconds after which a round ends with whoever has come. All clients take part."""

    population: int
    sizes: Sequence[int]
    c: float = 0.3
    tau: int = 5
    limit: float = math.inf
    version: int = field(default=0, init=False)
    working: dict[int, int] = field(default_factory=dict, init=False)
    gone: list[int] = field(default_factory=list, init=False)
    picked: list[tuple[int, int]] = field(default_factory=list, init=False)
    undrafted: list[tuple[int, int]] = field(default_factory=list, init=False)
    last: list[int] = field(default_factory=list, init=False)
    deprecated: list[int] = field(default_factory=list, init=False)
    overdue: bool = field(default=False, init=False)

    kind: ClassVar[str] = "async"
    keeps_cache: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.c <= 1:
            raise InputError("c", self.c, "above 0, at most 1")
        if self.tau < 0:
            raise InputError("tau", self.tau, "0 or more rounds")
        if not self.limit > 0:
            raise InputError("limit", self.limit, "seconds above 0")

    @property
    def quota(self) -> int:
        """Uploads that end a round."""
        return max(1, math.floor(self.c * self.population + 1e-9))

    def begin(self, now: float) -> list[Action]:
        return self._open(range(self.population), now)

    def arrived(self, arrival: Arrival, now: float) -> list[Action]:
        del self.working[arrival.client]
        upload = (arrival.client, arrival.number)
        (self.undrafted if arrival.client in self.last else self.picked).append(upload)
        full = len(self.picked) == self.quota
        return self._close(now) if full or self.overdue or not self.working else []

    def lost(self, client: int, now: float) -> list[Action]:
        del self.working[client]
        self.gone.append(client)
        if self.working:
            return []
        if self.picked or self.undrafted:
            return self._close(now)
        again, self.gone = self.gone, []
        return self._start(again)

    def woken(self, token: int, now: float) -> list[Action]:
        """The time of round `token` is over."""
        if token != self.version:
            return []
        if self.picked or self.undrafted:
            return self._close(now)
        self.overdue = True
        return []

    def _close(self, now: float) -> list[Action]:
        """Mix, and begin the next round."""
        short = self.quota - len(self.picked)
        picked, later = self.picked + self.undrafted[:short], self.undrafted[short:]
        self.last = [client for client, _ in picked]
        total = sum(self.sizes)
        renew = Renew(
            picked=tuple(number for _, number in picked),
            reset=tuple(c for c in self.deprecated if c not in self.last),
            later=tuple(number for _, number in later),
            weights=tuple(size / total for size in self.sizes),
        )
        self.version += 1
        lagging = [c for c, began in self.working.items() if self.version - began > self.tau]
        self.deprecated = sorted(lagging)
        back = [client for client, _ in (*picked, *later)]
        free = sorted([*back, *self.gone, *lagging])
        self.picked, self.undrafted, self.gone, self.overdue = [], [], [], False
        return [renew, *(Stop(c) for c in self.deprecated), *self._open(free, now)]

    def _open(self, free: Iterable[int], now: float) -> list[Action]:
        actions = self._start(free)
        return (
            [*actions, Wake(now + self.limit, self.version)] if self.limit < math.inf else actions
        )

    def _start(self, clients: Iterable[int]) -> list[Action]:
        actions: list[Action] = []
        for client in clients:
            self.working[client] = self.version
            actions.append(Start(client))
        return actions

    def state(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "working": list(self.working.items()),
            "gone": self.gone,
            "picked": self.picked,
            "undrafted": self.undrafted,
            "last": self.last,
            "deprecated": self.deprecated,
            "overdue": self.overdue,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.version, self.overdue = state["version"], state["overdue"]
        self.working = {client: began for client, began in state["working"]}
        self.gone, self.last, self.deprecated = state["gone"], state["last"], state["deprecated"]
        self.picked = [(client, number) for client, number in state["picked"]]
        self.undrafted = [(client, number) for client, number in state["undrafted"]]
