"""One measured number, and what it is held to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple


class Figure(NamedTuple):
    """`goal` says in words what is wanted and `holds` whether it is met; None: no goal is set.

    `note` is what a reader has to know beside the number. `cell` is where the figure stands when
    figures are shown as tables: the table's title, the row, the column.
    """

    name: str
    value: float
    unit: str
    goal: str | None = None
    holds: bool | None = None
    note: str = ""
    cell: tuple[str, str, str] | None = None


def at_most(name: str, value: float, limit: float, unit: str) -> Figure:
    """A figure that may not exceed `limit`.

    >>> at_most("dense", 2.0, 3.0, "x")[:5]
    ('dense', 2.0, 'x', 'at most 3 x', True)
    """
    return Figure(name, value, unit, f"at most {limit:g} {unit}", value <= limit)


def at_least(name: str, value: float, limit: float, unit: str) -> Figure:
    """A figure that has to reach `limit`.

    >>> at_least("faster", 2.0, 3.0, "x")[:5]
    ('faster', 2.0, 'x', 'at least 3 x', False)
    """
    return Figure(name, value, unit, f"at least {limit:g} {unit}", value >= limit)


def best_of(repeats: int, works: Sequence[Callable[[], object]]) -> list[float]:
    """The shortest time in seconds of each piece of work; see `turns_of`."""
    return [min(times) for times in turns_of(repeats, works)]


def turns_of(
    repeats: int,
    works: Sequence[Callable[[], object]],
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """The times in seconds of each piece of work, taken in turns so that all of them meet the
    same load of the machine; each is run once before. `clock` may be `time.process_time`: where
    one thread computes and never waits, about the time that it takes when nothing else runs."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for own, work in zip(times, works, strict=True):
            start = clock()
            work()
            if turn:
                own.append(clock() - start)
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median over turns of one time over another.

    >>> ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    2.0
    """
    return median(a / b for a, b in zip(times, base, strict=True))
