"""Rates of a link that change: a trace, integrated exactly, and a function, sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import InputError

Array = NDArray[Any]


@dataclass(frozen=True)
class Trace:
    """A rate that is constant between breakpoints: `rates[i]` bits/s from `times[i]` seconds on.

    The last rate holds for ever, or the trace starts again every `period` seconds. Bits are
    integrated exactly.

    >>> Trace([0.0, 1.0], [100.0, 400.0]).finish(300.0, 0.0)  # 100 bits, then 200 at 400 bits/s
    1.5
    """

    times: Sequence[float]
    rates: Sequence[float]
    period: float | None = None

    def __post_init__(self) -> None:
        times, rates = np.asarray(self.times, float), np.asarray(self.rates, float)
        if times.ndim != 1 or times.shape != rates.shape or not len(times) or times[0] != 0:
            raise InputError("trace", len(times), "as many rates as times, the first time 0")
        if not (np.diff(times) > 0).all() or not ((rates >= 0) & (rates < math.inf)).all():
            raise InputError("trace", rates.tolist(), "ascending times, finite rates of 0 or more")
        end = times[-1] if self.period is None else self.period
        if end < times[-1] or (self.period is not None and end <= times[-1]):
            raise InputError("trace.period", end, f"more than the last time, {times[-1]}")
        bits = np.concatenate([[0.0], np.cumsum(rates * np.diff(times, append=end))])
        if (rates[-1] if self.period is None else bits[-1]) <= 0:
            raise InputError("trace", "rate 0 for ever", "a rate above 0 in the end")
        object.__setattr__(self, "_times", times)
        object.__setattr__(self, "_rates", rates)
        object.__setattr__(self, "_bits", bits)

    def carried(self, t: Any) -> Any:
        """Bits carried from time 0 to t."""
        times, rates, bits = _arrays(self)
        turns = 0.0
        if self.period is not None:
            turns, t = np.divmod(t, self.period)
        i = cast("Any", np.searchsorted(times, t, side="right") - 1)
        return turns * bits[-1] + bits[i] + rates[i] * (t - times[i])

    def finish(self, bits: Any, start: Any) -> Any:
        """When `bits` begun at `start` are through (numbers or arrays)."""
        times, rates, held = _arrays(self)
        goal = self.carried(start) + bits
        turns = 0.0
        if self.period is not None:
            turns = np.maximum(np.ceil(goal / held[-1]) - 1, 0)
            goal = goal - turns * held[-1]
        below = cast("Any", np.searchsorted(held[:-1], goal, side="left") - 1)
        i = np.clip(below, 0, len(times) - 1)
        end = times[i] + (goal - held[i]) / np.where(rates[i] > 0, rates[i], 1.0)
        end = end if self.period is None else turns * self.period + end
        return np.maximum(end, start) if np.ndim(end) else max(float(end), start)


def _arrays(trace: Trace) -> tuple[Array, Array, Array]:
    return trace._times, trace._rates, trace._bits  # pyright: ignore


@dataclass(frozen=True)
class Sampled:
    """A rate that follows a function of time (of a position, say), held for `step` seconds.

    `rate(t)` in bits/s is asked at t = 0, step, 2 step, ...; at most `most` steps a message.
    """

    rate: Callable[[float], float]
    step: float = 0.1
    most: int = 1_000_000

    def finish(self, bits: Any, start: Any) -> Any:
        """When `bits` begun at `start` are through (numbers or arrays)."""
        if np.ndim(bits) or np.ndim(start):
            pairs = np.broadcast(bits, start)
            return np.array([self.finish(*pair) for pair in pairs]).reshape(pairs.shape)
        k, t, left = math.floor(start / self.step), start, bits
        for i in range(k, k + self.most):
            rate, end = self.rate(i * self.step), (i + 1) * self.step
            if left <= rate * (end - t):
                return t + left / rate if left else t
            left, t = left - rate * (end - t), end
        raise InputError("rate", "too little", f"enough for a message in {self.most} steps")


Rate = float | Trace | Sampled


def finish(rate: Rate, bits: Any, start: Any) -> Any:
    """When `bits` begun at `start` are through at this rate (numbers or arrays)."""
    return start + bits / rate if isinstance(rate, int | float) else rate.finish(bits, start)
