"""The device's end of the line: one question at a time, numbered, asked again, given up.

Every message has a number of its own, also one that repeats what was asked before: a transport
passes over exact repeats, and the edge passes over what is older than its newest.
"""

from __future__ import annotations

from typing import NamedTuple

from isthmus.inference.messages import REFUSED
from isthmus.wire.clock import Action, After, Event, Send
from isthmus.wire.errors import WireError
from isthmus.wire.layouts import Layout
from isthmus.wire.message import Message, Schema, decode, encode


class Question(NamedTuple):
    """What is asked: the message as it is encoded, its paper-style count, the round."""

    message: Message
    schema: Schema
    layout: Layout = "compact"
    values: int = 0
    round: int = 0


class Asking:
    """Questions of session `number` to the party `to`.

    Without an answer for `timeout` seconds a question is asked again, `tries` times (None: it
    waits for ever). `sent` adds up the bytes of messages; whoever reads it may set it to 0.
    """

    def __init__(self, to: str, number: int, timeout: float | None, tries: int) -> None:
        self.to, self.number, self.timeout, self.tries = to, number, timeout, tries
        self.sent = 0
        self._sequence = 0
        self._open: Question | None = None
        self._tried = 0
        self._deadline = 0.0
        self._armed = False

    def ask(self, question: Question, now: float) -> list[Action]:
        """Send a question and expect its answer in time."""
        self._open, self._tried = question, 0
        return [self.tell(question), *self._wait(now)]

    def tell(self, question: Question, note: str = "") -> Send:
        """Send what needs no answer."""
        self._sequence += 1
        data = encode(
            question.message, question.schema, question.layout, self.number, self._sequence
        )
        self.sent += len(data)
        return Send(
            self.to, question.schema.kind, data, 0 if note else question.values, question.round,
            self.number, self._sequence, note,
        )  # fmt: skip

    def answered(self) -> None:
        """Expect nothing more."""
        self._open = None

    def heard(self, now: float) -> None:
        """Part of the answer is here: expect the next part in time."""
        self._tried, self._deadline = 0, now + (self.timeout or 0.0)

    def late(self, now: float, question: Question | None = None) -> list[Action] | None:
        """The answer to the alarm, of which there is at most one; None: it is time to give up.

        `question` is what to ask now, if it has changed.
        """
        self._armed = False
        if self._open is None or self.timeout is None:
            return []
        if now < self._deadline:
            self._armed = True
            return [After(self._deadline - now, Event("late"))]
        if self._tried == self.tries:
            return None
        self._tried += 1
        return [self.tell(question or self._open, note="retry"), *self._wait(now)]

    def _wait(self, now: float) -> list[Action]:
        if self.timeout is None:
            return []
        self._deadline = now + self.timeout
        armed, self._armed = self._armed, True
        return [] if armed else [After(self.timeout, Event("late"))]

    def given_up(self) -> str:
        """What to say when it is time to give up."""
        kind = self._open.schema.kind if self._open else "a message"
        return (
            f"{self.to}: no answer to {kind}, asked {1 + self.tries} times in {self.timeout} s each"
        )

    def trouble(self, event: Event) -> str:
        """What an event from the other side says went wrong; nothing for any other event."""
        if event.sender != self.to:
            return ""
        problem = event.fields.get("problem", "")
        match event.kind:
            case "gone":
                return f"{self.to} {problem or 'is gone'}"
            case "undelivered":
                return f"{self.to}: the link gave up {event.fields.get('kind', 'a message')}"
            case "malformed":
                return f"{self.to} sent what is no message: {problem}"
            case "refused":
                try:
                    refused = decode(event.data, REFUSED)
                except WireError as error:
                    return f"{self.to} sent what is no refusal: {error}"
                ours = refused.session == self.number
                return f"{self.to} refuses: {refused.fields['problem']}" if ours else ""
        return ""
