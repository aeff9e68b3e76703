"""Power-of-choice: of d random candidates those with the largest loss take part.

Cho, Wang and Joshi, "Client selection in federated learning: convergence analysis and
power-of-choice selection strategies", arXiv:2010.01243, the variant rpow-d that asks nobody: the
loss is the one that a client's last upload declared, infinite before its first. Claim: up to three
times faster convergence and 10 % more accuracy than random selection.

    A: d clients at random;   S: the m of A with the largest last known loss

d = m is uniform selection. Candidates are drawn evenly, where the paper draws them by data size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.federated.schedulers.selection import Selection


@catalogue.register("power-of-choice", place="schedule", status="verified")
@dataclass
class PowerOfChoice(Selection):
    """d: candidates in a round; twice the cohort without it, at most all."""

    d: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d is None:
            self.d = min(2 * self.cohort, self.population)
        if not self.cohort <= self.d <= self.population:
            raise InputError("d", self.d, f"{self.cohort} (the cohort) to {self.population}")

    def chosen(self, round: int, there: np.ndarray) -> np.ndarray:
        candidates = there[: self.d]
        loss = np.nan_to_num(self.losses[candidates], nan=np.inf)
        return candidates[np.argsort(-loss, kind="stable")[: self.cohort]]
