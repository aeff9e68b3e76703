"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

WINDOW = 8
"""How many ids before a text are looked at, to see whether it begins with a space."""


class Span(NamedTuple):
    """A piece of text and who produced it."""

    text: str
    origin: str


class Spelling:
    """Spells ids out one by one; the bytes of a character wait until the last of them is there.

    `decode` turns ids into text; `after` are the ids that the text continues. What `add` gave and
    then `rest`, joined, is what the ids add to the decoded text of those before them, but only a
    window of them is decoded at a time.

    >>> parts = {1: b"caf", 2: bytes([0xC3]), 3: bytes([0xA9])}
    >>> spelling = Spelling(lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace"))
    >>> [spelling.add(1), spelling.add(2), spelling.add(3), spelling.rest()]
    ['caf', '', 'é', '']
    """

    def __init__(self, decode: Callable[[list[int]], str], after: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(after[-WINDOW:])
        self._told = len(self._window)  # ids of the window that are told already

    def add(self, id: int) -> str:
        """What can be told now that `id` has come."""
        self._window.append(id)
        # Some decoders drop the space before a text's first word: the ids told last stay in the
        # window, so that this happens to both sides of the difference.
        text, before = self._decode(self._window), self._before()
        if text.endswith("\ufffd"):
            return ""
        del self._window[: self._told]
        self._told = len(self._window)
        return text[len(before) :]

    def rest(self) -> str:
        """What is left at the end of the text, its broken characters as U+FFFD."""
        return self._decode(self._window)[len(self._before()) :]

    def _before(self) -> str:
        return self._decode(self._window[: self._told])


class Until:
    """Lets spans through until a stop string is complete; neither it nor what follows is told.

    The end of a text that may be the beginning of a stop string is held back. Of several stop
    strings the one that is complete first counts (of two at once the longer), so what is told
    does not depend on how the text is cut into spans.

    >>> until = Until(["end"])
    >>> until.add(Span("the e", "a")), until.add(Span("n", "b")), until.stopped
    ([Span(text='the ', origin='a')], [], False)
    >>> until.add(Span("d of", "c")), until.stopped
    ([], True)
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stops = tuple(stops)
        self._held: list[Span] = []

    def add(self, span: Span) -> list[Span]:
        """The spans that can be told now."""
        if self.stopped or not span.text:
            return []
        self._held.append(span)
        text = "".join(one.text for one in self._held)
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(text) - self._beginning(text))

    def rest(self) -> list[Span]:
        """What was held back, once the text has ended without a stop string."""
        return [] if self.stopped else self._release(sum(len(one.text) for one in self._held))

    def _beginning(self, text: str) -> int:
        """The length of the longest end of `text` that begins, but is not, a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, count: int) -> list[Span]:
        told: list[Span] = []
        while count:
            text, origin = self._held.pop(0)
            if len(text) > count:
                self._held.insert(0, Span(text[count:], origin))
            told.append(Span(text[:count], origin))
            count -= len(told[-1].text)
        return told
