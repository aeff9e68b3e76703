"""The edge's half of texts, without time and messages: what it knows of each, what continues it,
and the target at work on many, reading their prompts or judging what was drafted in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from isthmus.inference.engine import Engine
from isthmus.inference.method import Case, Drafted, Judged, Method
from isthmus.inference.verify import joined
from isthmus.inference.work import forward
from isthmus.models.decode import Law
from isthmus.wire.clock import Work
from isthmus.wire.errors import WireError
from isthmus.wire.message import Message

K = TypeVar("K")
A = TypeVar("A")
B = TypeVar("B")

Who = tuple[str, int]
"""A text at the edge: its party and session."""
PIECE = 512
"""Tokens of one prompt that are read at once."""
BATCH = 4096
"""Tokens of prompts that are read in one batch."""
NONE = Drafted(None, [], False)


@dataclass(eq=False, slots=True)
class Text:
    """One text at the edge. Of its `at` tokens the edge may yet lack the last one, which then
    comes with the next offer; `total` is the most it may come to."""

    who: Who
    method: Method
    law: Law
    ids: list[int]
    total: int
    stop: frozenset[int]
    accept: Tensor
    correct: Tensor
    opening: Message
    opened: Message
    heard: float
    at: int
    newest: int = 0  # the sequence of the latest message
    rounds: int = 0
    offer: Message | None = None  # what waits to be judged
    drafted: Drafted = NONE
    contents: bytes = b""  # of the latest offer, to know it again
    verdict: Message | None = None  # the answer to it
    slot: int = -1
    held: int = 0  # tokens of the text in the target's memory
    row: Tensor | None = None  # the target's row after the prompt, until it is used

    @property
    def fed(self) -> list[int]:
        """What the target has yet to read of the text and its offer."""
        return self.ids[self.held :] + self.drafted.ids

    def take(self, offer: Message, contents: bytes) -> None:
        """Take an offer up. Raises `WireError` for one that does not continue the text."""
        at, drafted = int(offer.fields["at"]), self.method.drafted(offer)
        if self.method.streams and len(self.opening.tensors["prompt"]) <= at <= self.at:
            # What was lost on its way down is told again, from the row after its last token on.
            self.at = at
            del self.ids[at:]
            self.held = min(self.held, at if self.row is not None else at - 1)
        if at != self.at:
            raise WireError("at", f"{at}, where the text has {self.at} tokens")
        if at + len(drafted.ids) >= self.total:
            raise WireError("ids", f"{len(drafted.ids)} after {at} of {self.total} tokens")
        known = self.ids[-1] if len(self.ids) == at else drafted.last
        if known is None or (drafted.last is not None and drafted.last != known):
            raise WireError("last", f"{drafted.last} where the text ends with {known}")
        if len(self.ids) < at:
            self.ids.append(known)
        self.offer, self.drafted, self.contents, self.verdict = offer, drafted, contents, None

    def case(self, p: Tensor) -> Case:
        """The offer that waits, to be judged by rows p."""
        assert self.offer is not None  # only what waits is judged
        where = slice(self.at, self.at + len(p))
        return Case(p, self.offer, self.accept[where], self.correct[where])

    def settle(self, judged: Judged) -> Message:
        """Go on to what stands, and from there to the next offer; the verdict to send."""
        assert self.offer is not None  # only what waits is judged
        at = self.at
        self.ids += self.drafted.ids[: judged.accepted]
        if judged.token is not None:
            self.ids.append(judged.token)
        self.held = at + judged.accepted
        self.at = self.held + 1
        self.row = None
        self.rounds += 1
        self.verdict = judged.verdict
        if not self.method.streams or self.at == self.total or self.ids[-1] in self.stop:
            self.offer = None
        return self.verdict


class Judging:
    """The target and its memory of texts, each of which holds no more than what stands."""

    def __init__(self, target: Engine) -> None:
        self.target = target

    def open(self, text: Text) -> None:
        """Give a text its memory."""
        text.slot = self.target.open()

    def close(self, text: Text) -> None:
        """Free a text's memory."""
        self.target.close(text.slot)

    def read(self, batch: Sequence[tuple[Text, list[int]]]) -> None:
        """Read pieces of prompts."""
        rows = [self.target.rows(text.slot, piece, 1) for text, piece in batch]
        for (text, _), row in zip(batch, rows, strict=True):
            text.row = row.get()

    def judge(self, texts: Sequence[Text]) -> list[Judged]:
        """Judge the offers of texts in one forward."""
        for text in texts:
            if text.method.streams:  # something may be told again
                self.target.crop(text.slot, text.held)
        asked = [
            self.target.rows(text.slot, fed, len(text.drafted.ids) + (text.row is None))
            if (fed := text.fed)
            else None
            for text in texts
        ]
        rows: list[Tensor] = []
        for text, pending in zip(texts, asked, strict=True):
            parts = [text.row] if text.row is not None else []
            parts += [pending.get()] if pending is not None else []
            rows.append(joined(parts))
        laws = probabilities([text.law for text in texts], rows)
        cases = [text.case(p) for text, p in zip(texts, laws, strict=True)]
        judged = at_once([text.method for text in texts], cases, lambda one, own: one.judges(own))
        for text, each in zip(texts, judged, strict=True):
            self.target.crop(text.slot, text.at + each.accepted)
        return [placed(each, text.at) for text, each in zip(texts, judged, strict=True)]


def placed(judged: Judged, at: int) -> Judged:
    """An answer with the position that it answers filled in."""
    verdict = judged.verdict
    message = Message(verdict.kind, {**verdict.fields, "at": at}, verdict.tensors)
    return judged._replace(verdict=message)


def pieces(texts: Sequence[Text]) -> list[tuple[Text, list[int]]]:
    """What to read next of prompts, as many as fit in a batch."""
    batch: list[tuple[Text, list[int]]] = []
    longest = 0
    for text in texts:
        piece = text.ids[text.held : text.held + PIECE]
        longest = max(longest, len(piece))
        if batch and longest * (len(batch) + 1) > BATCH:
            break
        batch.append((text, piece))
    return batch


def reading(target: Engine, batch: Sequence[tuple[Text, list[int]]]) -> Work:
    """The work of reading pieces of prompts."""
    lengths = [(len(piece), text.held) for text, piece in batch]
    one = _one([text for text, _ in batch])
    return forward(target, "prefill", lengths, rows=1, phase="prefill", **one)


def verifying(target: Engine, texts: Sequence[Text]) -> list[Work]:
    """The work of judging the offers of texts: none where the rows are known from prompts."""
    lengths = [(len(fed), text.held) for text in texts if (fed := text.fed)]
    kind = "verify" if any(text.drafted.ids for text in texts) else "decode"
    return [forward(target, kind, lengths, **_one(texts))] if lengths else []


def probabilities(laws: Sequence[Law], rows: Sequence[Tensor]) -> list[Tensor]:
    """The probabilities (float64) of each text's rows, all rows of one law at once."""

    def of_law(law: Law, own: Sequence[Tensor]) -> Sequence[Tensor]:
        p = law(joined(own)).double()
        return p.split([len(each) for each in own])

    return at_once(laws, rows, of_law)


def at_once(
    keys: Sequence[K], items: Sequence[A], work: Callable[[K, Sequence[A]], Sequence[B]]
) -> list[B]:
    """What work makes of items, those of equal keys at once; in the items' order."""
    groups: dict[K, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    found: dict[int, B] = {}
    for key, members in groups.items():
        found |= zip(members, work(key, [items[i] for i in members]), strict=True)
    return [found[i] for i in range(len(items))]


def _one(texts: Sequence[Text]) -> dict[str, Any]:
    """Session and round, which work carries where it is of one text alone."""
    if len(texts) > 1:
        return {}
    return {"session": texts[0].who[1], "round": texts[0].rounds}
