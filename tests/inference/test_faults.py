"""Parties that die, lines that lose and repeat, messages that are none: never a wrong token."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from tests.inference import tiny
from tests.inference.tiny import Stage, Unruly

from isthmus import seeds
from isthmus.inference.edge import Limits
from isthmus.inference.messages import CLOSE, OPEN, OPENED, REFUSED, same
from isthmus.inference.method import Costs, method_of
from isthmus.inference.session import Session
from isthmus.inference.together import decode
from isthmus.models import decode as plain
from isthmus.models.decode import Law
from isthmus.wire.clock import Action, After, Clock, Event, Party, Send
from isthmus.wire.device import Device, Power, Profile, Tier
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link
from isthmus.wire.message import Field, Message, Schema, encode, peek
from isthmus.wire.message import decode as read

SPLIT = ["full-row", "tk-slt", "dssd"]
EDGED = [*SPLIT, "cloud-only"]
KEY = seeds.keys(seeds.key(0), [0])[0].item()


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    target = tiny.fresh()
    return target, tiny.near(target)


class Mortal:
    """A party that dies after so many messages, heard or sent."""

    def __init__(self, party: Party, lives: int) -> None:
        self.party, self.name, self.lives = party, party.name, lives

    def on(self, event: Event, now: float) -> Iterable[Action]:
        self.lives -= bool(event.data)
        if self.lives < 0:
            return
        for action in self.party.on(event, now):
            self.lives -= isinstance(action, Send)
            if self.lives < 0:
                return
            yield action


class Tap:
    """A party whose messages are kept."""

    def __init__(self, party: Party, seen: list[bytes]) -> None:
        self.party, self.name, self.seen = party, party.name, seen

    def on(self, event: Event, now: float) -> Iterable[Action]:
        if (event.data and event.kind == "offer") or event.kind in ("open", "close"):
            self.seen.append(event.data)
        return self.party.on(event, now)


class Liar:
    """A party that says every fifth thing wrong."""

    def __init__(self, party: Party, rng: Any) -> None:
        self.party, self.name, self.rng = party, party.name, rng

    def on(self, event: Event, now: float) -> Iterable[Action]:
        for action in self.party.on(event, now):
            if isinstance(action, Send) and self.rng.random() < 0.2:
                action = replace(action, data=mangled(self.rng, [action.data, NO]), sequence=0)
            yield action


NO = encode(Message("refused", {"problem": "no"}, {}), REFUSED, session=1)


class Recorder:
    """A party that keeps what it hears, and answers nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard: list[Event] = []

    def on(self, event: Event, now: float) -> Iterable[Action]:
        self.heard.append(event)
        return []


def crossings(small: tuple[Any, Any], text: list[int], method: str) -> tuple[list[int], int]:
    """The undisturbed tokens, and how many messages cross for them."""
    stage = Stage(*small, [text], method=method)
    edge = Mortal(stage.edge, 10**6)
    stage.clock.join(edge)
    return stage.run()[0], 10**6 - edge.lives


def alone(draft: Any, text: list[int], count: int, key: int = KEY) -> list[int]:
    """What the draft goes on with after a text."""
    return plain.generate(draft, [text], count, Law(), [key])[0, len(text) :].tolist()


# ---------------------------------------------------------------- death


@pytest.mark.parametrize("fallback", [pytest.param("none", marks=pytest.mark.slow), "device"])
@pytest.mark.parametrize("method", EDGED)
def test_an_edge_that_dies_at_any_message(
    small: tuple[Any, Any], method: str, fallback: str
) -> None:
    text = tiny.prompts(1)[0]
    whole, count = crossings(small, text, method)
    told_by: list[int] = []
    for lives in range(count - 1):  # the last one, `close`, needs no edge
        stage = Stage(*small, [text], method=method, fallback=fallback)
        stage.clock.join(Mortal(stage.edge, lives))
        (ids,) = stage.run()
        (session,) = stage.sessions
        told = sum(token.origin != "device" for token in session.tokens)
        told_by.append(told)
        assert ids[:told] == whole[:told]
        assert session.problem.startswith("edge: no answer to ") and "\n" not in session.problem
        if fallback == "none":
            assert session.finished == "error" and len(ids) == told
        else:
            assert session.finished == "length" and len(ids) == 20
            assert ids[told:] == alone(small[1], text + ids[:told], 20 - told)
        assert stage.draft.open() == 0  # the device's memory is free again
    assert told_by == sorted(told_by) and len(set(told_by)) >= 5 and told_by[:3] == [0, 0, 0]


@pytest.mark.parametrize("method", EDGED)
def test_a_device_that_dies_at_any_message_is_forgotten(
    small: tuple[Any, Any], method: str
) -> None:
    text = tiny.prompts(1)[0]
    _, count = crossings(small, text, method)
    for lives in range(1, count - 1, 1 + count // 12):  # it lives to send `open`
        stage = Stage(*small, [text], method=method, limits=Limits(idle=40.0))
        stage.clock.join(Mortal(stage.sessions[0], lives))
        stage.begin().clock.run(until=39.0)
        assert len(stage.edge.texts) == 1
        stage.clock.run()
        assert 40.0 <= stage.clock.now <= 81.0
        assert not stage.edge.texts and stage.target.open() == 0


def test_a_stream_is_not_idle_while_it_is_told(small: tuple[Any, Any]) -> None:
    """An edge that takes longer for all verdicts than the limit, and the device has no say."""
    profile = Profile("slow", {"float32": 1e4}, {"ram": Tier(1e9, 1e9)}, Power(0, 0, 0))
    stage = Stage(
        *small, tiny.prompts(1), method="cloud-only", timeout=None, limits=Limits(idle=60.0),
        edge=Device(profile),
    )  # fmt: skip
    assert len(stage.run()[0]) == 20 and stage.clean()
    rounds = stage.sessions[0].rounds
    assert rounds[-1].t > 75 and max(b.t - a.t for a, b in pairwise(rounds)) < 30


def test_who_leaves_is_forgotten_at_once_and_nobody_else(small: tuple[Any, Any]) -> None:
    stage = Stage(*small, tiny.prompts(3), names=["a", "b", "c"], numbers=[1, 1, 1])
    whole = Stage(*small, tiny.prompts(3)).run()
    stage.begin().clock.run(most=40)
    assert {who for who, _ in stage.edge.texts} == {"a", "b", "c"}
    stage.edge.on(Event("gone", "b"), stage.clock.now)
    assert {who for who, _ in stage.edge.texts} == {"a", "c"}
    stage.clock.run()
    b = stage.sessions[1]
    assert stage.ids[0] == whole[0] and stage.ids[2] == whole[2]
    assert (
        b.finished == "error"
        and b.problem == "edge refuses: session: 1 given, allowed: one that is open here"
    )
    assert stage.ids[1] == whole[1][: len(stage.ids[1])] and stage.clean()


@pytest.mark.parametrize("kind", ["gone", "undelivered", "malformed"])
@pytest.mark.parametrize("method", EDGED)
def test_what_a_transport_says_of_the_edge_ends_in_the_fallback(
    small: tuple[Any, Any], method: str, kind: str
) -> None:
    text = tiny.prompts(1)[0]
    whole = Stage(*small, [text], method=method).run()[0]
    for most in (2, 9, 14, 19):
        for fallback in ("none", "device"):
            stage = Stage(*small, [text], method=method, fallback=fallback)
            stage.begin().clock.run(most=most)
            (session,) = stage.sessions
            before = len(session.tokens)
            other = Event(kind, "edge/2", fields={"problem": "of another"})
            assert session.on(other, stage.clock.now) == [] and not session.problem
            event = Event(kind, "edge", fields={"problem": "left", "kind": "offer"})
            stage.clock.at(stage.clock.now, session, event)
            (ids,) = stage.ids if stage.clock.run() else [[]]
            assert ids[:before] == whole[:before] and session.problem.startswith("edge")
            assert len(ids) == (20 if fallback == "device" else before)
            assert ids[before:] == alone(small[1], text + ids[:before], len(ids) - before)
            assert stage.clean()


def test_a_link_that_gives_up(small: tuple[Any, Any]) -> None:
    target, draft = (tiny.language(model) for model in small)
    texts, keys = tiny.prompts(6), seeds.keys(seeds.key(0), range(6)).tolist()
    bad = Link(latency=0.01, loss=0.15, attempts=1, seed=2)
    lost = 0
    for method in EDGED:
        settings = {"adapt": False} if method == "tk-slt" else {}
        run = partial(
            decode, target, draft, texts, method=method, settings=settings, max_new_tokens=20,
            stop=(),
        )  # fmt: skip
        whole = [reply.ids for reply in run()]
        for reply, full in zip(run(link=bad), whole, strict=True):
            assert reply.ids == full[: len(reply.ids)]
            assert (reply.finished == "error") == ("gave up" in reply.problem)
            lost += reply.finished == "error"
        replies = run(link=bad, fallback="device")
        for reply, full, text, key in zip(replies, whole, texts, keys, strict=True):
            told = sum(token.origin != "device" for token in reply.tokens)
            assert reply.ids[:told] == full[:told] and reply.finished == "length"
            rest = alone(small[1], text + full[:told], 20 - told, key)
            assert reply.ids[told:] == rest and bool(rest) == bool(reply.problem)
    assert 4 <= lost <= 20


# ---------------------------------------------------------------- bad lines


@pytest.mark.parametrize("method", EDGED)
@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_loss_delay_repetition_and_disorder_never_change_a_token(
    small: tuple[Any, Any], method: str, seed: int
) -> None:
    texts = tiny.prompts(3, seed)
    whole = Stage(*small, texts, method=method).run()
    clock = Unruly(seed, lose=0.2, double=0.3, delay=3.0)  # more than half of the patience
    stage = Stage(*small, texts, method=method, clock=clock, tries=50, limits=Limits(idle=500.0))
    assert stage.run() == whole
    assert clock.lost > 5 and clock.doubled > 5
    assert all(s.finished == "length" and not s.problem for s in stage.sessions)
    assert stage.clean()  # texts that a late `open` has opened again were idle


def test_what_is_asked_again_has_the_same_answer_and_a_number_of_its_own(
    small: tuple[Any, Any],
) -> None:
    """An edge that is too slow for the patience of the device is asked again and again."""
    text = tiny.prompts(1)
    calm, book = Ledger(), Ledger()
    whole = Stage(*small, text, ledger=calm).run()
    slow = partial(Link, latency=4.0)
    stage = Stage(*small, text, link=slow, timeout=5.0, tries=3, ledger=book)
    seen: list[bytes] = []
    stage.clock.join(Tap(stage.edge, seen))
    assert stage.run() == whole and not stage.sessions[0].problem
    up = stage.sessions[0].method.up
    offers = [read(data, up) for data in seen if peek(data).schema == up.number]
    assert len({offer.sequence for offer in offers}) == len(offers)
    twins = [pair for pair in pairwise(offers) if same(*pair)]
    assert len(twins) == len(stage.sessions[0].rounds)
    # On paper each message counts once; its bytes count as often as it was sent.
    assert book.sums("values", "kind") == calm.sums("values", "kind")
    assert book.total("rows", kind="offer", note="retry") == len(twins)
    assert book.total("bytes", kind="offer") == 2 * calm.total("bytes", kind="offer")


def test_a_stream_is_asked_for_again_from_where_the_text_stands(small: tuple[Any, Any]) -> None:
    """At once and once after a gap, and when nothing comes any more."""
    text = tiny.prompts(1)[0]
    stage = Stage(*small, [text], method="cloud-only", timeout=5.0, tries=2)
    (session,), method = stage.sessions, method_of("cloud-only", tiny.VOCAB)

    def offers(actions: list[Action]) -> list[int]:
        sends = [action for action in actions if isinstance(action, Send)]
        return [int(read(send.data, method.up).fields["at"]) for send in sends]

    def verdict(at: int) -> Event:
        message = Message("verdict", {"at": at, "token": 7}, {})
        return Event("verdict", "edge", encode(message, method.down, "compact", 1, at))

    session.on(Event("begin"), 0.0)
    context = {"verify_seconds": 0.0, "context": tiny.CONTEXT}
    opened = encode(Message("opened", context, {}), OPENED, session=1, sequence=1)
    at = len(text)
    assert offers(session.on(Event("opened", "edge", opened), 0.0)) == [at]
    assert session.on(verdict(at), 0.1) == session.on(verdict(at), 0.2) == []  # told twice
    assert offers(session.on(verdict(at + 2), 0.3)) == [at + 1]
    assert session.on(verdict(at + 3), 0.4) == []
    assert session.on(verdict(at + 1), 0.5) == session.on(verdict(at + 2), 0.6) == []
    assert len(session.tokens) == 3
    (alarm,) = session.on(Event("late"), 5.0)
    assert isinstance(alarm, After) and alarm.seconds == pytest.approx(0.6)
    assert offers(session.on(Event("late"), 5.6)) == [at + 3]
    assert offers(session.on(Event("late"), 10.6)) == [at + 3]
    (close,) = session.on(Event("late"), 15.6)
    assert isinstance(close, Send) and close.kind == "close"
    assert session.problem == "edge: no answer to offer, asked 3 times in 5.0 s each"
    assert [token.id for token in session.tokens] == [7, 7, 7]


# ---------------------------------------------------------------- strangers


def test_two_parties_with_one_session_do_not_meet(small: tuple[Any, Any]) -> None:
    texts = tiny.prompts(2)
    whole = Stage(*small, texts).run()
    stage = Stage(*small, texts, names=["phone", "watch"], numbers=[7, 7])
    assert stage.run() == whole and stage.clean()


WIDE = Schema(
    "open", 1, {**OPEN.fields, "max_new_tokens": Field("u32")}, OPEN.tensors
)  # fmt: skip
"""What a device might send that does not keep to the size."""


def opening(**changes: Any) -> Message:
    """A good `open`, and what is to be wrong with it."""
    fields: dict[str, Any] = {
        "method": "dssd", "settings": "{}", "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "key": 5, "max_new_tokens": 20, "fingerprint": f"vocabulary of {tiny.VOCAB}",
    }  # fmt: skip
    prompt = torch.tensor(changes.pop("prompt", [3, 4, 5]), dtype=torch.int32)
    stop = torch.tensor(changes.pop("stop", [1]), dtype=torch.int32)
    tensors = {"prompt": prompt, "stop": stop}
    return Message("open", fields | changes, tensors)


def said(actions: list[Action]) -> tuple[str, str]:
    """The kind and the problem of the one message among actions."""
    (send,) = [action for action in actions if isinstance(action, Send)]
    problem = read(send.data, REFUSED).fields["problem"] if send.kind == "refused" else ""
    return send.kind, str(problem)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"method": "dsdd"}, "nearest: dssd"),
        ({"method": "device-only"}, "method: device-only given"),
        ({"method": "own.py:Method"}, "method: own.py:Method given"),
        ({"settings": "[" * 1000}, "settings: no JSON object"),
        ({"settings": "[]"}, "settings: no JSON object"),
        ({"settings": '{"gama": 3}'}, "nearest: gamma"),
        ({"settings": '{"gamma": 65}'}, "settings.gamma"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"fingerprint": "another"}, "fingerprint"),
        ({"prompt": []}, "prompt: 0 tokens"),
        ({"prompt": [3, tiny.VOCAB]}, "prompt: ids"),
        ({"prompt": [3, -1]}, "prompt: ids"),
        ({"prompt": [3] * tiny.CONTEXT}, "prompt: 96 tokens"),
        ({"prompt": [3] * (2**15 + 1)}, "prompt: 32769 tokens"),
        ({"prompt": [3] * 2**17}, "message: "),
        ({"stop": list(range(65))}, "stop: 65 tokens"),
        ({"max_new_tokens": 2**17 + 1}, "max_new_tokens"),
    ],
)
def test_what_an_edge_does_not_open(small: tuple[Any, Any], wrong: Any, problem: str) -> None:
    edge = Stage(*small, []).edge
    message = opening(**wrong)
    data = encode(message, WIDE, session=3, sequence=1)
    kind, told = said(edge.on(Event("open", "phone", data), 0.0))
    assert kind == "refused" and problem in told and "\n" not in told
    assert not edge.texts and not edge._fresh and edge.target.open() == 0
    good = encode(opening(), OPEN, session=3, sequence=2)
    assert said(edge.on(Event("open", "phone", good), 0.0)) == ("opened", "")


def test_an_edge_holds_so_many_texts_and_no_more(small: tuple[Any, Any]) -> None:
    edge = Stage(*small, [], limits=Limits(texts=5, each=2)).edge

    def ask(party: str, number: int, **changes: Any) -> str:
        data = encode(opening(**changes), OPEN, session=number, sequence=1)
        return said(edge.on(Event("open", party, data), 0.0))[0]

    assert [ask("a", n) for n in (1, 2, 3)] == ["opened", "opened", "refused"]
    assert [ask(party, 1) for party in "bcde"] == ["opened"] * 3 + ["refused"]
    assert len(edge.texts) == 5
    edge.on(Event("close", "a", encode(Message("close", {}, {}), CLOSE, "compact", 1, 2)), 0.0)
    assert ask("e", 1) == "opened" and ask("f", 1) == "refused"


def test_an_id_is_opened_again_only_with_the_same_contents(small: tuple[Any, Any]) -> None:
    edge = Stage(*small, []).edge

    def ask(sequence: int, **changes: Any) -> list[Action]:
        data = encode(opening(**changes), OPEN, session=9, sequence=sequence)
        return edge.on(Event("open", "phone", data), 0.0)

    first, again = (said(ask(sequence)) for sequence in (1, 4))
    assert first == again == ("opened", "")
    assert ask(4) == [] and ask(2) == []  # repeats, and what was late
    for changes in ({"key": 6}, {"prompt": [3, 4, 6]}, {"max_new_tokens": 21}):
        kind, problem = said(ask(5, **changes))
        assert kind == "refused" and "not open already" in problem
    assert len(edge.texts) == 1


def test_what_does_not_continue_a_text_is_refused(small: tuple[Any, Any]) -> None:
    """Offers at the wrong place, of the wrong size, or while another one waits."""
    stage = Stage(*small, [])
    method, edge = method_of("dssd", tiny.VOCAB), stage.edge
    # The edge works as fast as it is asked to: its own events are answered at once.

    def tell(event: Event) -> list[Send]:
        sends, queue = [], [event]
        while queue:
            for action in edge.on(queue.pop(0), 0.0):
                if isinstance(action, Send):
                    sends.append(action)
                elif hasattr(action, "event") and action.event.kind == "batch":
                    queue.append(action.event)
        return sends

    def offer(at: int, ids: list[int], sequence: int, last: int = 5) -> bytes:
        tensors = {
            "ids": torch.tensor(ids).to(torch.uint16),
            "s": torch.full((len(ids),), 0.5, dtype=torch.float16),
        }
        return encode(
            Message("offer", {"at": at, "last": last}, tensors), method.up, "compact", 1, sequence
        )

    for bad, problem in [
        (offer(4, [7], 2), "at: 4, where the text has 3 tokens"),
        (offer(2, [7], 2), "at: 2, where"),
        (offer(3, [7] * 20, 2), "ids: 20 after 3 of 23 tokens"),
        (offer(3, [7], 2, last=6), "last: 6 where the text ends with 5"),
        (offer(3, [tiny.VOCAB], 2), "ids: 48"),
        (offer(3, [7], 2)[:-1], "s: "),
        (offer(3, [7], 2) + b"x", "tensors: "),
    ]:
        open_ = encode(opening(), OPEN, session=1, sequence=1)
        assert [send.kind for send in tell(Event("open", "phone", open_))] == ["opened"]
        (refused,) = tell(Event("offer", "phone", bad))
        told = read(refused.data, REFUSED).fields["problem"]
        assert problem in str(told)
        assert not edge.texts and stage.target.open() == 0
        stage.target.close(0)

    open_ = encode(opening(), OPEN, session=1, sequence=1)
    tell(Event("open", "phone", open_))
    good = offer(3, [7, 8], 2)
    actions = edge.on(Event("offer", "phone", good), 0.0)  # waits: its batch is not begun
    assert not [action for action in actions if isinstance(action, Send)]
    assert edge.on(Event("offer", "phone", offer(3, [7, 8], 3)), 0.0) == []  # the same again
    (verdict,) = tell(Event("batch"))
    assert verdict.kind == "verdict"
    (repeated,) = tell(Event("offer", "phone", offer(3, [7, 8], 4)))
    assert (repeated.note, repeated.values) == ("retry", 0) and verdict.values > 0
    assert repeated.data[12:] == verdict.data[12:] and repeated.sequence > verdict.sequence
    assert tell(Event("offer", "phone", offer(3, [7, 8], 3))) == []  # late
    (refused,) = tell(Event("offer", "phone", offer(3, [7, 9], 5)))
    assert refused.kind == "refused" and not edge.texts


def mangled(rng: Any, messages: list[bytes]) -> bytes:
    """Random bytes, or a message that is cut, grown, spliced or flipped."""
    data = bytearray(messages[rng.integers(len(messages))])
    match rng.integers(6):
        case 0:
            return rng.bytes(int(rng.integers(200)))
        case 1:
            return bytes(data[: rng.integers(len(data))])
        case 2:
            return bytes(data) + rng.bytes(int(rng.integers(1, 50)))
        case 3:
            other = messages[rng.integers(len(messages))]
            return bytes(data[: rng.integers(len(data))]) + other[rng.integers(len(other)) :]
        case _:
            for _ in range(rng.integers(1, 5)):
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            return bytes(data)


def test_ten_thousand_bad_messages_do_not_disturb_the_others(small: tuple[Any, Any]) -> None:
    texts = tiny.prompts(4)
    methods = {i: method for i, method in enumerate(EDGED)}
    whole = [Stage(*small, [text], method=methods[i]).run()[0] for i, text in enumerate(texts)]
    seen: list[bytes] = []
    for i, text in enumerate(texts):
        stage = Stage(*small, [text], method=methods[i], numbers=[100 + i])
        stage.clock.join(Tap(stage.edge, seen))
        stage.run()
    clock, rng = Clock(), seeds.rng(7)
    limits = Limits(texts=40, each=12, idle=60.0)
    stage = Stage(*small, [], clock=clock, limits=limits)
    for i, text in enumerate(texts):
        session = Session(
            method_of(methods[i], tiny.VOCAB), text, draft=stage.draft, name=f"phone/{i}",
            number=i + 1, key=KEY, max_new_tokens=20, costs=Costs(draft=1e-4),
            fingerprint=stage.edge.fingerprint,
        )  # fmt: skip
        clock.join(session)
        clock.connect(session.name, "edge", Link(latency=0.5))
        stage.sessions.append(session)
    strangers = [Recorder(f"stranger/{i}") for i in range(3)]
    for stranger in strangers:
        clock.join(stranger)
        clock.connect(stranger.name, "edge", Link())
    kinds = ["open", "offer", "close", "verdict", "refused", "batch", "sweep", "late", "begin"]
    for n in range(10_000):
        sender = strangers[n % 3].name if n % 4 else f"phone/{n % 3}"
        data = mangled(rng, seen)
        clock.at(n * 2e-3, stage.edge, Event(kinds[rng.integers(9)], sender, data))
    assert stage.run() == whole
    assert all(session.finished == "length" for session in stage.sessions)
    assert max(map(len, (s.heard for s in strangers))) > 500  # they were answered
    assert stage.clean() and clock.now < 200


@pytest.mark.parametrize("method", EDGED)
def test_a_device_survives_whatever_an_edge_says(small: tuple[Any, Any], method: str) -> None:
    text = tiny.prompts(1)[0]
    whole = Stage(*small, [text], method=method).run()[0]
    rng, ends = seeds.rng(3), set()
    for _ in range(60):
        stage = Stage(*small, [text], method=method, timeout=1.0)
        (session,) = stage.sessions

        stage.clock.join(Liar(stage.edge, rng))
        stage.run()
        ends.add(session.finished)
        assert "\n" not in session.problem
        assert (session.finished == "error") == bool(session.problem)
        # What can be read is believed; the text never grows beyond what was asked for.
        assert len(stage.ids[0]) <= len(whole) and stage.draft.open() == 0
    assert "error" in ends


def test_an_opened_for_another_session_is_not_for_this_one(small: tuple[Any, Any]) -> None:
    stage = Stage(*small, tiny.prompts(1), timeout=None)
    (session,) = stage.sessions
    session.on(Event("begin"), 0.0)
    other = encode(
        Message("opened", {"verify_seconds": 1.0, "context": 4}, {}), OPENED, session=2, sequence=1
    )
    assert session.on(Event("opened", "edge", other), 0.0) == []
    refused = encode(Message("refused", {"problem": "no"}, {}), REFUSED, session=2, sequence=1)
    assert session.on(Event("refused", "edge", refused), 0.0) == []
    mine = encode(
        Message("opened", {"verify_seconds": 1.0, "context": 90}, {}), OPENED, session=1, sequence=1
    )
    assert session.on(Event("opened", "somebody", mine), 0.0) == []
    for kind in ("opened", "drafted", "alone", "late", "begin"):  # nor what only it tells itself
        assert session.on(Event(kind, "" if kind == "opened" else "edge", mine), 0.0) == []
    assert session.on(Event("opened", "edge", mine), 0.0) and session.text.costs.verify == 1.0


# ---------------------------------------------------------------- nothing stays


@pytest.mark.slow
def test_a_thousand_sessions_leave_nothing(small: tuple[Any, Any]) -> None:
    stage = Stage(*small, [], limits=Limits(texts=64, each=4, idle=50.0))
    clock, threads = stage.clock, threading.active_count()
    text, held = tiny.prompts(10), []
    ever: list[ReferenceType[Session]] = []
    for wave in range(25):
        mortals: list[Session] = []
        for i in range(40):
            number = 40 * wave + i + 1
            session = Session(
                method_of(EDGED[i % 4], tiny.VOCAB), text[i % 10], draft=stage.draft,
                name=f"phone/{i}", number=number, key=number, max_new_tokens=3,
                fingerprint=stage.edge.fingerprint, timeout=2.0, tries=1,
                fallback="device" if i % 3 == 0 else "none",
            )  # fmt: skip
            ever.append(ref(session))
            party: Party = session
            if i % 7 == 0:
                party = Mortal(session, 4)
                mortals.append(session)
            clock.join(party)
            clock.connect(session.name, "edge", Link(latency=0.01 * (i % 5)))
            clock.at(clock.now, party, Event("begin"))
        clock.run()
        for dead in mortals:  # a device that dies takes its memory with it
            dead.text.close()
        assert stage.edge.texts == {} and stage.edge._fresh == {} and stage.edge._waiting == {}
        assert not stage.edge._parties and len(stage.edge._built) <= 4
        held.append((stage.target.memory.nbytes(), stage.draft.memory.nbytes()))
    assert len(set(held[1:])) == 1
    assert stage.target.open() == 0 and threading.active_count() == threads
    del session, party, mortals, dead
    clock._parties.clear()
    gc.collect()
    assert len(ever) == 1000 and not any(one() for one in ever)
