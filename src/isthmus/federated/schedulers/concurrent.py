"""Clients that are always at work: whoever comes back makes room for the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.federated.schedule import Action, Start, staleness
from isthmus.federated.schedulers.sync import distinct

Rule = Literal["polynomial", "hinge", "constant"]


@dataclass
class Concurrent:
    """`cohort` of the `population` clients work at any time; the next is drawn among the idle.

    `rule`, `a` and `b` say how an update's weight falls with its staleness.
    """

    population: int
    cohort: int
    seed: int
    rule: Rule = "polynomial"
    a: float = 0.5
    b: float = 4.0
    version: int = field(default=0, init=False)
    started: int = field(default=0, init=False)
    working: set[int] = field(default_factory=set, init=False)

    kind: ClassVar[str] = "async"

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= self.population:
            raise InputError("cohort", self.cohort, f"1 to {self.population} (the clients)")
        if self.rule not in ("polynomial", "hinge", "constant"):
            raise InputError("rule", self.rule, "polynomial, hinge, constant")
        if self.a < 0:
            raise InputError("a", self.a, "0 or more: a stale update weighs no more than a new one")

    def s(self, u: int) -> float:
        """The weight of an update that is `u` mixes old."""
        return staleness(self.rule, self.a, self.b, u)

    def begin(self, now: float) -> list[Action]:
        key = seeds.key(self.seed, "concurrent")
        first = distinct(key, self.cohort, self.population).tolist()
        self.working = set(first)
        return [Start(client) for client in first]

    def next(self, done: int) -> Start:
        """Who starts in place of a client that is done; the same one where all are at work."""
        self.working.discard(done)
        self.started += 1
        idle = [c for c in range(self.population) if c not in self.working]
        client = idle[0]
        if len(idle) > 1:
            key = seeds.fold(seeds.key(self.seed, "next"), self.started)
            client = idle[int(distinct(key, 1, len(idle))[0])]
        self.working.add(client)
        return Start(client)

    def lost(self, client: int, now: float) -> list[Action]:
        return [self.next(client)]

    def woken(self, token: int, now: float) -> list[Action]:
        return []

    def state(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "started": self.started,
            "working": sorted(self.working),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.version, self.started = state["version"], state["started"]
        self.working = set(state["working"])
