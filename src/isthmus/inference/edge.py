"""The edge: the target's half of many texts, judged together.

What has arrived is one batch: one forward of the target for all texts, one piece of work (its
weights are read once), then all verdicts; what came meanwhile is the next batch. Prompts are read
when they arrive, in pieces, and take turns with judging.

A text is known by (party, session). A device that hears nothing asks again: the same offer gets
the same verdict, and what is older than the newest message is passed over, so that no loss,
delay, repetition or change of order leads to another token. Anything else is refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from isthmus import catalogue
from isthmus.errors import InputError, unknown
from isthmus.inference.chance import chances
from isthmus.inference.engine import Engine
from isthmus.inference.judging import Judging, Text, Who, pieces, reading, verifying
from isthmus.inference.messages import (
    CLOSE,
    OPEN,
    OPENED,
    REFUSED,
    STOPS,
    TEXT,
    addressed,
    checked_prompt,
    refusal,
    same,
)
from isthmus.inference.method import Method, method_of
from isthmus.inference.work import judging_seconds
from isthmus.models.decode import Law
from isthmus.wire.clock import Action, After, Event, Send, Work
from isthmus.wire.compact import FRAMING
from isthmus.wire.device import Device
from isthmus.wire.errors import WireError
from isthmus.wire.layouts import Layout
from isthmus.wire.message import Message, Schema, decode, encode


class Limits(NamedTuple):
    """The most texts at once, the most of one party, and the seconds after which an idle one
    is dropped."""

    texts: int = 256
    each: int = 64
    idle: float = 300.0


class Edge:
    """The party that judges. `device` is what it declares to compute on; `methods` maps the names
    that it serves to their classes (every one of the catalogue unless given)."""

    def __init__(
        self,
        target: Engine,
        *,
        name: str = "edge",
        device: Device | str = "edge-server",
        methods: Mapping[str, type[Method]] | None = None,
        fingerprint: str = "",
        limits: Limits | None = None,
        judging: Judging | None = None,
    ) -> None:
        self.judging = judging or Judging(target)
        self.target, self.name, self.fingerprint = target, name, fingerprint
        self.limits = limits or Limits()
        self.device = device if isinstance(device, Device) else Device.named(device)
        if methods is None:
            names = catalogue.names("serving")
            methods = {name: catalogue.find("serving", name) for name in names}
        self.methods = {name: kind for name, kind in methods.items() if kind.edge}
        self.texts: dict[Who, Text] = {}
        self._fresh: dict[Who, Text] = {}  # whose prompt is not read yet
        self._waiting: dict[Who, Text] = {}  # with something to judge
        self._parties = Counter[str]()
        self._built: dict[tuple[str, str], Method] = {}
        self._sequence = 0
        self._busy = self._called = self._sweeping = self._read_last = False

    def on(self, event: Event, now: float) -> list[Action]:
        """The answer to an event (see `isthmus.wire.clock.Party`)."""
        match event.sender != "", event.kind:
            case True, "open" | "offer" | "close":
                return self._heard(event, now)
            case True, "gone":
                for who in [who for who in self.texts if who[0] == event.sender]:
                    self._drop(who)
            case False, "batch":
                return self._batch(now)
            case False, "sweep":
                return self._sweep(now)
            case _:
                pass  # what nobody should send an edge
        return []

    def _heard(self, event: Event, now: float) -> list[Action]:
        address = addressed(event.data)
        if address is None:
            return []
        who = (event.sender, address[0])
        try:
            return getattr(self, f"_on_{event.kind}")(who, event.data, now)
        except (WireError, InputError) as error:
            if event.kind == "offer":
                self._drop(who)
            return [self._say(who, refusal(str(error)), REFUSED, "described")]

    def close(self) -> None:
        """Drop every text."""
        for who in list(self.texts):
            self._drop(who)

    # ------------------------------------------------------------ opening and closing

    def _on_open(self, who: Who, data: bytes, now: float) -> list[Action]:
        opening = decode(data, OPEN)
        text = self.texts.get(who)
        if text is None:
            text = self._admit(who, opening, now)
        elif not same(text.opening, opening):
            raise InputError("session", who[1], "one that is not open already")
        elif opening.sequence <= text.newest:
            return []
        text.newest, text.heard = opening.sequence, now
        return [self._say(who, text.opened, OPENED, "described"), *self._call(), *self._alarm()]

    def _admit(self, who: Who, opening: Message, now: float) -> Text:
        fields, limits = opening.fields, self.limits
        if len(self.texts) >= limits.texts or self._parties[who[0]] >= limits.each:
            allowed = f"{limits.texts} texts at once, {limits.each} of one party"
            raise InputError("session", f"{len(self.texts)} are open", allowed)
        if fields["fingerprint"] != self.fingerprint:
            raise InputError(
                "fingerprint", fields["fingerprint"], f"{self.fingerprint} (tokenizer)"
            )
        method = self._method(str(fields["method"]), str(fields["settings"]))
        law = Law(fields["temperature"], fields["top_k"], fields["top_p"])  # type: ignore[arg-type]
        prompt = checked_prompt(opening.tensors["prompt"], self.target.vocab)
        if len(opening.tensors["stop"]) > STOPS:
            raise InputError("stop", f"{len(opening.tensors['stop'])} tokens", f"at most {STOPS}")
        if len(prompt) >= self.target.context:
            raise InputError("prompt", f"{len(prompt)} tokens", f"below {self.target.context}")
        total = min(len(prompt) + int(fields["max_new_tokens"]), self.target.context)
        key, stop = int(fields["key"]), frozenset(opening.tensors["stop"].tolist())
        accept, correct = (chances(key, role, 0, total + 1) for role in ("accept", "correct"))
        declared = {
            "verify_seconds": judging_seconds(
                self.target, self.device, method.knobs.gamma, len(prompt)
            ),
            "context": min(self.target.context, TEXT),
        }
        text = Text(
            who, method, law, prompt, total, stop, accept, correct,
            opening, Message("opened", declared, {}), at=len(prompt), heard=now,
        )  # fmt: skip
        self.judging.open(text)
        self.texts[who] = self._fresh[who] = text
        self._parties[who[0]] += 1
        return text

    def _method(self, name: str, settings: str) -> Method:
        """A method as a device names it; never one from a file, which only a user may name."""
        found = self._built.get((name, settings))
        if found is None:
            if name not in self.methods:
                raise unknown("method", name, self.methods)
            try:
                knobs = json.loads(settings)
            except (ValueError, RecursionError):
                knobs = None
            if not isinstance(knobs, dict):
                raise WireError("settings", "no JSON object")
            if len(self._built) >= 64:
                self._built.clear()
            found = method_of(self.methods[name], self.target.vocab, knobs)
            self._built[name, settings] = found
        return found

    def _on_close(self, who: Who, data: bytes, now: float) -> list[Action]:
        if decode(data, CLOSE).session == who[1]:
            self._drop(who)
        return []

    def _drop(self, who: Who) -> None:
        text = self.texts.pop(who, None)
        if text is not None:
            self._fresh.pop(who, None)
            self._waiting.pop(who, None)
            self._parties -= Counter([who[0]])
            self.judging.close(text)

    def _alarm(self) -> list[Action]:
        if self._sweeping or self.limits.idle == math.inf:
            return []
        self._sweeping = True
        return [After(self.limits.idle, Event("sweep"))]

    def _sweep(self, now: float) -> list[Action]:
        """Drop who has not been heard of for too long."""
        for who, text in list(self.texts.items()):
            if now - text.heard >= self.limits.idle:
                self._drop(who)
        self._sweeping = False
        return self._alarm() if self.texts else []

    # ------------------------------------------------------------ judging

    def _on_offer(self, who: Who, data: bytes, now: float) -> list[Action]:
        text = self.texts.get(who)
        if text is None:
            raise InputError("session", who[1], "one that is open here")
        offer = decode(data, text.method.up)
        if offer.sequence <= text.newest:
            return []
        text.newest, text.heard = offer.sequence, now
        contents = data[FRAMING.size :]
        if contents == text.contents and not text.method.streams:
            if text.verdict is None:
                return []  # it is being judged
            again = {"round": text.rounds - 1, "note": "retry"}
            return [self._say(who, text.verdict, text.method.down, "compact", **again)]
        if text.offer is not None and not text.method.streams:
            raise WireError("at", "another offer before the verdict on the last one")
        text.take(offer, contents)
        self._waiting[who] = text
        return self._call()

    def _call(self) -> list[Action]:
        """Begin a batch once everything that has arrived is taken up."""
        if self._busy or self._called:
            return []
        self._called = True
        return [After(0.0, Event("batch"))]

    def _batch(self, now: float) -> list[Action]:
        self._called = False
        ready = [text for who, text in self._waiting.items() if who not in self._fresh]
        self._busy = bool(ready or self._fresh)
        if not self._busy:
            return []
        self._read_last = bool(self._fresh) and not (self._read_last and ready)
        works: list[Work]
        sends: list[Send] = []
        if self._read_last:
            batch = pieces(list(self._fresh.values()))
            works = [reading(self.target, batch)]
            self.judging.read(batch)
            for text, piece in batch:
                text.held += len(piece)
                if text.held == len(text.ids):
                    del self._fresh[text.who]
        else:
            works = verifying(self.target, ready)
            for text, judged in zip(ready, self.judging.judge(ready), strict=True):
                text.heard, round = now, text.rounds
                verdict = text.settle(judged)
                paper, schema = text.method.values(verdict), text.method.down
                sends.append(
                    self._say(text.who, verdict, schema, "compact", values=paper, round=round)
                )
                if text.offer is None:
                    del self._waiting[text.who]
        return [*works, *sends, After(0.0, Event("batch"))]

    def _say(
        self,
        who: Who,
        message: Message,
        schema: Schema,
        layout: Layout,
        *,
        values: int = 0,
        round: int = 0,
        note: str = "",
    ) -> Send:
        """A message of this edge, which numbers all that it sends in one row."""
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        party, session = who
        data = encode(message, schema, layout, session, self._sequence)
        return Send(party, message.kind, data, values, round, session, self._sequence, note)
