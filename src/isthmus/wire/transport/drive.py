"""A party of the virtual clock, run over a real transport."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping

from isthmus.wire.clock import After, Event, Once, Party, Send, Work
from isthmus.wire.errors import WireError
from isthmus.wire.ledger import Ledger
from isthmus.wire.message import peek
from isthmus.wire.transport.base import Received, Transport

AHEAD = 256
"""Messages that may come before a timer that is due."""


def drive(
    party: Party,
    transport: Transport,
    *,
    until: Callable[[], bool],
    ledger: Ledger | None = None,
    kinds: Mapping[int, str] | None = None,
    start: Iterable[Event] = (),
    seconds: float = math.inf,
) -> None:
    """Let a party answer what arrives until `until()` holds or `seconds` are over.

    `kinds` names the schema numbers of compact messages. The party gets an event for every
    message (sent again under the same session and sequence: only once), and as kinds of their
    own `malformed` (bytes that are no message of a known kind), `gone` (a party left or broke
    the rules; with what was to be sent to it, if anything) and `undelivered`. The ledger gets
    the crossings that it sends, the seconds that receiving took (never bytes) and the wall time
    of its work.
    """
    _Drive(party, transport, ledger, kinds or {}).run(until, start, seconds)


class _Drive:
    def __init__(
        self, party: Party, transport: Transport, ledger: Ledger | None, kinds: Mapping[int, str]
    ) -> None:
        self.party, self.transport, self.ledger, self.kinds = party, transport, ledger, kinds
        self.timers: list[tuple[float, int, Event]] = []
        self.count = 0
        self.once = Once()

    def run(self, until: Callable[[], bool], start: Iterable[Event], seconds: float) -> None:
        now = self.transport.now
        end = now() + seconds
        for event in start:
            self.after(0.0, event)
        ahead = 0  # messages taken up while a timer was due
        while not until() and now() < end:
            due = bool(self.timers) and self.timers[0][0] <= now()
            wake = min(end, self.timers[0][0] if self.timers else math.inf)
            try:
                got = self.transport.receive(None if wake == math.inf else max(wake - now(), 0.0))
                event, idle = self.arrived(got) if got else None, got is None
            except WireError as error:
                idle, event = False, Event("gone", error.field, fields={"problem": error.problem})
            if event:
                self.answer(event)
            # As on the clock, what has arrived comes before what is scheduled for now, but only
            # so many messages: a flood does not keep a timer from its turn.
            ahead = ahead + 1 if due else 0
            if due and (idle or ahead > AHEAD):
                ahead = 0
                self.answer(heapq.heappop(self.timers)[2])

    def after(self, seconds: float, event: Event) -> None:
        heapq.heappush(self.timers, (self.transport.now() + seconds, self.count, event))
        self.count += 1

    def arrived(self, got: Received) -> Event | None:
        try:
            schema, session, sequence = peek(got.data)
            if isinstance(schema, int) and schema not in self.kinds:
                raise WireError("framing", f"schema {schema} is none of {sorted(self.kinds)}")
        except WireError as error:
            return Event("malformed", got.sender, got.data, {"problem": str(error)})
        kind = schema if isinstance(schema, str) else self.kinds[schema]
        again = not self.once.new(got.sender, self.party.name, kind, session, sequence)
        if self.ledger is not None:
            self.ledger.confirm(
                session, sequence, sender=got.sender, receiver=self.party.name, kind=kind,
                t=self.transport.now(), seconds=got.seconds, note="repeat" if again else "",
            )  # fmt: skip
        return None if again else Event(kind, got.sender, got.data)

    def answer(self, event: Event) -> None:
        begin = self.transport.now()
        actions = list(self.party.on(event, begin))
        took = self.transport.now() - begin
        for action in actions:
            if isinstance(action, After):
                self.after(action.seconds, action.event)
            elif isinstance(action, Send):
                self.send(action)
            else:
                self.work(action, begin, took)
                took = 0.0  # one wall time for all the work of one answer

    def send(self, send: Send) -> None:
        what = {"kind": send.kind, "session": send.session, "sequence": send.sequence}
        try:
            delivery = self.transport.send(send.to, send.data)
        except WireError as error:
            self.after(0.0, Event("gone", send.to, fields=what | {"problem": error.problem}))
            return
        if self.ledger is not None:
            delivery.enter(
                self.ledger, sender=self.party.name, receiver=send.to, kind=send.kind,
                values=send.values, round=send.round, session=send.session,
                sequence=send.sequence, note=send.note,
            )  # fmt: skip
        if not delivery.delivered:
            wait = max(delivery.done - self.transport.now(), 0.0)
            self.after(wait, Event("undelivered", send.to, fields=what))

    def work(self, work: Work, begin: float, took: float) -> None:
        if self.ledger is not None:
            self.ledger.work(
                party=self.party.name, kind=work.kind, t=begin, seconds=took, flops=work.flops,
                round=work.round, session=work.session, note="wall",
            )  # fmt: skip
