"""One process of `test_transport`: a client that asks until it is answered, over a bad line.

Run as: python remote.py PORT LEDGER COUNT. Prints the bytes that it put on and took from the
wire, counted below the ledger, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from isthmus.wire.clock import Action, Event, Send
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Delivery, Link
from isthmus.wire.message import Field, Message, Schema, encode
from isthmus.wire.transport import Received, Shaped, Socket, Transport, drive

ASK = Schema("ask", 1, {"text": Field("str", limit=4096)})
ANSWER = Schema("answer", 2, {"text": Field("str", limit=4096)})
KINDS = {1: "ask", 2: "answer"}
TOKEN = "a token of enough characters"


class Counted:
    """A transport that counts the bytes on the wire."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.sent, self.received = inner, 0, 0
        self.name, self.framing = inner.name, inner.framing

    def now(self) -> float:
        return self.inner.now()

    def send(self, party: str, data: bytes) -> Delivery:
        self.sent += len(data) + self.framing
        return self.inner.send(party, data)

    def receive(self, timeout: float | None = None) -> Received | None:
        got = self.inner.receive(timeout)
        self.received += len(got.data) + self.framing if got else 0
        return got

    def parties(self) -> list[str]:
        return self.inner.parties()

    def close(self) -> None:
        self.inner.close()


def send(to: str, schema: Schema, text: str, sequence: int, every: int) -> list[Action]:
    """A message; where `every` divides its number, a second time as a repeat."""
    message = Message(schema.kind, {"text": text}, {}, session=7, sequence=sequence)
    data = encode(message, schema, layout="compact")
    first = Send(to, schema.kind, data, len(text), session=7, sequence=sequence)
    again = Send(to, schema.kind, data, session=7, sequence=sequence, note="repeat")
    return [first] if sequence % every else [first, again]


class Client:
    """Asks `count` questions, each when the last is answered, and again what the link gave up."""

    name = "client/1"

    def __init__(self, count: int) -> None:
        self.count, self.answers, self.gone = count, 0, False

    def on(self, event: Event, now: float) -> Iterable[Action]:
        if event.kind == "answer":
            self.answers += 1
        elif event.kind == "gone":
            self.gone = True
            return []
        if self.answers == self.count:
            return []
        question = send("server", ASK, "?" * (10 + self.answers), self.answers + 1, every=3)
        return question[:1] if event.kind == "undelivered" else question


def main(port: int, path: Path, count: int) -> None:
    socket = Socket.connect("client/1", "127.0.0.1", port, token=TOKEN)
    wire = Counted(socket)
    client, ledger = Client(count), Ledger(path)
    line = Shaped(wire, Link(up=1e7, latency=1e-4, loss=0.5, seed=1, attempts=3), "up")
    drive(
        client, line, until=lambda: client.gone or client.answers == count, ledger=ledger,
        kinds=KINDS, start=[Event("go")], seconds=60.0,
    )  # fmt: skip
    ledger.close()
    line.close()
    print(json.dumps({"sent": wire.sent, "received": wire.received, "answers": client.answers}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
