"""One measured number, and what it is held to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """`goal` says in words what is wanted and `holds` whether it is met; None: no goal is set."""

    name: str
    value: float
    unit: str
    goal: str | None
    holds: bool | None


def at_most(name: str, value: float, limit: float, unit: str) -> Figure:
    """A figure that may not exceed `limit`.

    >>> at_most("dense", 2.0, 3.0, "x")
    Figure(name='dense', value=2.0, unit='x', goal='at most 3 x', holds=True)
    """
    return Figure(name, value, unit, f"at most {limit:g} {unit}", value <= limit)


def best_of(repeats: int, works: Sequence[Callable[[], object]]) -> list[float]:
    """The shortest time in seconds of each piece of work, taken in turns so that all of them
    meet the same load of the machine; each is run once before."""
    best = [float("inf")] * len(works)
    for turn in range(repeats + 1):
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            elapsed = time.perf_counter() - start
            if turn:
                best[i] = min(best[i], elapsed)
    return best
