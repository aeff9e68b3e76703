"""From easy to hard, a growing part at a time: what curricula over samples and clients share."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from isthmus import seeds

Form = Literal["linear", "quad", "root", "step", "exp", "log"]
Way = Literal["curr", "anti", "rand"]

STEEP = 10.0
"""c of the forms `exp` and `log`."""


def pace(form: Form, t: float, total: float, n: int, a: float, b: float) -> int:
    """How many of `n` are open after `t` of `total` steps, 1 to n: b n at first, all from a total.

    With s = t / (a total):  linear s,  quad s^2,  root s^(1/2),  step 0,
    exp (e^(c s) - 1) / (e^c - 1),  log 1 + ln(s + e^-c) / c;  each times (1 - b) n, plus b n.

    >>> [pace("linear", t, 100, 50, a=0.8, b=0.2) for t in (0, 40, 80, 100)]
    [10, 30, 50, 50]
    """
    end = a * total
    if t >= end:
        return n
    s = t / end
    share = {
        "linear": s,
        "quad": s**2,
        "root": s**0.5,
        "step": 0.0,
        "exp": math.expm1(STEEP * s) / math.expm1(STEEP),
        "log": 1.0 + math.log(s + math.exp(-STEEP)) / STEEP,
    }[form]
    return min(n, max(1, int(b * n + (1.0 - b) * n * share + 1e-9)))


def ordered(scores: np.ndarray, way: Way, key: int) -> np.ndarray:
    """The places of `scores` `[n]` in their order: rising, falling (its reverse) or by chance.

    >>> ordered(np.array([3.0, 1.0, 2.0]), "curr", 0), ordered(np.array([3.0, 1.0, 2.0]), "anti", 0)
    (array([1, 2, 0]), array([0, 2, 1]))
    """
    if way == "rand":
        return shuffled(key, len(scores))
    rising = np.argsort(scores, kind="stable")
    return rising if way == "curr" else rising[::-1].copy()


def shuffled(key: int, n: int) -> np.ndarray:
    """The order in which the epoch of this key sees n items (as `learn.plan` draws it)."""
    return np.argsort(seeds.bits_of(np.array([key]), n)[0] & _LAST, kind="stable")


_LAST = np.iinfo(np.int64).max
