"""What selections of clients have in common: what the server has seen of every client.

A selection is a synchronous schedule that prefers some clients. It knows only what uploads have
declared, the mean training loss, and what the server can time itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from isthmus import seeds
from isthmus.errors import InputError


@dataclass
class Selection:
    """`losses`, `times` (seconds from download to upload) and `last` (round) of every client, as
    last seen: NaN, NaN and 0 before."""

    population: int
    cohort: int
    seed: int
    losses: np.ndarray = field(init=False)
    times: np.ndarray = field(init=False)
    last: np.ndarray = field(init=False)

    kind: ClassVar[str] = "sync"
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= self.population:
            raise InputError("cohort", self.cohort, f"1 to {self.population} (the clients)")
        self.losses = np.full(self.population, np.nan)
        self.times = np.full(self.population, np.nan)
        self.last = np.zeros(self.population, np.int64)

    def clients(self, round: int, among: np.ndarray | None = None) -> np.ndarray:
        """The clients of a round, int64, in rising order; `among` says who can be reached."""
        there = np.arange(self.population) if among is None else np.flatnonzero(among)
        if len(there) <= self.cohort:
            return there
        return np.sort(self.chosen(round, self.shuffled(round, there)))

    def chosen(self, round: int, there: np.ndarray) -> np.ndarray:
        """`cohort` of the clients in `there`, which come in random order."""
        raise NotImplementedError

    def shuffled(self, round: int, clients: np.ndarray) -> np.ndarray:
        """The clients in an order that is random, and fixed by the round."""
        key = seeds.fold(seeds.key(self.seed, "selection"), round)
        return clients[np.argsort(seeds.bits_of(np.array([key]), len(clients))[0], kind="stable")]

    def seen(
        self, round: int, clients: np.ndarray, losses: np.ndarray, seconds: np.ndarray
    ) -> None:
        """Remember what came up in a round."""
        self.losses[clients], self.times[clients], self.last[clients] = losses, seconds, round

    def state(self) -> dict[str, Any]:
        arrays = {"losses": self.losses, "times": self.times, "last": self.last}
        return {
            name: [None if np.isnan(x) else x for x in array.tolist()]
            for name, array in arrays.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name in ("losses", "times"):
            setattr(self, name, np.array([np.nan if x is None else x for x in state[name]]))
        self.last = np.array(state["last"], np.int64)
