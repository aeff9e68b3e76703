"""Synchronous rounds: a random cohort starts together, the slowest ends the round.

McMahan et al., AISTATS 2017, algorithm 1: S_t is a random set of max(C K, 1) clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from isthmus import catalogue, seeds
from isthmus.errors import InputError

Sampling = Literal["fixed", "poisson"]


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

    def clients(self, round: int) -> np.ndarray:
        """The clients of a round, int64, in rising order."""
        if self.cohort == self.population:
            return np.arange(self.population)
        draw = seeds.rng(self.seed, "cohort", round)
        size = self.cohort
        if self.sampling == "poisson":
            size = int(draw.binomial(self.population, self.cohort / self.population))
        return np.sort(draw.choice(self.population, size, replace=False, shuffle=False))
