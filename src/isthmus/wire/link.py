"""A link: what sending costs in seconds and joules, one message at a time or a cohort at once.

A message of b bytes handed over at time `now` waits for those before it, then takes

    per_message + 8 b / rate(t)   on the air, and latency until the far side has it;

a lost transmission is noticed one round trip (2 latencies) after it ended and is sent again.
The two directions are independent. Energy is that of the lower end's radio (the device's):
`send` watts while it sends up, `receive` watts while it receives, and `message` joules each
time; the infrastructure's is not modelled. Every joule here is modelled, none is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from isthmus import seeds
from isthmus.errors import InputError, unknown
from isthmus.wire.ledger import Ledger, Words
from isthmus.wire.rate import Rate, finish

Array = NDArray[Any]
Direction = Literal["up", "down"]


class Energy(NamedTuple):
    """The device's radio: watts while sending, watts while receiving, joules a transmission."""

    send: float = 0.0
    receive: float = 0.0
    message: float = 0.0


class Attempts(NamedTuple):
    """Every transmission of one or several messages: which message, when, how long, its energy."""

    index: Any
    t: Any
    seconds: Any
    joules: Any
    lost: Any


class Delivery(NamedTuple):
    """What sending came to: numbers for one message, arrays `[n]` for n of them.

    `done` is when the far side has it (or when the sender gave up: not `delivered`), `seconds`
    = done - sent with the wait in the queue, `bytes` with every lost transmission.
    """

    sent: Any
    done: Any
    seconds: Any
    bytes: Any
    joules: Any
    lost: Any
    delivered: Any
    attempts: Attempts

    def enter(
        self,
        ledger: Ledger,
        *,
        sender: Words,
        receiver: Words,
        kind: Words,
        values: Any = 0,
        note: Words = "",
        **cells: Any,
    ) -> range:
        """Enter the crossing (or n of them) as one block, each lost transmission as its own row.

        `values` (a number or one for each message) is counted in the row that arrived. `cells`
        (round, session, sequence) are scalars or one for each message.
        """
        common: dict[str, Any] = {"sender": sender, "receiver": receiver, "kind": kind, **cells}
        many = isinstance(self.lost, np.ndarray)
        if many and (self.lost is _surely(n := len(self.lost))[1] or not self.lost.any()):
            ledger.later(
                n, "crossing", t=self.sent, bytes=self.bytes, values=values,
                seconds=self.seconds, joules=self.joules, note=note, **common,
            )  # fmt: skip
            return range(len(ledger) - n, len(ledger))
        if not np.any(self.lost):
            return ledger.cross_many(
                t=self.sent, bytes=self.bytes, values=values, seconds=self.seconds,
                joules=self.joules, note=note, **common,
            )  # fmt: skip
        index, t, seconds, joules, lost = (np.asarray(column) for column in self.attempts)
        sizes = self.bytes // (self.lost + self.delivered)
        spread = {name: _pick(cell, index) for name, cell in common.items()}
        return ledger.cross_many(
            t=t, seconds=seconds, joules=joules, bytes=_pick(sizes, index),
            values=np.where(lost, 0, _pick(values, index)),
            note=np.where(lost, "lost", np.asarray(_pick(note, index))).tolist(), **spread,
        )  # fmt: skip


class Link:
    """A queueing link with one profile: rates up and down in bits/s, times in seconds.

    `up`, `down`: a number, a `Trace` or a `Sampled` function. `loss`: the probability, drawn
    from `seed`, that a transmission is lost; after `attempts` of them the sender gives up.

    >>> link = Link(up=8e3, down=8e4, latency=0.5)
    >>> link.send(1000, "up", now=0.0).done, link.send(1000, "up", now=0.0).done
    (1.5, 2.5)
    """

    def __init__(
        self,
        up: Rate = math.inf,
        down: Rate = math.inf,
        latency: float = 0.0,
        per_message: float = 0.0,
        loss: float = 0.0,
        energy: Energy = Energy(),  # noqa: B008
        *,
        seed: int = 0,
        attempts: int = 16,
    ) -> None:
        for name, rate in (("up", up), ("down", down)):
            if isinstance(rate, int | float) and not rate > 0:
                raise InputError(f"link.{name}", rate, "more than 0 bits/s")
        costs = {"latency": latency, "per_message": per_message, **energy._asdict()}
        for name, value in costs.items():
            if not 0 <= value < math.inf:
                raise InputError(f"link.{name}", value, "a finite number, 0 or more")
        if not 0 <= loss < 1:
            raise InputError("link.loss", loss, "0 or more, below 1")
        if attempts < 1:
            raise InputError("link.attempts", attempts, "1 or more")
        self.rates: dict[Direction, Rate] = {"up": up, "down": down}
        self.latency, self.per_message, self.loss = latency, per_message, loss
        self.energy, self.seed, self.attempts = energy, seed, attempts
        self._free: dict[str, float] = {"up": 0.0, "down": 0.0}
        self._count: dict[str, int] = {"up": 0, "down": 0}

    def send(self, bytes: int, direction: Direction, now: float) -> Delivery:
        """Send one message at time `now`, behind those sent before it in this direction.

        A message that is repeated holds the link until it is through: order is kept.
        """
        lost = self._losses(direction, self._count[direction])
        self._count[direction] += 1
        tries = min(lost + 1, self.attempts)
        t, rows = now, Attempts([0] * tries, [], [], [], [])
        for k in range(tries):
            begin = max(t, self._free[direction]) + self.per_message
            end = float(finish(self.rates[direction], 8 * bytes, begin))
            self._free[direction] = end
            gone = k < lost
            after = end + (2 if gone else 1) * self.latency
            for column, cell in zip(
                rows[1:], (t, after - t, self._joules(direction, end - begin), gone), strict=True
            ):
                column.append(cell)
            t = after
        return Delivery(
            now, t, t - now, bytes * tries, sum(rows.joules), lost, lost < self.attempts, rows
        )

    def send_many(
        self, bytes: Any, direction: Direction, now: Any, key: int = 0, index: Any = None
    ) -> Delivery:
        """Send `bytes` `[n]` at `now` (a number or `[n]`) over n separate links of this profile.

        No message waits for another and this link's own queue is not touched. Losses are drawn
        from (key, index[i]); `index` is 0..n-1 unless given (client numbers, say).
        """
        bytes = np.asarray(bytes, np.int64)
        n = len(bytes)
        sent = now if isinstance(now, np.ndarray) else np.full(n, now, float)
        if not self.loss:
            return self._sure(bytes, direction, sent)
        lost = np.zeros(n, np.int64)
        draws = seeds.keys(key, np.arange(n) if index is None else index)
        u = ((draws.view(np.uint64) >> np.uint64(11)) + 0.5) * 2.0**-53
        lost = np.minimum(np.log(u) // math.log(self.loss), self.attempts).astype(np.int64)
        tries = np.minimum(lost + 1, self.attempts)
        t, joules, parts = sent, np.zeros(n), list[tuple[Any, ...]]()
        for k in range(int(tries.max(initial=0))):
            begin = t + self.per_message
            end = finish(self.rates[direction], 8 * bytes, begin)
            active, gone = k < tries, k < lost
            after = np.where(active, end + np.where(gone, 2, 1) * self.latency, t)
            spent = np.where(active, self._joules(direction, end - begin), 0.0)
            at = np.flatnonzero(active)
            parts.append((at, t[at], (after - t)[at], spent[at], gone[at]))
            t, joules = after, joules + spent
        rows = [np.concatenate(column) for column in zip(*parts, strict=True)] or [lost] * 5
        if len(parts) > 1:
            order = np.argsort(rows[0], kind="stable")
            rows = [column[order] for column in rows]
        arrived = lost < self.attempts
        return Delivery(sent, t, t - sent, bytes * tries, joules, lost, arrived, Attempts(*rows))

    def _sure(self, bytes: Any, direction: Direction, sent: Any) -> Delivery:
        """`send_many` where nothing can be lost: one transmission each."""
        index, none, arrived = _surely(len(bytes))
        begin = sent + self.per_message if self.per_message else sent
        end = finish(self.rates[direction], 8 * bytes, begin)
        done = end + self.latency
        seconds, joules = done - sent, self._joules(direction, end - begin)
        rows = Attempts(index, sent, seconds, joules, none)
        return Delivery(sent, done, seconds, bytes, joules, none, arrived, rows)

    def _losses(self, direction: Direction, count: int) -> int:
        """How many transmissions in a row are lost: geometric, from one draw."""
        if not self.loss:
            return 0
        draw = cast("int", seeds.fold(seeds.key(self.seed, direction), count)) & (2**64 - 1)
        u = ((draw >> 11) + 0.5) * 2.0**-53
        return int(min(math.log(u) // math.log(self.loss), self.attempts))

    def _joules(self, direction: Direction, air: Any) -> Any:
        watts = self.energy.send if direction == "up" else self.energy.receive
        return watts * air + self.energy.message

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (JSON): when each direction is free, and messages so far."""
        return {"free": dict(self._free), "count": dict(self._count)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a `state` again."""
        self._free, self._count = dict(state["free"]), dict(state["count"])

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Link:
        """A link from a profile's name, from `name=number` pairs, or from both.

        >>> Link.parse("lora,loss=0.1").loss
        0.1
        """
        head, *rest = [part.strip() for part in text.split(",")]
        settings: dict[str, float] = {}
        if "=" not in head:
            if head not in PROFILES:
                raise unknown("link", head, PROFILES)
            settings |= PROFILES[head]
        else:
            rest = [head, *rest]
        for part in rest:
            name, _, number = part.partition("=")
            if name not in SETTINGS:
                raise unknown("link", name, SETTINGS)
            try:
                settings[name] = float(number)
            except ValueError:
                raise InputError(f"link.{name}", number or "nothing", "a number") from None
        radio = Energy(**{name: settings.pop(name, 0.0) for name in Energy._fields})
        attempts = settings.pop("attempts", 16.0)
        if attempts != attempts // 1:
            raise InputError("link.attempts", attempts, "a whole number")
        return cls(**settings, energy=radio, seed=seed, attempts=int(attempts))


@lru_cache(maxsize=64)
def _surely(n: int) -> tuple[Array, Array, Array]:
    """Of n messages none of which is lost: their numbers, their losses, and that they arrive."""
    held = np.arange(n), np.zeros(n, np.int64), np.ones(n, bool)
    for array in held:
        array.flags.writeable = False
    return held


def _pick(cell: Any, index: Array) -> Any:
    if isinstance(cell, str) or np.ndim(cell) == 0:
        return cell
    return [cell[i] for i in index.tolist()] if isinstance(cell, list | tuple) else cell[index]


SETTINGS = ("up", "down", "latency", "per_message", "loss", *Energy._fields, "attempts")

# Round numbers of a typical order, for comparing methods, not for predicting a network; the
# rate of lora is that of LoRaWAN's data rate 5 (spreading factor 7 in 125 kHz).
PROFILES: dict[str, dict[str, float]] = {
    "ideal": {},
    "ethernet": {"up": 1e9, "down": 1e9, "latency": 2e-4},
    "wifi": {"up": 50e6, "down": 100e6, "latency": 3e-3, "send": 1.0, "receive": 0.8},
    "5g": {"up": 50e6, "down": 300e6, "latency": 1e-2, "send": 3.0, "receive": 2.0},
    "lte": {"up": 5e6, "down": 20e6, "latency": 3e-2, "send": 2.5, "receive": 1.5},
    "3g": {"up": 1e6, "down": 3e6, "latency": 6e-2, "send": 1.5, "receive": 1.0},
    "bluetooth": {"up": 1e6, "down": 1e6, "latency": 1e-2, "send": 0.03, "receive": 0.03},
    "lora": {"up": 5470.0, "down": 5470.0, "latency": 1e-2, "send": 0.13, "receive": 0.04},
    "satellite": {"up": 5e6, "down": 50e6, "latency": 0.3, "send": 10.0, "receive": 5.0},
}
