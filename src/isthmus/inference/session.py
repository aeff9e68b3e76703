"""A session: the device's half of one text, from the prompt to the last token.

    begin -> open ~~> opened -> [draft -> offer ~~> verdict -> settle]* -> close

A session is a party (`isthmus.wire.clock`): the same object runs on the virtual clock and, by
`isthmus.wire.transport.drive`, as a real process. Without an edge it decodes alone; without a
draft it only asks. Whatever goes wrong on the way ends in a text by the draft alone
(`fallback="device"`) or in one line of `problem` beside the tokens so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from isthmus.errors import InputError, unknown
from isthmus.inference.asking import Asking, Question
from isthmus.inference.drafting import FREE, PLAIN, Drafting, Drawn
from isthmus.inference.engine import Engine
from isthmus.inference.messages import CLOSE, OPEN, OPENED, STOPS, TEXT, checked_prompt
from isthmus.inference.method import Costs, Method, Origin, Seen
from isthmus.models.decode import Law
from isthmus.wire.clock import Action, After, Event
from isthmus.wire.errors import WireError
from isthmus.wire.message import Message, decode

Finish = Literal["", "stop", "length", "error"]
Fallback = Literal["none", "device"]


class Token(NamedTuple):
    """One token of the answer: its id, who produced it, and when the device had it (seconds)."""

    id: int
    origin: Origin
    t: float


class Round(NamedTuple):
    """One verdict: the length `at` of the text it continued, tokens drafted and accepted, when
    it was there (seconds), and the bytes that went up and down since the one before."""

    at: int
    drafted: int
    accepted: int
    t: float
    up: int
    down: int


class Session:
    """The device's half of one text.

    `draft` is the device's model, `edge` the name of the other party, `number` the session's.
    `costs` is what the device declares; the edge adds its own. Without a verdict for `timeout`
    seconds it is asked for again, `tries` times (None: it waits for ever). `eager`: drafts are
    computed when they are begun (see `Drafting`, which `half` is unless given). `listen` hears each
    token.

    The text ends at a token of `stop`, after `max_new_tokens`, or where the smaller context of
    both models ends. Raises `InputError` for what cannot be decoded.
    """

    def __init__(
        self,
        method: Method,
        prompt: Sequence[int] | Tensor,
        *,
        draft: Engine | None = None,
        name: str = "device",
        edge: str = "edge",
        number: int = 1,
        law: Law = PLAIN,
        key: int = 0,
        max_new_tokens: int = 64,
        stop: Sequence[int] = (),
        fingerprint: str = "",
        costs: Costs = FREE,
        fallback: Fallback = "none",
        timeout: float | None = 30.0,
        tries: int = 3,
        eager: bool = False,
        listen: Callable[[Token], None] | None = None,
        half: Callable[..., Drafting] = Drafting,
    ) -> None:
        if fallback not in ("none", "device"):
            raise unknown("fallback", str(fallback), ("none", "device"))
        if draft is None and (method.drafts or not method.edge or fallback == "device"):
            raise InputError("draft", "none", "a model on the device, to draft or to go on alone")
        if not 0 <= max_new_tokens <= TEXT:
            raise InputError("max_new_tokens", max_new_tokens, f"0 to {TEXT}")
        if len(set(stop)) > STOPS:
            raise InputError("stop", f"{len(set(stop))} tokens", f"at most {STOPS}")
        self.prompt = checked_prompt(prompt, method.vocab)
        total = len(self.prompt) + max_new_tokens
        if draft is not None:
            if len(self.prompt) >= draft.context:
                raise InputError("prompt", f"{len(self.prompt)} tokens", f"below {draft.context}")
            total = min(total, draft.context)
        self.method, self.name, self.edge, self.number = method, name, edge, number
        self.fingerprint, self.fallback, self.listen = fingerprint, fallback, listen
        self.text = half(
            method, draft, self.prompt, law=law, key=key, total=total, stop=stop, costs=costs,
            session=number, eager=eager,
        )  # fmt: skip
        self.tokens: list[Token] = []
        self.rounds: list[Round] = []
        self.finished: Finish = ""
        self.problem = ""
        self.ended = 0.0
        self._asking = Asking(edge, number, timeout, tries)
        self._awaits = "begin"  # the one kind of event that takes the text further
        self._gap = -1  # where a stream was last asked for again

    @property
    def seen(self) -> Seen:
        """Tokens judged and accepted so far."""
        return self.text.seen

    @property
    def seconds(self) -> float:
        """When the last token was there; when the session ended, if there is none."""
        return self.tokens[-1].t if self.tokens else self.ended

    def on(self, event: Event, now: float) -> list[Action]:
        """The answer to an event (see `isthmus.wire.clock.Party`)."""
        if self.finished:
            return []
        from_edge = event.kind in ("opened", "verdict")
        if event.kind == self._awaits and event.sender == (self.edge if from_edge else ""):
            try:
                return getattr(self, f"_on_{event.kind}")(event, now)
            except WireError as error:
                return self._fail(f"{self.edge}: {event.kind} with {error}", now)
        if event.kind == "late" and not event.sender:
            return self._late(now)
        problem = self._asking.trouble(event) if self._awaits != "alone" else ""
        return self._fail(problem, now) if problem else []

    # ------------------------------------------------------------ from the prompt to the end

    def _on_begin(self, event: Event, now: float) -> list[Action]:
        text = self.text
        if text.total == len(text.ids):
            return self._end("length", now)
        if not self.method.edge:
            return self._alone()
        fields = {
            "method": self.method.catalogue_name,
            "settings": self.method.knobs.model_dump_json(),
            "temperature": text.law.temperature,
            "top_k": text.law.top_k,
            "top_p": text.law.top_p,
            "key": text.key,
            "max_new_tokens": text.total - len(text.ids),
            "fingerprint": self.fingerprint,
        }
        tensors = {
            "prompt": torch.tensor(text.ids, dtype=torch.int32),
            "stop": torch.tensor(sorted(text.stop), dtype=torch.int32),
        }
        self._awaits = "opened"
        return self._asking.ask(Question(Message("open", fields, tensors), OPEN, "described"), now)

    def _on_opened(self, event: Event, now: float) -> list[Action]:
        opened = decode(event.data, OPENED)
        if opened.session != self.number:
            return []
        text = self.text
        text.costs = text.costs._replace(verify=float(opened.fields["verify_seconds"]))
        text.total = min(text.total, int(opened.fields["context"]))
        return self._round(now)

    def _round(self, now: float) -> list[Action]:
        self._asking.answered()
        works = self.text.round()
        if not works:
            return self._offer(now)
        self._awaits = "drafted"
        return [*works, After(0.0, Event("drafted"))]

    def _on_drafted(self, event: Event, now: float) -> list[Action]:
        return self._offer(now)

    def _offer(self, now: float) -> list[Action]:
        self._awaits = "verdict"
        return self._asking.ask(self._question(), now)

    def _question(self) -> Question:
        offer, method = self.text.offer(), self.method
        return Question(offer, method.up, "compact", method.values(offer), len(self.rounds))

    def _on_verdict(self, event: Event, now: float) -> list[Action]:
        verdict, at = decode(event.data, self.method.down), len(self.text.ids)
        answers = int(verdict.fields["at"])
        if verdict.session != self.number or answers < at:
            return []  # one that was told before
        if answers > at:
            return self._missing(at, now)
        drafted = len(self.text.drafted)
        accepted, drawn = self.text.settle(verdict)
        self.rounds.append(Round(at, drafted, accepted, now, self._asking.sent, len(event.data)))
        self._asking.sent = 0
        self._tell(drawn, now)
        if self.text.ended:
            return self._end(self.text.ended, now)
        if self.method.streams:
            self._asking.heard(now)
            return []
        return self._round(now)

    def _missing(self, at: int, now: float) -> list[Action]:
        """Verdicts of a stream were lost: ask again from here, once."""
        if not self.method.streams or self._gap == at:
            return []
        self._gap = at
        return self._offer(now)

    def _alone(self) -> list[Action]:
        self._awaits = "alone"
        return [*self.text.alone(), After(0.0, Event("alone"))]

    def _on_alone(self, event: Event, now: float) -> list[Action]:
        self._tell(self.text.decoded(), now)
        return self._end(self.text.ended, now) if self.text.ended else self._alone()

    def _tell(self, drawn: list[Drawn], now: float) -> None:
        for id, origin in drawn:
            token = Token(id, origin, now)
            self.tokens.append(token)
            if self.listen is not None:
                self.listen(token)

    # ------------------------------------------------------------ the end, and what goes wrong

    def _late(self, now: float) -> list[Action]:
        streaming = self.method.streams and self._awaits == "verdict"
        actions = self._asking.late(now, self._question() if streaming else None)
        return self._fail(self._asking.given_up(), now) if actions is None else actions

    def _fail(self, problem: str, now: float) -> list[Action]:
        """Go on alone from the text so far, or end with it."""
        self.problem = problem
        if self.fallback == "none":
            return self._end("error", now)
        bye = self._bye()
        self.text.give_up()
        return [*bye, *self._alone()]

    def _end(self, reason: Finish, now: float) -> list[Action]:
        """The text has ended: tell the edge, and free the memory."""
        bye = [] if self._awaits in ("begin", "alone") else self._bye()
        self.finished, self.ended = reason, now
        self.text.close()
        return bye

    def _bye(self) -> list[Action]:
        self._asking.answered()
        return [self._asking.tell(Question(Message("close", {}, {}), CLOSE))]
