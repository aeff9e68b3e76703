"""What a schedule decides when clients do not wait for each other.

The engine (`federated.asynchronous`) tells a schedule what happens on the clock, and the schedule
answers with actions: who starts, which uploads are mixed with which weights, when it wants to be
woken. It never touches a tensor, so it is tested by its trace alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol


class Start(NamedTuple):
    """Send the present model to `client`, which takes `steps` updates (None: the run's own)."""

    client: int
    steps: int | None = None


class Mix(NamedTuple):
    """Mix these arrivals, each times its weight, into the model: `w += sum_i weight_i D_i`.

    D_i is a client's change since its own start; with `from_now` its distance from the present
    model, as in w <- (1 - a) w + a w_i.
    """

    arrivals: tuple[int, ...]
    weights: tuple[float, ...]
    from_now: bool = False


class Renew(NamedTuple):
    """Put models into the server's cache of one per client, and take their mean: w = sum_k p_k c_k.

    `picked` are arrivals whose models become the entries of their clients, `reset` clients whose
    entry becomes the present model, `later` arrivals that enter after the mean. Before its first,
    an entry is the first model. `weights` are those of all clients.
    """

    picked: tuple[int, ...]
    reset: tuple[int, ...]
    later: tuple[int, ...]
    weights: tuple[float, ...]


class Stop(NamedTuple):
    """What this client is at work on comes to nothing; the schedule is not told that it is lost."""

    client: int


class Wake(NamedTuple):
    """Call `woken(token)` at this time."""

    at: float
    token: int


class Arrival(NamedTuple):
    """An upload: its number, whose it is, the mixes there had been when the client started, the
    updates it was told to take, and the seconds from its start to now."""

    number: int
    client: int
    version: int
    steps: int | None
    seconds: float


Action = Start | Stop | Mix | Renew | Wake


class Schedule(Protocol):
    """Answers events with actions, in order, with at most one `Mix` or `Renew` in an answer.

    A `Start` takes effect after everything else that happens at the same time.
    """

    kind: ClassVar[str]

    def begin(self, now: float) -> Sequence[Action]: ...

    def arrived(self, arrival: Arrival, now: float) -> Sequence[Action]: ...

    def lost(self, client: int, now: float) -> Sequence[Action]:
        """The visit of this client has come to nothing."""
        ...

    def woken(self, token: int, now: float) -> Sequence[Action]: ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


def staleness(rule: str, a: float, b: float, u: int) -> float:
    """The factor on an update that is `u` mixes old: 1 for u = 0, then falling.

    `polynomial` (1 + u)^-a, `hinge` 1 up to b and 1 / (a (u - b) + 1) after, `constant` 1
    (Xie, Koyejo and Gupta, arXiv:1903.03934, section 5.2).

    >>> staleness("polynomial", 0.5, 0, 3), staleness("hinge", 10, 4, 5)
    (0.5, 0.09090909090909091)
    """
    if rule == "polynomial":
        return float((1 + u) ** -a)
    if rule == "hinge":
        return 1.0 if u <= b else 1.0 / (a * (u - b) + 1.0)
    return 1.0
