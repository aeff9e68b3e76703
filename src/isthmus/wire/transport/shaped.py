"""A link's delay and losses between real parties."""

from __future__ import annotations

import heapq
import math

from isthmus.wire.link import Delivery, Direction, Link
from isthmus.wire.transport.base import Received, Transport


class Shaped:
    """A transport whose messages leave when the link would have delivered them.

    Lost transmissions cost their time and are in the `Delivery`; a message that the link gives
    up is never sent. Messages leave while `receive` waits, so a party that only sends calls it
    too (`receive(0)`).
    """

    def __init__(self, inner: Transport, link: Link, direction: Direction) -> None:
        self.name, self.framing = inner.name, inner.framing
        self._inner, self._link = inner, link
        self._direction: Direction = direction
        self._due: list[tuple[float, int, str, bytes]] = []
        self._count = 0

    def now(self) -> float:
        """The inner transport's clock."""
        return self._inner.now()

    def send(self, party: str, data: bytes) -> Delivery:
        """Hand a message to the link: what it will have cost once it arrives."""
        size = len(data) + self.framing
        delivery = self._link.send(size, self._direction, self.now())
        if delivery.delivered:
            heapq.heappush(self._due, (delivery.done, self._count, party, bytes(data)))
            self._count += 1
        return delivery

    def receive(self, timeout: float | None = None) -> Received | None:
        """As the inner transport's, while messages that are due leave."""
        deadline = math.inf if timeout is None else self.now() + timeout
        while True:
            while self._due and self._due[0][0] <= self.now():
                _, _, party, data = heapq.heappop(self._due)
                self._inner.send(party, data)
            until = min(deadline, self._due[0][0] if self._due else math.inf)
            got = self._inner.receive(None if until == math.inf else max(until - self.now(), 0.0))
            if got is not None or (self.now() >= deadline):
                return got

    def parties(self) -> list[str]:
        """Those of the inner transport."""
        return self._inner.parties()

    def close(self) -> None:
        """Leave; messages still on the link are lost."""
        self._inner.close()
