"""Curriculum FL, the clients' half: those with a small loss come first, the others step by step.

Vahidian, Kadaveru, Baek, Wang, Kungurtsev, Chen, Shah, Lin, "When do curricula work in federated
learning?", ICCV 2023, arXiv:2212.12712. Claim: choosing clients by a curriculum adds to the gain of
ordered samples (the method of the same name).

    pool:   the first pace(t) of the N clients ordered by loss;  t the visits so far, of R m
    rounds: the whole shuffled pool in groups of m;  then the clients are ordered anew

(reconstructed): a client's score is the training loss that its last upload declared; the authors
ask every client for its loss whenever the pool is opened. Clients never seen come before all others
in either order, so that each is scored soon: with them at the end the first pool's clients would be
in every pool, whatever their loss. Where a pool does not divide into groups of m, the last is
filled up from the next pool, so that visits sum to R m.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from isthmus import catalogue, seeds
from isthmus.errors import InputError, unknown
from isthmus.federated.pacing import Form, Way, ordered, pace
from isthmus.federated.schedulers.selection import Selection


@catalogue.register("curriculum-fl", place="schedule", status="reconstructed")
@dataclass
class CurriculumClients(Selection):
    """order and pacing: which way, in which form; a: share of all visits after which every client
    is in the pool; b: share of clients in the first pool. `rounds` are those of the run."""

    rounds: int = 1
    order: Way = "curr"
    pacing: Form = "linear"
    a: float = 0.8
    b: float = 0.2
    walk: list[int] = field(init=False, default_factory=list)
    group: list[int] = field(init=False, default_factory=list)
    at: int = field(init=False, default=0)
    visits: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("order", get_args(Way)), ("pacing", get_args(Form))):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        for name in ("a", "b"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(name, getattr(self, name), "0 to 1")

    def clients(self, round: int, among: np.ndarray | None = None) -> np.ndarray:
        """The clients of a round, int64, in rising order; `among` says who can be reached."""
        if round == self.at:
            return np.sort(np.array(self.group, np.int64))
        there = np.arange(self.population) if among is None else np.flatnonzero(among)
        size, able = min(self.cohort, len(there)), set(there.tolist())
        group = [c for c in self.walk if c in able][:size]
        if len(group) < size:
            pool = self.pool(round, there)
            self.walk = pool.tolist()
            group += [c for c in self.walk if c not in group][: size - len(group)]
        self.walk = [c for c in self.walk if c not in group]
        self.group, self.at, self.visits = group, round, self.visits + len(group)
        return np.sort(np.array(group, np.int64))

    def pool(self, round: int, there: np.ndarray) -> np.ndarray:
        """Who may be chosen now of the clients in `there`, shuffled; a cohort at least."""
        mixed = self.shuffled(round, there)
        scores = np.nan_to_num(self.losses[mixed], nan=-np.inf if self.order == "curr" else np.inf)
        order = ordered(scores, self.order, seeds.key(self.seed, "curriculum", round))
        total = self.rounds * self.cohort
        k = pace(self.pacing, self.visits, total, self.population, self.a, self.b)
        pool = mixed[order][: max(k, self.cohort)]
        return self.shuffled(-round, pool)

    def state(self) -> dict[str, Any]:
        walked = {"walk": self.walk, "group": self.group, "at": self.at, "visits": self.visits}
        return {**super().state(), **walked}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.walk, self.group = list(state["walk"]), list(state["group"])
        self.at, self.visits = int(state["at"]), int(state["visits"])
