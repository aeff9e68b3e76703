"""The event queue: order, what parties do, and stopping and going on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import InputError
from isthmus.wire.clock import Action, After, Clock, Event, Send, Work
from isthmus.wire.device import Device, Power, Profile, Tier
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Energy, Link

BOX = Profile("box", {"float32": 100.0}, {"ram": Tier(1e9, 1e9)}, Power(1.0, 3.0, 0.0))


class Log:
    """A party that keeps what it is told, and answers by a table of event kinds."""

    def __init__(self, name: str, answers: dict[str, list[Action]] | None = None) -> None:
        self.name, self.answers = name, answers or {}
        self.heard: list[tuple[float, str, str, bytes]] = []

    def on(self, event: Event, now: float) -> Iterable[Action]:
        self.heard.append((now, event.kind, event.sender, event.data))
        return self.answers.get(event.kind, [])


@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0]), max_size=20))
def test_ties_go_in_the_order_of_scheduling(times: list[float]) -> None:
    clock, log = Clock(), Log("a")
    clock.join(log)
    for i, time in enumerate(times):
        clock.at(time, log, Event(str(i)))
    assert clock.run() == len(times)
    expected = sorted(range(len(times)), key=lambda i: (times[i], i))
    assert [(time, kind) for time, kind, *_ in log.heard] == [(times[i], str(i)) for i in expected]


def test_what_is_scheduled_now_comes_after_what_waits_for_now() -> None:
    clock, log = Clock(), Log("a", {"first": [After(0.0, Event("third"))]})
    clock.join(log)
    clock.at(1.0, "a", Event("first"))
    clock.at(1.0, "a", Event("second"))
    clock.run()
    assert [kind for _, kind, *_ in log.heard] == ["first", "second", "third"]


def test_run_stops_at_a_time_or_a_number() -> None:
    clock, log = Clock(), Log("a", {"tick": [After(1.0, Event("tick"))]})
    clock.join(log)
    clock.at(0.0, "a", Event("tick"))
    assert (clock.run(until=2.5), clock.now, clock.next()) == (3, 2.5, 3.0)
    assert (clock.run(most=2), clock.now) == (2, 4.0)
    with pytest.raises(InputError, match="time"):
        clock.at(3.9, "a", Event("past"))
    with pytest.raises(InputError, match="party"):
        clock.at(9.0, "b", Event("stranger"))


def test_work_then_message_then_answer() -> None:
    """Device: 200 flops at 100 flop/s, 3 W. Link: 1000 B at 8 kb/s up, 40 B at 32 kb/s down."""
    ledger = Ledger()
    clock = Clock(ledger)
    draft = [
        Work(200.0, "draft", round=4),
        Send("server", "draft", b"x" * 1000, values=900, round=4),
    ]
    client = Log("client/1", {"go": draft})
    server = Log("server", {"draft": [Send("client/1", "verdict", b"y" * 40, values=8)]})
    clock.join(client, Device(BOX))
    clock.join(server)
    clock.connect("client/1", "server", Link(up=8e3, down=32e3, latency=0.5, energy=Energy(2.0)))
    clock.at(1.0, client, Event("go"))
    clock.run()
    assert server.heard == [(4.5, "draft", "client/1", b"x" * 1000)]
    assert client.heard[1:] == [(pytest.approx(5.01), "verdict", "server", b"y" * 40)]
    work, up, _ = ledger.rows()
    assert (work["what"], work["t"], work["seconds"], work["joules"]) == ("work", 1.0, 2.0, 6.0)
    assert (work["flops"], work["round"], work["from"]) == (200.0, 4, "client/1")
    assert (up["t"], up["seconds"], up["joules"], up["bytes"], up["values"]) == (
        3.0, 1.5, 2.0, 1000, 900,
    )  # fmt: skip
    assert ledger.sums("bytes", by=("kind", "direction"), what="crossing") == {
        ("draft", "up"): 1000,
        ("verdict", "down"): 40,
    }


def test_a_device_does_one_thing_at_a_time() -> None:
    clock = Clock(Ledger())
    log = Log("a", {"go": [Work(100.0), After(0.0, Event("done"))]})
    clock.join(log, Device(BOX))
    for time in (0.0, 0.25, 5.0):
        clock.at(time, "a", Event("go"))
    clock.run()
    assert [time for time, kind, *_ in log.heard if kind == "done"] == [1.0, 2.0, 6.0]


def test_a_link_is_free_while_a_party_still_works() -> None:
    """a works until 10 and then sends; b's message at 1 must not wait behind it."""
    clock = Clock()
    server = Log("server")
    clock.join(Log("a", {"go": [Work(1000.0), Send("server", "late", b"1" * 10)]}), Device(BOX))
    clock.join(Log("b", {"go": [Send("server", "soon", b"2" * 10)]}))
    clock.join(server)
    shared = Link(up=80.0)
    clock.connect("a", "server", shared)
    clock.connect("b", "server", shared)
    clock.at(0.0, "a", Event("go"))
    clock.at(1.0, "b", Event("go"))
    clock.run()
    assert [(time, kind) for time, kind, *_ in server.heard] == [(2.0, "soon"), (11.0, "late")]


def test_two_senders_share_one_link() -> None:
    clock, server = Clock(), Log("server")
    clock.join(server)
    shared = Link(up=80.0, latency=0.25)
    for name in ("a", "b", "c"):
        clock.join(Log(name, {"go": [Send("server", name, b"0" * 10)]}))
        clock.connect(name, "server", shared)
        clock.at(0.5, name, Event("go"))
    clock.run()
    assert [(t, kind) for t, kind, *_ in server.heard] == [(1.75, "a"), (2.75, "b"), (3.75, "c")]


def test_what_is_given_up_comes_back() -> None:
    ledger = Ledger()
    clock, server = Clock(ledger), Log("server")
    client = Log("client", {"go": [Send("server", "hello", b"12345", session=3, sequence=8)]})
    clock.join(client)
    clock.join(server)
    clock.connect("client", "server", Link(loss=1 - 1e-12, attempts=3, latency=1.0, up=40.0))
    clock.at(0.0, "client", Event("go"))
    clock.run()
    assert server.heard == []
    assert client.heard[1][:3] == (9.0, "undelivered", "server")
    assert ledger.sums("bytes", by=("note", "session", "sequence")) == {("lost", 3, 8): 15}


@pytest.mark.parametrize("seed", range(6))
def test_a_repeat_arrives_only_when_none_before_it_did(seed: int) -> None:
    ledger = Ledger()
    clock, server = Clock(ledger), Log("server")
    first = Send("server", "hello", b"1", session=1, sequence=4)
    again = replace(first, note="repeat")
    clock.join(Log("a", {"go": [first, again, again, again]}))
    clock.join(server)
    clock.connect("a", "server", Link(loss=0.5, seed=seed, attempts=1))
    clock.at(0.0, "a", Event("go"))
    clock.run()
    arrived = [row["note"] != "lost" for row in ledger.rows()]
    assert len(arrived) == 4 and 0 < sum(arrived) < 4
    assert len(server.heard) == 1


@pytest.mark.parametrize("change", [{"note": ""}, {"sequence": 0}, {"kind": "other"}])
def test_what_is_not_a_repeat_arrives_each_time(change: dict) -> None:
    clock, server = Clock(), Log("server")
    first = Send("server", "hello", b"1", sequence=4)
    again = replace(first, **{"note": "repeat"} | change)
    clock.join(Log("a", {"go": [first, again] if "sequence" not in change else [again, again]}))
    clock.join(server)
    clock.connect("a", "server", Link())
    clock.at(0.0, "a", Event("go"))
    clock.run()
    assert len(server.heard) == 2


def test_strangers_are_not_sent_to() -> None:
    clock = Clock()
    clock.join(Log("a", {"go": [Send("b", "hello", b"")]}))
    clock.at(0.0, "a", Event("go"))
    with pytest.raises(InputError, match="a to b"):
        clock.run()


class Chatter:
    """Two of them never stop: each answers with its count after some work and a pause."""

    def __init__(self, name: str, other: str) -> None:
        self.name, self.other, self.count = name, other, 0

    def on(self, event: Event, now: float) -> Iterable[Action]:
        self.count += 1
        text = (
            f"{self.name} {self.count} {event.data.decode()[:20]} {event.fields.get('n')}".encode()
        )
        if event.kind == "pause":
            return [Work(10.0 * self.count), Send(self.other, "talk", text, sequence=self.count)]
        return [After(0.1 * self.count, Event("pause", data=text, fields={"n": self.count}))]


def chat(ledger: Ledger) -> tuple[Clock, list[Chatter]]:
    clock = Clock(ledger)
    parties = [Chatter("client", "server"), Chatter("server", "client")]
    for party in parties:
        clock.join(party, Device(BOX))
    link = Link(up=800.0, down=2000.0, latency=0.3, per_message=0.01, loss=0.4, seed=5)
    clock.connect("client", "server", link)
    return clock, parties


@pytest.mark.parametrize("stop", [1, 2, 7, 8, 9, 20])
def test_a_restored_clock_goes_on_to_the_same_bits(stop: int) -> None:
    whole, first, rest = Ledger(), Ledger(), Ledger()
    clock, _ = chat(whole)
    clock.at(0.0, "client", Event("talk"))
    clock.at(0.0, "client", Event("talk", data=b"\xc3\xbc"))
    clock.run(most=40)

    clock, before = chat(first)
    clock.at(0.0, "client", Event("talk"))
    clock.at(0.0, "client", Event("talk", data=b"\xc3\xbc"))
    clock.run(most=stop)
    kept = json.loads(json.dumps(clock.state()))

    clock, after = chat(rest)
    clock.restore(kept)
    for old, new in zip(before, after, strict=True):
        new.count = old.count
    clock.run(most=40 - stop)
    rows = [row | {"id": 0} for book in (first, rest) for row in book.rows()]
    assert rows == [row | {"id": 0} for row in whole.rows()]
    assert {"lost", ""} == set(whole.sums("rows", by="note"))
