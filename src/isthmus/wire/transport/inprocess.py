"""Parties in one process, each perhaps in its own thread."""

from __future__ import annotations

import queue
import time

from isthmus.errors import InputError
from isthmus.wire.errors import WireError
from isthmus.wire.link import Delivery
from isthmus.wire.transport.base import Closed, Received, direct

Hub = dict[str, "queue.SimpleQueue[Received | str]"]


class InProcess:
    """One party's end of a hub, a plain dict that all of them are given.

    >>> hub: Hub = {}
    >>> a, b = InProcess("a", hub), InProcess("b", hub)
    >>> a.send("b", b"hello").bytes, b.receive(0.0).data
    (5, b'hello')
    """

    framing = 0

    def __init__(self, name: str, hub: Hub) -> None:
        if name in hub:
            raise InputError("party", name, "a name not yet in the hub")
        self.name, self._hub = name, hub
        self._origin = time.monotonic()
        self._inbox = hub[name] = queue.SimpleQueue()

    def now(self) -> float:
        """Seconds since this end was made."""
        return time.monotonic() - self._origin

    def send(self, party: str, data: bytes) -> Delivery:
        """Put a message into a party's inbox; `WireError` when it is not in the hub."""
        sent = self.now()
        inbox = self._hub.get(party)
        if inbox is None:
            raise WireError(party, "is not connected")
        inbox.put(Received(self.name, bytes(data)))
        return direct(len(data), sent, self.now())

    def receive(self, timeout: float | None = None) -> Received | None:
        """The next message, or None after `timeout` seconds; `Closed` when a party has left."""
        try:
            got = self._inbox.get(timeout=timeout) if timeout else self._take(timeout)
        except queue.Empty:
            return None
        if isinstance(got, str):
            raise Closed(got, "left")
        return got

    def _take(self, timeout: float | None) -> Received | str:
        return self._inbox.get() if timeout is None else self._inbox.get_nowait()

    def parties(self) -> list[str]:
        """The other parties of the hub."""
        return [name for name in self._hub if name != self.name]

    def close(self) -> None:
        """Leave the hub and tell the others."""
        if self._hub.pop(self.name, None) is not None:
            for inbox in self._hub.values():
                inbox.put(self.name)
