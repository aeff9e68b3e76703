"""One text in the making: a session and an edge on a clock of their own, told piece by piece."""

from __future__ import annotations

import heapq
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.inference.edge import Edge
from isthmus.inference.method import Method
from isthmus.inference.server.spelling import Span, Spelling, Until
from isthmus.inference.session import Session, Token
from isthmus.inference.work import declared
from isthmus.models.decode import Law
from isthmus.wire.clock import Clock, Event
from isthmus.wire.device import Device
from isthmus.wire.errors import WireError
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

if TYPE_CHECKING:
    from isthmus.inference.server.service import Service

Finish = Literal["", "stop", "length", "error", "cancelled"]


@dataclass(frozen=True)
class Ask:
    """What a text is to be: the ids it continues, how, and where it stops.

    `stop` are strings (the model's own stop tokens always end a text). Without a method or a
    link the service's own are taken; `settings` are the method's.
    """

    ids: tuple[int, ...]
    max_new_tokens: int = 64
    law: Law = field(default_factory=Law)
    seed: int = 0
    stop: tuple[str, ...] = ()
    method: str | None = None
    link: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Figures(NamedTuple):
    """What a text has come to. `up` and `down` are all bytes that crossed, `offers` and
    `verdicts` those of the rounds alone; `seconds` are virtual, `wall` are real; joules are
    modelled, the device's with its radio."""

    tokens: int = 0
    rounds: int = 0
    judged: int = 0
    accepted: int = 0
    up: int = 0
    down: int = 0
    offers: int = 0
    verdicts: int = 0
    seconds: float = 0.0
    wall: float = 0.0
    device_joules: float = 0.0
    edge_joules: float = 0.0


class Piece(NamedTuple):
    """One token, or the end with its `finish`: the spans that can be told now, who produced the
    token, when the device had it (virtual seconds), and the figures so far."""

    spans: list[Span]
    origin: str
    t: float
    figures: Figures
    finish: Finish = ""
    problem: str = ""

    def told(self) -> dict[str, Any]:
        """As JSON."""
        figures = self.figures._asdict()
        return {"spans": self.spans, "origin": self.origin, "t": self.t, "figures": figures}


class Text:
    """A text that `service` was asked for; `listen` hears its pieces.

    Raises `InputError` for what cannot be decoded.
    """

    def __init__(
        self,
        service: Service,
        ask: Ask,
        method: Method,
        link: str,
        listen: Callable[[Piece], object],
    ) -> None:
        language = service.language
        phone, line = Device.named(service.device), Link.parse(link)
        self.listen = listen
        self.session = Session(
            method, ask.ids, draft=service.drafting, law=ask.law,
            key=int(seeds.keys(seeds.key(ask.seed), [0])[0]), max_new_tokens=ask.max_new_tokens,
            stop=language.stop, fingerprint=service.fingerprint, fallback=service.fallback,
            costs=declared(service.drafting, phone, line, len(ask.ids)), timeout=None,
        )  # fmt: skip
        edge = Edge(
            service.judging, device=service.edge, methods=service.methods,
            fingerprint=service.fingerprint,
        )  # fmt: skip
        self.ledger = Ledger()
        self.clock = Clock(self.ledger)
        self.clock.join(self.session, phone)
        self.clock.join(edge, edge.device)
        self.clock.connect(self.session.name, edge.name, line)
        self.clock.at(0.0, self.session, Event("begin"))
        self._meeting, self._spell = service.meeting, service.spell
        self._spelling, self._until = Spelling(language.decode, ask.ids), Until(ask.stop)
        self._ends = frozenset(language.stop)
        self._cancelled = threading.Event()
        self._begun = time.monotonic()
        self._rows = 0  # of the ledger that were read, and those of them that are not yet over
        self._due: list[tuple[float, int, dict[str, Any]]] = []
        self._figures = Figures()
        self._origin = ""

    def cancel(self) -> None:
        """Let it end soon; nothing happens to one that has ended."""
        self._cancelled.set()

    def pieces(self) -> Generator[Piece]:
        """Make the text: a piece for each token, and a last one with how it ended."""
        finish: Finish = ""
        problem, told = "", 0
        spans: list[Span] = []
        try:
            with self._meeting.part():
                self._begun = time.monotonic()
                while not finish:
                    finish, problem = self._step()
                    for token in self.session.tokens[told:]:
                        told += 1
                        yield self._piece(token, told)
                        if self._until.stopped:
                            finish = "stop"
                            break
            with self._spell:
                rest = Span(self._spelling.rest(), self._origin)
            spans = self._until.add(rest)
        except (InputError, WireError) as error:
            finish, problem = "error", str(error)
        except Exception:
            logging.getLogger(__name__).exception("a text could not be made")
            finish, problem = "error", "a defect of the server ended the text"
        spans += self._until.rest()
        self._account()
        yield Piece(spans, self._origin, self.session.seconds, self._figures, finish, problem)

    def _step(self) -> tuple[Finish, str]:
        """Let the next thing happen on the clock; how the text has ended by it, if it has."""
        if self._cancelled.is_set():
            return "cancelled", ""
        self.clock.run(most=1)
        self._account(self.clock.now)
        if not self.session.finished and self.clock.next() == math.inf:
            return "error", "nothing more happens in the session"
        return self.session.finished, self.session.problem

    def _piece(self, token: Token, count: int) -> Piece:
        seen = self.session.seen
        self._figures = self._figures._replace(
            tokens=count, rounds=len(self.session.rounds), judged=seen.judged,
            accepted=seen.accepted, seconds=token.t, wall=time.monotonic() - self._begun,
        )  # fmt: skip
        self._origin = token.origin
        ends = token.id in self._ends
        with self._spell:
            said = "" if ends else self._spelling.add(token.id)
        spans = self._until.add(Span(said, token.origin))
        return Piece(spans, token.origin, token.t, self._figures)

    def _account(self, until: float = math.inf) -> None:
        """Take what is over by the time `until` into the figures, as the ledger has it."""
        for row in self.ledger.rows(self._rows):
            self._rows += 1
            heapq.heappush(self._due, (row["t"] + row["seconds"], self._rows, row))
        sums = self._figures._asdict()
        while self._due and self._due[0][0] <= until:
            row = heapq.heappop(self._due)[2]
            across = row["what"] == "crossing"
            if across:
                sums["up" if row["from"] == self.session.name else "down"] += row["bytes"]
                if row["kind"] in ("offer", "verdict"):
                    sums[f"{row['kind']}s"] += row["bytes"]
            # The joules of a crossing are those of the device's radio.
            device = across or row["from"] == self.session.name
            sums["device_joules" if device else "edge_joules"] += row["joules"]
        self._figures = Figures(**sums)
