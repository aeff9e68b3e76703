"""Texts on demand: each a session on a clock and a link of its own, all on the same two models.

What a text cost is what its own ledger says: bytes as they were encoded and sent, seconds of its
own virtual clock, joules as its devices' profiles have them. The forwards behind it are shared
with whatever else is in the making (`isthmus.inference.server.meeting`), so a text is that of
its seed up to the rounding of a batched matrix product.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import Any

from isthmus import catalogue
from isthmus.errors import InputError, unknown
from isthmus.inference.messages import fingerprint
from isthmus.inference.method import Method, method_of
from isthmus.inference.server.meeting import Meeting
from isthmus.inference.server.metrics import Metrics
from isthmus.inference.server.text import Ask, Figures, Piece, Text
from isthmus.inference.session import Fallback
from isthmus.models.language import Language
from isthmus.wire.link import PROFILES, Link


class Busy(Exception):
    """Too many texts wait to begin."""


class Service:
    """Serves `target` with the help of `draft` until `close`.

    `method`, `settings`, `link`: of texts that do not name theirs. `device` and `edge` are the
    profiles that drafting and judging are declared to run on. `at_once` texts are in the making,
    `waiting` more may wait. Raises `InputError` for names and models that do not go together.
    """

    def __init__(
        self,
        target: Language,
        draft: Language | None = None,
        *,
        name: str = "",
        method: str = "dssd",
        settings: Mapping[str, Any] | None = None,
        link: str = "wifi",
        device: str = "phone",
        edge: str = "edge-server",
        fallback: Fallback = "none",
        at_once: int = 16,
        waiting: int = 64,
    ) -> None:
        for word, count, least in (("at_once", at_once, 1), ("waiting", waiting, 0)):
            if count < least:
                raise InputError(word, count, f"{least} or more")
        if fallback == "device" and draft is None:
            raise InputError("fallback", "device", "none, without a draft")
        self.language, self.draft, self.name = target, draft, name or target.name
        self.link, self.device, self.edge = link, device, edge
        self.settings = dict(settings or {})
        self.fallback: Fallback = fallback
        self.created = int(time.time())
        self.metrics, self.meeting = Metrics(), Meeting()
        self.drafting = self.meeting.engine(draft.model) if draft is not None else None
        self.judging = self.meeting.engine(target.model)
        self.vocab, self.context = self.judging.vocab, self.judging.context
        self.fingerprint = fingerprint(target.tokenizer, self.vocab)
        if draft is not None and self.drafting is not None:
            self.context = min(self.context, self.drafting.context)
            if fingerprint(draft.tokenizer, self.drafting.vocab) != self.fingerprint:
                raise InputError("draft", draft.name, f"one with the tokenizer of {target.name}")
        self.methods = _served(method, able=draft is not None)
        self.method = next(iter(self.methods))
        self.links = tuple(dict.fromkeys([link, *PROFILES]))
        self.spell = threading.Lock()  # a tokenizer is not made for several threads
        Text(self, Ask((0,)), *self._placed(Ask((0,))), lambda piece: None)  # all goes together
        self._limit = at_once + waiting
        self._door = threading.Lock()
        self._texts: set[Text] = set()
        self._waiting = 0
        self._closed = False
        self._queue: queue.SimpleQueue[Text | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(at_once)]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether texts can be asked for."""
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def gauges(self) -> dict[str, float]:
        """What is now: texts in the making and waiting, and the acceptance so far."""
        with self._door:
            now: dict[str, float] = {
                "isthmus_sessions_active": len(self._texts) - self._waiting,
                "isthmus_sessions_waiting": self._waiting,
            }
        judged = self.metrics.total("isthmus_judged_tokens_total")
        if judged:
            accepted = self.metrics.total("isthmus_accepted_tokens_total")
            now["isthmus_acceptance_ratio"] = accepted / judged
        return now

    def start(self, ask: Ask, listen: Callable[[Piece], object]) -> Text:
        """Begin a text as soon as there is room.

        `listen` hears its pieces, of which exactly the last has a `finish`. Raises `InputError`
        for what cannot be decoded, `Busy` when too many wait already or the service is closed.
        """
        text = Text(self, ask, *self._placed(ask), listen)
        with self._door:
            if self._closed:
                raise Busy("the server is closing")
            if len(self._texts) >= self._limit:
                raise Busy(f"{self._limit} texts are asked for already; try again later")
            self._texts.add(text)
            self._waiting += 1
            self._queue.put(text)
        return text

    def close(self) -> None:
        """End every text, and take no more."""
        with self._door:
            self._closed = True
            for text in self._texts:
                text.cancel()
            for _ in self._threads:
                self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _placed(self, ask: Ask) -> tuple[Method, str]:
        """The method and the link of a text: only those that are offered by name."""
        wanted = ask.method or self.method
        names = {catalogue.key(name): name for name in self.methods}
        if catalogue.key(wanted) not in names:
            raise unknown("method", wanted, self.methods)
        name = names[catalogue.key(wanted)]
        link = ask.link or self.link
        if link not in self.links:
            raise unknown("link", link, self.links)
        Link.parse(link)
        settings = ask.settings or (self.settings if name == self.method else {})
        return method_of(self.methods[name], self.vocab, settings), link

    def _work(self) -> None:
        """What each thread does: one text after the other."""
        while self._made():
            pass

    def _made(self) -> bool:
        """Make the next text; False when there is none to come."""
        text = self._queue.get()
        if text is None:
            return False
        with self._door:
            self._waiting -= 1
        with closing(text.pieces()) as pieces:
            self._tell(text, pieces)
        return True

    def _tell(self, text: Text, pieces: Iterable[Piece]) -> None:
        """Count pieces, and hand them to who asked for them as long as anybody listens."""
        before = Figures()
        for piece in pieces:
            self.metrics.add_figures(before, piece.figures, piece.origin)
            before = piece.figures
            if piece.finish:
                self.metrics.add("isthmus_texts_total", finish=piece.finish)
                with self._door:
                    self._texts.discard(text)
            try:
                text.listen(piece)
            except Exception:  # whoever listened is gone, and so is what it listened with
                text.cancel()


def _served(method: str, able: bool) -> dict[str, type[Method]]:
    """The methods that can be served, `method` first; without a draft model, those that need
    none. Raises `InputError` when `method` is not among them."""
    first = catalogue.find("serving", method)
    kinds = {str(first.catalogue_name): first}
    kinds |= {name: catalogue.find("serving", name) for name in catalogue.names("serving")}
    kinds = {name: kind for name, kind in kinds.items() if able or (kind.edge and not kind.drafts)}
    if first.catalogue_name not in kinds:
        raise InputError("method", method, f"{', '.join(kinds)}, without a draft")
    return kinds
