"""The clients' devices: how long each works, when it can be reached, whether it comes back.

A client's device is a profile of `wire.device`, slowed by a factor of its own. `jitter` makes
every visit take another time, `dropout` is the chance that a client vanishes before it has sent,
`awake` the hours of each period in which it can be reached, `battery` the joules it may spend on
training and sending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.wire.device import Device, Spent, spend_each

HOUR = 3600.0
SLACK = 1e-3
"""Seconds by which a device may be early, so that rounding cannot make it miss its own hour."""


@dataclass
class Fleet:
    """Devices in turn, and for each client what makes it differ from its kind.

    `slowness` `[population]` multiplies seconds (None: 1 for all). `spent` `[population]` are the
    joules so far, kept where `battery` limits them.
    """

    devices: Sequence[Device]
    population: int
    seed: int = 0
    slowness: np.ndarray | None = None
    jitter: float = 0.0
    dropout: float = 0.0
    awake: tuple[float, float] | None = None
    battery: float | None = None

    def __post_init__(self) -> None:
        self.spent = np.zeros(self.population if self.battery is not None else 0)
        self._opens = np.zeros(0)
        if self.awake is not None:
            keys = seeds.keys(seeds.key(self.seed, "awake"), np.arange(self.population))
            self._opens = _uniform(keys) * self.awake[1]

    @property
    def sure(self) -> bool:
        """True when every client can always be reached and always comes back."""
        return self.awake is None and self.battery is None and not self.dropout

    def spend(self, clients: np.ndarray, flops: np.ndarray, keys: np.ndarray) -> Spent:
        """Seconds and joules `[n]` of `flops` `[n]`; `keys` are those of the visits."""
        if len(self.devices) == 1:
            spent = self.devices[0].spend(flops)
        else:
            owners = [self.devices[c % len(self.devices)] for c in clients.tolist()]
            spent = spend_each(owners, flops)
        if self.slowness is None and not self.jitter:
            return spent
        factor = np.ones(len(clients)) if self.slowness is None else self.slowness[clients]
        if self.jitter:
            factor = factor * np.exp(self.jitter * _normal(seeds.keys_of(keys, _JITTER)))
        return Spent(spent.seconds * factor, spent.joules * factor)

    def drain(self, clients: np.ndarray, joules: np.ndarray) -> None:
        """Count what these clients (each at most once) have drawn."""
        if self.battery is not None:
            self.spent[clients] += joules

    def reachable(self, now: float) -> np.ndarray:
        """Who can be asked at time `now`: bool `[population]`."""
        there = np.ones(self.population, bool)
        if self.awake is not None:
            window, period = self.awake
            there &= np.mod(now - self._opens + SLACK, period) < window
        if self.battery is not None:
            there &= self.spent < self.battery
        return there

    def opens(self, now: float, client: int | None = None) -> float | None:
        """When the next client (or this one) can be reached, not before `now`; None for never."""
        wanted = np.arange(self.population) if client is None else np.array([client])
        if self.battery is not None:
            wanted = wanted[self.spent[wanted] < self.battery]
        if not len(wanted):
            return None
        if self.awake is None:
            return now
        window, period = self.awake
        later = now - np.mod(now - self._opens[wanted], period) + period
        there = np.mod(now - self._opens[wanted] + SLACK, period) < window
        return float(np.where(there, now, later).min())

    def vanishes(self, keys: np.ndarray) -> np.ndarray:
        """Who of these visits does not come back: bool `[n]`."""
        return _uniform(seeds.keys_of(keys, _DROPOUT)) < self.dropout


_JITTER, _DROPOUT = 201, 202


def slowness(text: str, population: int, seed: int) -> np.ndarray | None:
    """Factors on the clients' seconds from words: `equal`, `1,2,4` (in turn), `lognormal:0.5`.

    >>> slowness("1,4", 3, seed=0)
    array([1., 4., 1.])
    """
    allowed = "equal, numbers above 0 (1,2,4) or lognormal:0.5"
    if text == "equal":
        return None
    try:
        if text.startswith("lognormal:"):
            keys = seeds.keys(seeds.key(seed, "slowness"), np.arange(population))
            return np.exp(float(text.partition(":")[2]) * _normal(keys))
        given = np.array([float(word) for word in text.split(",")])
    except ValueError:
        raise InputError("speeds", text, allowed) from None
    if not (given > 0).all() or not np.isfinite(given).all():
        raise InputError("speeds", text, allowed)
    return given[np.arange(population) % len(given)]


def hours(text: str) -> tuple[float, float]:
    """`8/24`: awake 8 of every 24 hours; in seconds.

    >>> hours("8/24")
    (28800.0, 86400.0)
    """
    try:
        window, period = (float(word) * HOUR for word in text.split("/"))
    except ValueError:
        raise InputError("awake", text, "hours of hours, as in 8/24") from None
    if not 0 < window <= period:
        raise InputError("awake", text, "more than 0 hours, at most all of them, as in 8/24")
    return window, period


def _uniform(keys: np.ndarray) -> np.ndarray:
    """Numbers in (0, 1) from keys."""
    return ((keys.view(np.uint64) >> np.uint64(11)) + 0.5) * 2.0**-53


def _normal(keys: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri

    return ndtri(_uniform(keys))
