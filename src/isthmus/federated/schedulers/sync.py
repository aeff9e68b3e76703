"""Synchronous rounds: a random cohort starts together, the slowest ends the round.

McMahan et al., AISTATS 2017, algorithm 1: S_t is a random set of max(C K, 1) clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from isthmus import catalogue, seeds
from isthmus.errors import InputError

Sampling = Literal["fixed", "poisson"]

SMALL = 4096
"""Clients among whom a cohort is drawn by sorting all of them."""

BLOCK = 32
"""Rounds whose cohorts are drawn at once."""


@catalogue.register("sync", place="schedule", status="verified")
@dataclass(frozen=True)
class Sync:
    """Cohorts of `cohort` out of `population` clients, uniform and without replacement.

    `poisson`: every client takes part independently with probability cohort / population, so
    the size of the cohort varies; it is what the usual privacy accounting assumes.
    """

    population: int
    cohort: int
    seed: int
    sampling: Sampling = "fixed"

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= self.population:
            raise InputError("cohort", self.cohort, f"1 to {self.population} (the clients)")

    kind: ClassVar[str] = "sync"
    needs_loss: ClassVar[bool] = False

    def clients(self, round: int, among: np.ndarray | None = None) -> np.ndarray:
        """The clients of a round, int64, in rising order; `among` says who can be reached."""
        there = np.arange(self.population) if among is None else np.flatnonzero(among)
        if len(there) == self.population:
            if self.cohort == self.population:
                return there
            if self.sampling == "fixed" and self.population <= SMALL:
                return _block(self, round // BLOCK)[round % BLOCK]
        key = seeds.fold(seeds.key(self.seed, "cohort"), round)
        size = min(self.cohort, len(there))
        if self.sampling == "poisson":
            draw = np.random.default_rng(key & (2**63 - 1))
            size = int(draw.binomial(len(there), self.cohort / self.population))
        return there[distinct(key, size, len(there))]

    def state(self) -> dict[str, Any]:
        """Nothing: a round's cohort follows from the seed and its number."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


@lru_cache(maxsize=4)
def _block(schedule: Sync, block: int) -> np.ndarray:
    """The fixed cohorts of BLOCK rounds from one sort, as `distinct` gives them: `[BLOCK, n]`."""
    rounds = np.arange(block * BLOCK, (block + 1) * BLOCK)
    keys = seeds.keys(seeds.key(schedule.seed, "cohort"), rounds)
    order = np.argsort(seeds.bits_of(keys, schedule.population), axis=1, kind="stable")
    return np.sort(order[:, : schedule.cohort], axis=1)


def distinct(key: int, count: int, below: int) -> np.ndarray:
    """`count` different numbers below `below` (int64, rising), every subset equally likely.

    Where few are wanted, hashes are taken as numbers until enough are different, so the work
    does not grow with `below`; a bias of at most below / 2^63 remains.
    """
    if 2 * count > below or below <= SMALL:
        order = np.argsort(seeds.bits_of(np.array([key]), below)[0], kind="stable")
        return np.sort(order[:count])
    tries = 2 * count + 8
    while True:
        numbers = (seeds.bits_of(np.array([key]), tries)[0] & _LAST) % below
        _, first = np.unique(numbers, return_index=True)
        if len(first) >= count:
            return np.sort(numbers[np.sort(first)[:count]])
        tries *= 2


_LAST = 2**63 - 1
