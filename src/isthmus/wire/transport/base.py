"""What every transport offers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from isthmus.wire.errors import WireError
from isthmus.wire.link import Attempts, Delivery


class Closed(WireError):
    """A party left, between two messages; `field` is its name."""


class Received(NamedTuple):
    """One message: who sent it, its bytes, and the seconds from its first byte to its last."""

    sender: str
    data: bytes
    seconds: float = 0.0


class Transport(Protocol):
    """Bytes to a party by name, and from any party.

    `framing` is what the transport adds to each message in bytes; it is in `Delivery.bytes`.
    """

    name: str
    framing: int

    def now(self) -> float:
        """Seconds on this transport's own clock."""
        ...

    def send(self, party: str, data: bytes) -> Delivery:
        """Send one message. Raises `WireError` when the party is not there or does not take it."""
        ...

    def receive(self, timeout: float | None = None) -> Received | None:
        """The next message; None after `timeout` seconds (None: wait for ever).

        Raises `WireError`, once for each, when a connection broke the rules and was closed
        (`Closed` when its party left); the others are as they were: call again.
        """
        ...

    def parties(self) -> list[str]:
        """Who can be sent to now."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


def direct(bytes: int, sent: float, done: float) -> Delivery:
    """The delivery of one message that was handed over at `sent` and taken at `done`."""
    took = done - sent
    attempts = Attempts([0], [sent], [took], [0.0], [False])
    return Delivery(sent, done, took, bytes, 0.0, 0, True, attempts)
