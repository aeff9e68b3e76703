"""The one event queue: parties that answer events, on a virtual clock in one process.

A party is `on(event, now) -> [Send | After | Work]`. On the clock its messages cross a `Link`,
its work takes the time of its `Device`, and both enter the ledger; on a real transport
(`isthmus.wire.transport.drive`) the same object sends frames and works as fast as it does.
"""

from __future__ import annotations

import base64
import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, cast

from isthmus.errors import InputError, unknown
from isthmus.wire.device import Device
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Direction, Link


@dataclass(frozen=True, slots=True)
class Event:
    """What a party answers: a message that arrived (`data`), or what was scheduled for it.

    `fields` hold JSON values. A message that a link gave up comes back to its sender as the
    kind `undelivered`, with `sender` the party it was for and the message's kind in `fields`.
    """

    kind: str
    sender: str = ""
    data: bytes = b""
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Send:
    """A message for party `to`; `values` is the paper-style count of its bytes.

    One sent again under its session and sequence has the note `repeat` and no `values`; it
    reaches the party only when the first did not (unless both numbers are 0).
    """

    to: str
    kind: str
    data: bytes
    values: int = 0
    round: int = 0
    session: int = 0
    sequence: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class After:
    """An event for oneself, `seconds` from now."""

    seconds: float
    event: Event


@dataclass(frozen=True, slots=True)
class Work:
    """Computation on one's own device; the actions that follow it begin when it is done."""

    flops: float
    kind: str = "work"
    dtype: str = "float32"
    phase: str = "train"
    bytes: float = 0.0
    round: int = 0
    session: int = 0


Action = Send | After | Work
_TYPES = {kind.__name__: kind for kind in (Event, Send, After, Work)}


class Party(Protocol):
    """Whoever takes part: a name, and an answer to each event."""

    @property
    def name(self) -> str:
        """The party's name in ledger and links: `server`, `client/17`."""
        ...

    def on(self, event: Event, now: float) -> Iterable[Action]:
        """The actions that an event at time `now` (seconds) leads to, in order."""
        ...


class Once:
    """Remembers the latest numbered crossings, to tell a repeat from a first arrival."""

    def __init__(self, known: Iterable[Iterable[Any]] = (), most: int = 1024) -> None:
        self.known = OrderedDict[tuple[Any, ...], None]((tuple(one), None) for one in known)
        self.most = most

    def new(self, sender: str, receiver: str, kind: str, session: int, sequence: int) -> bool:
        """True for a crossing not seen lately, and for one without numbers."""
        crossing = (sender, receiver, kind, session, sequence)
        if crossing in self.known:
            return False
        if session or sequence:
            self.known[crossing] = None
            if len(self.known) > self.most:
                self.known.popitem(last=False)
        return True


class Entry(NamedTuple):
    """One entry of the queue: an event for a party, or actions it has yet to take."""

    time: float
    order: int
    party: str
    item: Event | list[Action]


class Clock:
    """Virtual time: events in order of time, ties in the order in which they were scheduled.

    >>> class Bell:
    ...     name = "bell"
    ...
    ...     def on(self, event, now):
    ...         return [After(1.0, Event("ring"))] if now < 2 else []
    >>> clock = Clock()
    >>> clock.join(Bell())
    >>> clock.at(0.5, "bell", Event("ring"))
    >>> clock.run(), clock.now
    (3, 2.5)
    """

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.now = 0.0
        self.ledger = ledger
        self._order = 0
        self._once = Once()
        self._queue: list[Entry] = []
        self._parties: dict[str, Party] = {}
        self._devices: dict[str, Device] = {}
        self._busy: dict[str, float] = {}
        self._links: dict[tuple[str, str], tuple[Link, Direction]] = {}

    def join(self, party: Party, device: Device | None = None) -> None:
        """Let a party take part. Its work is done one piece after the other on its device, and
        takes no time without one."""
        self._parties[party.name] = party
        if device is not None:
            self._devices[party.name] = device

    def connect(self, lower: str, upper: str, link: Link) -> None:
        """Send what goes from `lower` to `upper` up the link, the answers down. Several pairs on
        one link share its queues."""
        self._links[lower, upper] = (link, "up")
        self._links[upper, lower] = (link, "down")

    def at(self, time: float, party: Party | str, event: Event) -> None:
        """Schedule an event for a party. Raises `InputError` for the past and for strangers."""
        name = party if isinstance(party, str) else party.name
        if name not in self._parties:
            raise unknown("party", name, self._parties)
        self._put(time, name, event)

    def _put(self, time: float, party: str, item: Event | list[Action]) -> None:
        if not self.now <= time < math.inf:
            raise InputError("time", time, f"{self.now} (now) or later, finite")
        heapq.heappush(self._queue, Entry(time, self._order, party, item))
        self._order += 1

    def next(self) -> float:
        """The time of the next entry; infinity when there is none."""
        return self._queue[0].time if self._queue else math.inf

    def run(self, until: float = math.inf, most: int | None = None) -> int:
        """Answer all events up to and at time `until`, or `most` of them; how many there were.

        Afterwards `now` is `until`, or the time of the last event when that is infinite or the
        limit was reached.
        """
        count = 0
        while self._queue and self._queue[0].time <= until:
            if count == most:
                return count
            entry = heapq.heappop(self._queue)
            self.now = entry.time
            if isinstance(entry.item, Event):
                count += 1
                actions = list(self._parties[entry.party].on(entry.item, self.now))
            else:
                actions = entry.item
            self._take(entry.party, actions)
        if until < math.inf:
            self.now = max(self.now, until)
        return count

    def _take(self, party: str, actions: list[Action]) -> None:
        for i, action in enumerate(actions):
            if isinstance(action, After):
                self._put(self.now + action.seconds, party, action.event)
            elif isinstance(action, Send):
                self._send(party, action)
            else:
                done = self._work(party, action)
                if rest := actions[i + 1 :]:
                    # Not sent ahead of time: others may use the link while this party works.
                    self._put(done, party, rest)
                return

    def _send(self, party: str, send: Send) -> None:
        if (party, send.to) not in self._links:
            raise InputError("link", f"{party} to {send.to}", "a connected pair of parties")
        link, direction = self._links[party, send.to]
        delivery = link.send(len(send.data), direction, self.now)
        if self.ledger is not None:
            delivery.enter(
                self.ledger, sender=party, receiver=send.to, kind=send.kind, values=send.values,
                round=send.round, session=send.session, sequence=send.sequence, note=send.note,
            )  # fmt: skip
        if delivery.delivered:
            new = self._once.new(party, send.to, send.kind, send.session, send.sequence)
            if new or send.note != "repeat":
                self._put(delivery.done, send.to, Event(send.kind, party, send.data))
        else:
            lost = {"kind": send.kind, "session": send.session, "sequence": send.sequence}
            self._put(delivery.done, party, Event("undelivered", send.to, fields=lost))

    def _work(self, party: str, work: Work) -> float:
        begin = max(self.now, self._busy.get(party, 0.0))
        seconds = joules = 0.0
        if device := self._devices.get(party):
            spent = device.spend(work.flops, work.dtype, work.phase, work.bytes)
            seconds, joules = float(spent.seconds), float(spent.joules)
        if self.ledger is not None:
            self.ledger.work(
                party=party, kind=work.kind, t=begin, seconds=seconds, joules=joules,
                flops=work.flops, round=work.round, session=work.session,
            )  # fmt: skip
        self._busy[party] = begin + seconds
        return begin + seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values: time, queue, links and busy devices."""
        return {
            "now": self.now,
            "order": self._order,
            "busy": dict(self._busy),
            "once": [list(crossing) for crossing in self._once.known],
            "queue": [[e.time, e.order, e.party, _plain(e.item)] for e in sorted(self._queue)],
            "links": [link.state() for link in self._distinct()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a `state`, after the same parties have joined and the same links connected."""
        self.now, self._order = state["now"], state["order"]
        self._busy = dict(state["busy"])
        self._once = Once(state["once"])
        self._queue = [
            Entry(time, order, party, _lively(item)) for time, order, party, item in state["queue"]
        ]
        for link, kept in zip(self._distinct(), state["links"], strict=True):
            link.restore(kept)

    def _distinct(self) -> list[Link]:
        return list({id(link): link for link, _ in self._links.values()}.values())


def _plain(item: Any) -> Any:
    """An event, an action or a list of actions as JSON values."""
    if isinstance(item, list):
        return [_plain(one) for one in cast("list[Any]", item)]
    if isinstance(item, bytes):
        return base64.b64encode(item).decode("ascii")
    if type(item).__name__ not in _TYPES:
        return item
    held = {part.name: _plain(getattr(item, part.name)) for part in fields(item)}
    return {"type": type(item).__name__, **held}


def _lively(item: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(item, list):
        return [_lively(one) for one in cast("list[Any]", item)]
    held = dict(item)
    kind = _TYPES[held.pop("type")]
    if "data" in held:
        held["data"] = base64.b64decode(held["data"])
    if "event" in held:
        held["event"] = _lively(held["event"])
    return kind(**held)
