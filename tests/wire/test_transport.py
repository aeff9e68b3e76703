"""Transports: two real processes with one account, faults, and frames that break the rules."""

from __future__ import annotations

import json
import os
import socket as sockets
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from tests.wire import remote

import isthmus
from isthmus.errors import InputError
from isthmus.wire.clock import Action, After, Clock, Event, Send, Work
from isthmus.wire.errors import WireError
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Delivery, Link
from isthmus.wire.message import decode
from isthmus.wire.transport import Closed, InProcess, Received, Shaped, Socket, drive
from isthmus.wire.transport.base import direct

COUNT = 11
TOKEN = remote.TOKEN


class Server:
    """Answers each question with its length; every second answer is sent twice."""

    name = "server"

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.gone = False

    def on(self, event: Event, now: float) -> Iterable[Action]:
        if event.kind != "ask":
            self.gone = event.kind == "gone"
            return []
        question = decode(event.data, remote.ASK)
        self.asked.append(question.sequence)
        text = str(len(str(question.fields["text"])))
        return [
            Work(5.0, "count"),
            *remote.send(event.sender, remote.ANSWER, text, question.sequence, every=2),
        ]


def test_two_processes_keep_one_account(tmp_path: Path) -> None:
    wire = remote.Counted(Socket.listen("server", token=TOKEN))
    ours, theirs = tmp_path / "server.jsonl", tmp_path / "client.jsonl"
    source = str(Path(isthmus.__path__[0]).parent)
    port = wire.inner.address[1]  # type: ignore[attr-defined]
    client = subprocess.Popen(
        [sys.executable, remote.__file__, str(port), str(theirs), str(COUNT)],
        env=os.environ | {"PYTHONPATH": source},
        stdout=subprocess.PIPE,
        text=True,
    )
    server, ledger = Server(), Ledger(ours)
    try:
        drive(
            server, wire, until=lambda: server.gone, ledger=ledger, kinds=remote.KINDS, seconds=120
        )
        counted = json.loads(client.communicate(timeout=60)[0])
    finally:
        client.kill()
        ledger.close()
        wire.close()

    assert server.asked == list(range(1, COUNT + 1))  # each once and in order
    assert counted["answers"] == COUNT
    assert counted["sent"] == wire.received and counted["received"] == wire.sent

    books = [Ledger.read(ours), Ledger.read(theirs)]
    merged = Ledger.merge(*books)
    on_the_wire = merged.sums("bytes", by="direction", what="crossing", note=["", "repeat"])
    assert on_the_wire == {"up": counted["sent"], "down": wire.sent}
    lost = merged.total("rows", note="lost")
    assert lost > 0
    assert merged.total("bytes") == counted["sent"] + wire.sent + merged.total("bytes", note="lost")
    # Values once for each message, however often it was sent.
    asked = sum(10 + i for i in range(COUNT))
    answered = sum(len(str(10 + i)) for i in range(COUNT))
    assert merged.sums("values", by="kind", what="crossing") == {"ask": asked, "answer": answered}
    repeats = merged.sums("rows", by=("what", "kind"), note="repeat")
    assert repeats == {("crossing", "ask"): 3, ("crossing", "answer"): 5} | {
        ("confirm", "ask"): 3, ("confirm", "answer"): 5,
    }  # fmt: skip
    assert merged.total("rows", what="confirm", kind="ask") == COUNT + 3
    assert merged.total("bytes", what="confirm") == 0
    assert merged.total("flops", what="work", sender="server") == 5.0 * COUNT
    again = Ledger.merge(books[1], merged, books[0])
    assert list(again.rows()) == list(merged.rows())


# ---------------------------------------------------------------- sockets


@pytest.fixture
def server() -> Iterator[Socket]:
    listening = Socket.listen("server", limit=1000, timeout=5.0)
    yield listening
    listening.close()


def join(server: Socket, name: str, token: str | None = None) -> Socket:
    """Connect while the server greets in another thread."""
    made: list[Socket | WireError] = []

    def connect() -> None:
        try:
            made.append(Socket.connect(name, *server.address, token=token, limit=1000, timeout=5.0))
        except WireError as error:
            made.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    refused = None
    while thread.is_alive():
        try:
            assert server.receive(0.01) is None
        except WireError as error:
            refused = error
        thread.join(0.01)
    if isinstance(made[0], WireError):
        raise made[0] from refused
    return made[0]


def test_messages_go_both_ways(server: Socket) -> None:
    a, b = join(server, "a"), join(server, "b")
    assert sorted(server.parties()) == ["a", "b"] and a.parties() == ["server"]
    sent = a.send("server", b"x" * 1000)
    assert (sent.bytes, sent.lost, sent.delivered) == (1004, 0, True)
    b.send("server", b"")
    got = [server.receive(5.0), server.receive(5.0)]
    assert {(one.sender, one.data) for one in got if one} == {("a", b"x" * 1000), ("b", b"")}
    for i in range(5):
        server.send("b", bytes([i]))
    assert [one.data[0] for one in (b.receive(5.0) for _ in range(5)) if one] == [0, 1, 2, 3, 4]
    assert a.receive(0.0) is None
    b.close()
    with pytest.raises(Closed, match="b"):
        server.receive(5.0)
    assert server.parties() == ["a"]
    with pytest.raises(WireError, match="not connected"):
        server.send("b", b"1")
    a.close()


def raw(server: Socket, name: str) -> sockets.socket:
    """A connection that has been greeted and is now in our hands."""
    friend = join(server, name)
    (peer,) = friend._peers.values()
    peer.sock.setblocking(True)
    return peer.sock


BAD_FRAMES = {
    "oversized": struct.pack(">I", 1001),
    "enormous": b"\xff\xff\xff\xff" + b"0" * 50,
    "cut": struct.pack(">I", 100) + b"0" * 99,
    "half a header": b"\x00\x00",
}


@pytest.mark.parametrize("bad", BAD_FRAMES.values(), ids=list(BAD_FRAMES))
def test_a_bad_frame_costs_one_error_and_one_connection(server: Socket, bad: bytes) -> None:
    good = join(server, "good")
    evil = raw(server, "evil")
    evil.sendall(struct.pack(">I", 2) + b"ok" + bad)
    evil.shutdown(sockets.SHUT_WR)
    assert server.receive(5.0) == ("evil", b"ok", pytest.approx(0.0, abs=60.0))
    with pytest.raises(WireError, match="evil") as error:
        server.receive(5.0)
    assert not isinstance(error.value, Closed)
    assert server.receive(0.05) is None  # and no second one
    assert server.parties() == ["good"]
    good.send("server", b"still here")
    got = server.receive(5.0)
    assert got is not None and got.data == b"still here"
    server.send("good", b"yes")
    answer = good.receive(5.0)
    assert answer is not None and answer.data == b"yes"
    evil.close()
    good.close()


GREETINGS = {
    "no json": struct.pack(">I", 3) + b"abc",
    "no name": struct.pack(">I", 2) + b"{}",
    "a list": struct.pack(">I", 2) + b"[]",
    "too long": struct.pack(">I", 5000) + b"0" * 5000,
    "deep": struct.pack(">I", 4000) + b"[" * 4000,
    "not utf-8": struct.pack(">I", 2) + b"\xff\xfe",
    "a taken name": (lambda text: struct.pack(">I", len(text)) + text)(
        b'{"name": "good", "nonce": "0", "proof": ""}'
    ),
}


@pytest.mark.parametrize("bad", GREETINGS.values(), ids=list(GREETINGS))
def test_a_bad_greeting_is_refused(server: Socket, bad: bytes) -> None:
    good = join(server, "good")
    with sockets.create_connection(server.address) as stranger:
        stranger.sendall(bad)
        with pytest.raises(WireError, match="connection"):
            server.receive(5.0)
    assert server.parties() == ["good"]
    good.send("server", b"still here")
    got = server.receive(5.0)
    assert got is not None and got.data == b"still here"
    good.close()


def test_a_token_is_asked_for_and_never_crosses() -> None:
    server = Socket.listen("server", token=TOKEN, timeout=5.0)
    for token in (None, "", TOKEN + "!"):
        with pytest.raises(WireError, match="no greeting"):
            join(server, "client", token)
    assert server.parties() == []
    client = join(server, "client", TOKEN)
    client.send("server", b"hello")
    got = server.receive(5.0)
    assert got is not None and got[:2] == ("client", b"hello")
    client.close()
    server.close()


def test_a_listener_that_does_not_know_the_token_is_left() -> None:
    """It cannot check the proof, so it accepts; the client sees that it gives none back."""
    result: list[str] = []

    def connect() -> None:
        with pytest.raises(WireError) as error:
            Socket.connect("client", *address, token=TOKEN, timeout=5.0)
        result.append(str(error.value))

    listener = sockets.create_server(("127.0.0.1", 0))
    address = listener.getsockname()[:2]
    thread = threading.Thread(target=connect)
    thread.start()
    conn, _ = listener.accept()
    for reply in ({"nonce": "1"}, {"name": "server", "proof": "0" * 64}):
        text = json.dumps(reply).encode()
        conn.sendall(struct.pack(">I", len(text)) + text)
    thread.join(10)
    assert TOKEN.encode() not in conn.recv(4096)
    conn.close()
    listener.close()
    assert "does not know the token" in result[0]


def test_only_the_loopback_needs_no_token() -> None:
    for host in ("0.0.0.0", "", "::", "192.0.2.1", "example.org"):
        for token in (None, "short"):
            with pytest.raises(InputError, match="token"):
                Socket.listen("server", host, token=token)
    Socket.listen("server", "localhost").close()


def test_bad_settings_are_refused(server: Socket) -> None:
    with pytest.raises(InputError, match="party"):
        Socket.listen("")
    with pytest.raises(InputError, match="limit"):
        Socket.listen("a", limit=2**32)
    client = join(server, "client")
    with pytest.raises(WireError, match="at most 1000"):
        client.send("server", b"0" * 1001)
    client.send("server", b"1")
    got = server.receive(5.0)
    assert got is not None and got.data == b"1"
    client.close()


def test_nobody_there() -> None:
    free = sockets.create_server(("127.0.0.1", 0))
    address = free.getsockname()[:2]
    free.close()
    with pytest.raises(WireError, match="cannot be reached"):
        Socket.connect("client", *address)


def test_two_who_send_large_messages_at_once_do_not_block() -> None:
    """Both sides send 8 MB before either receives: more than both kernel buffers hold."""
    size = 8 << 20
    server = Socket.listen("server", timeout=60.0)
    client = join(server, "client")
    client.limit = server.limit = 1 << 26
    client.timeout = 60.0
    down: list[Received | None] = []

    def talk() -> None:
        client.send("server", b"c" * size)
        down.append(client.receive(60.0))

    thread = threading.Thread(target=talk)
    thread.start()
    server.send("client", b"s" * size)
    up = server.receive(60.0)
    thread.join(60)
    assert up is not None and up.data == b"c" * size
    assert down and down[0] is not None and down[0].data == b"s" * size
    client.close()
    server.close()


def test_a_receiver_that_stops_reading_is_dropped() -> None:
    server = Socket.listen("server", timeout=0.5)
    stuck = join(server, "stuck")  # it never calls receive again
    with pytest.raises(WireError, match="stuck"):
        for _ in range(64):
            server.send("stuck", b"0" * (1 << 20))
    assert server.parties() == []
    assert server.receive(0.0) is None
    stuck.close()
    server.close()


# ---------------------------------------------------------------- in process, shaped, driven


class Line:
    """An inner transport on a clock of its own: waiting moves it, sending notes the time."""

    name, framing = "a", 4

    def __init__(self) -> None:
        self.time, self.sent = 0.0, list[tuple[float, str, bytes]]()

    def now(self) -> float:
        return self.time

    def send(self, party: str, data: bytes) -> Delivery:
        self.sent.append((self.time, party, data))
        return direct(len(data), self.time, self.time)

    def receive(self, timeout: float | None = None) -> Received | None:
        assert timeout is not None, "nothing would ever arrive"
        self.time += timeout
        return None

    def parties(self) -> list[str]:
        return ["b"]

    def close(self) -> None: ...


def test_a_shaped_message_leaves_when_the_link_delivers_it() -> None:
    line = Line()
    shaped = Shaped(line, Link(up=80.0, latency=0.25), "up")
    assert shaped.send("b", b"0" * 16).done == 2.25  # 16 + 4 bytes of framing
    assert shaped.send("b", b"1" * 6).done == 3.25
    assert line.sent == [] and shaped.receive(2.0) is None and line.sent == []
    assert shaped.receive(1.0) is None and line.sent == [(2.25, "b", b"0" * 16)]
    assert line.time == 3.0
    shaped.receive(10.0)
    assert line.sent[1] == (3.25, "b", b"1" * 6) and line.time == 13.0


def test_a_shaped_message_that_is_given_up_never_leaves() -> None:
    line = Line()
    shaped = Shaped(line, Link(up=80.0, loss=0.5, seed=2, attempts=1), "up")
    got = [shaped.send("b", bytes([i])).delivered for i in range(40)]
    shaped.receive(1000.0)
    assert [data[0] for *_, data in line.sent] == [i for i in range(40) if got[i]]
    assert 5 < sum(got) < 35


def test_parties_of_one_process() -> None:
    hub: dict = {}
    a, b = InProcess("a", hub), InProcess("b", hub)
    with pytest.raises(InputError, match="party"):
        InProcess("a", hub)
    assert a.receive(0.0) is None
    a.send("b", b"1")
    a.send("b", b"2")
    assert [b.receive(1.0), b.receive()] == [("a", b"1", 0.0), ("a", b"2", 0.0)]
    a.close()
    with pytest.raises(Closed, match="a"):
        b.receive(1.0)
    assert b.parties() == []
    with pytest.raises(WireError, match="not connected"):
        b.send("a", b"3")


def run_pair(count: int) -> tuple[Ledger, Server]:
    """The same two parties as in the test of two processes, in two threads."""
    hub: dict = {}
    line, wire = InProcess("client/1", hub), InProcess("server", hub)
    client, server, books = remote.Client(count), Server(), [Ledger(), Ledger()]
    thread = threading.Thread(
        target=lambda: drive(
            server, wire, until=lambda: server.gone, ledger=books[0], kinds=remote.KINDS, seconds=60
        )
    )
    thread.start()
    drive(
        client, line, until=lambda: client.answers == count, ledger=books[1], kinds=remote.KINDS,
        start=[Event("go")], seconds=60,
    )  # fmt: skip
    line.close()
    thread.join(60)
    return Ledger.merge(*books), server


def test_the_same_parties_on_the_clock_and_on_a_transport() -> None:
    real, server = run_pair(5)
    virtual, clock_server = Ledger(), Server()
    clock = Clock(virtual)
    client = remote.Client(5)
    clock.join(client)
    clock.join(clock_server)
    clock.connect("client/1", "server", Link(latency=0.01))
    clock.at(0.0, client, Event("go"))
    clock.run()
    assert server.asked == clock_server.asked == [1, 2, 3, 4, 5]
    by = ("kind", "direction", "session", "sequence", "note")
    for quantity in ("bytes", "values", "rows"):
        expected = virtual.sums(quantity, by, what="crossing")
        assert real.sums(quantity, by, what="crossing") == expected
    assert virtual.sums("rows", "note", kind=["ask", "answer"]) == {"": 10, "repeat": 3}
    assert virtual.total("flops") == real.total("flops") == 25.0


class Fragile:
    """Notes the kinds that it hears; sends to nobody when told to."""

    name = "fragile"

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def on(self, event: Event, now: float) -> Iterable[Action]:
        self.heard.append((event.kind, event.sender))
        if event.kind == "go":
            return [Send("nobody", "hello", b"1", sequence=3), After(0.0, Event("timer"))]
        return []


def test_faults_become_events() -> None:
    hub: dict = {}
    inner, other = InProcess("fragile", hub), InProcess("other", hub)
    other.send("fragile", b"no message at all")
    other.close()
    party, ledger = Fragile(), Ledger()
    drive(
        party, inner, until=lambda: len(party.heard) == 5, ledger=ledger, start=[Event("go")],
        seconds=30.0,
    )  # fmt: skip
    assert sorted(party.heard) == [
        ("go", ""), ("gone", "nobody"), ("gone", "other"), ("malformed", "other"), ("timer", ""),
    ]  # fmt: skip
    assert len(ledger) == 0
