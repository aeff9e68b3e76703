"""Where texts in threads of their own meet, so that what they want is computed in one forward.

One text runs at a time. When it wants a number of a model it steps aside, and only when all
others have as well is anything computed: all that is asked of one engine, the one whose turn is
longest ago. So texts that began at different times fall into step, and the same plain code
serves one text and many.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from isthmus.inference.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Meeting:
    """The turn of the threads that take part, and who of them waits for which engine."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._door = threading.Lock()
        self._coming = 0  # threads on their way in, counted before they have the turn
        self._running = 0
        self._computed = 0
        self._engines: list[Shared] = []

    def engine(self, model: PreTrainedModel) -> Shared:
        """An engine whose numbers are computed together."""
        self._engines.append(Shared(model, self))
        return self._engines[-1]

    @contextmanager
    def part(self) -> Generator[None]:
        """Take part: what stands inside runs only while no other thread's does. Slots of the
        engines that it opened are closed at its end, however it ends."""
        with self._door:
            self._coming += 1
        with self._turn:
            with self._door:
                self._coming -= 1
            self._running += 1
            try:
                yield
            finally:
                try:
                    for engine in self._engines:
                        engine.close_mine()
                finally:
                    self._running -= 1
                    self._turn.notify_all()

    def wait(self, engine: Shared) -> None:
        """Step aside until what was asked of `engine` is computed."""
        before = engine.computed
        engine.waiting += 1
        self._running -= 1
        self._turn.notify_all()
        while engine.computed == before:
            if self._running or self._coming:
                self._turn.wait()
                continue
            wanted = [one for one in self._engines if one.waiting]
            first = min(wanted, key=lambda one: one.computed)
            self._computed += 1
            first.computed, self._running, first.waiting = self._computed, first.waiting, 0
            first.compute_now()
            self._turn.notify_all()


class Shared(Engine):
    """An engine that computes when everybody waits; used inside `Meeting.part`."""

    def __init__(self, model: PreTrainedModel, meeting: Meeting) -> None:
        super().__init__(model)
        self.meeting = meeting
        self.waiting = self.computed = 0
        self._mine: defaultdict[int, set[int]] = defaultdict(set)

    def open(self) -> int:
        """A slot for a new text."""
        slot = super().open()
        self._mine[threading.get_ident()].add(slot)
        return slot

    def close(self, slot: int) -> None:
        """Give a slot back."""
        super().close(slot)
        self._mine[threading.get_ident()].discard(slot)

    def close_mine(self) -> None:
        """Close the slots that this thread has opened."""
        for slot in list(self._mine.pop(threading.get_ident(), ())):
            super().close(slot)

    def compute(self) -> None:
        """Wait for the others, and have everything computed that was asked."""
        self.meeting.wait(self)

    def compute_now(self) -> None:
        """Compute everything that was asked; what fails, fails for all who asked."""
        asked = list(self._asked)
        try:
            super().compute()
        except Exception as error:
            self._asked.clear()
            for one in asked:
                if not one.pending.done:
                    one.pending.settle(error=error)
