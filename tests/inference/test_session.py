"""Sessions in one process: the tokens, the memories, the bytes and the seconds they stand for."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.inference import tiny
from tests.inference.tiny import Stage

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.inference import together
from isthmus.inference.edge import Edge
from isthmus.inference.engine import Engine
from isthmus.inference.method import method_of
from isthmus.inference.session import Session
from isthmus.inference.together import decode
from isthmus.models import decode as plain
from isthmus.models.decode import Law
from isthmus.models.language import Language, load
from isthmus.wire.clock import Clock, Event
from isthmus.wire.device import Device, Power, Profile, Tier
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link
from isthmus.wire.message import Message, encode
from isthmus.wire.message import decode as read

SPLIT = ["full-row", "tk-slt", "dssd"]
LAWS = [Law(0.0), Law(), Law(0.7, 20, 0.9)]


@pytest.fixture(scope="module")
def pair() -> tuple[Language, Language]:
    """The embedded pair in float64: no batch tips a token over a rounding error."""
    return load("embedded", torch.float64), load("embedded:draft", torch.float64)


@pytest.fixture(scope="module")
def texts(pair: tuple[Language, Language]) -> list[torch.Tensor]:
    """Prompts of unequal lengths."""
    begun = ["The list of", "Return True if the object is a subclass of", "A class that", "If"]
    return [pair[0].encode(text) for text in begun]


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    target = tiny.fresh()
    return target, tiny.near(target)


def expected(language: Language, texts: list[torch.Tensor], law: Law, seed: int) -> list[list[int]]:
    """What plain decoding says after each prompt, up to a stop."""
    keys, (stop,) = seeds.keys(seeds.key(seed), range(len(texts))).tolist(), language.stop
    rows = [
        plain.generate(language.model, [text], 16, law, [key])[0, len(text) :].tolist()
        for text, key in zip(texts, keys, strict=True)
    ]
    return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("law", LAWS)
def test_alone_each_model_says_what_it_says_in_plain_decoding(
    pair: tuple[Language, Language], texts: list[torch.Tensor], law: Law
) -> None:
    target, draft = pair
    for seed in (0, 4) if law == Law() else (1,):
        options: dict[str, Any] = {"law": law, "max_new_tokens": 16, "seed": seed}
        cloud = decode(target, None, texts, method="cloud-only", link="lte", **options)
        assert [reply.ids for reply in cloud] == expected(target, texts, law, seed)
        assert {token.origin for reply in cloud for token in reply.tokens} == {"target"}
        device = decode(None, draft, texts, method="device-only", **options)
        assert [reply.ids for reply in device] == expected(draft, texts, law, seed)
        assert {token.origin for reply in device for token in reply.tokens} == {"device"}


@pytest.mark.parametrize("method", SPLIT)
def test_greedy_text_is_that_of_the_target(
    pair: tuple[Language, Language], texts: list[torch.Tensor], method: str
) -> None:
    target, draft = pair
    said = expected(target, texts, Law(0.0), 0)
    settings = {"adapt": False} if method == "tk-slt" else {}
    run = partial(decode, target, draft, texts, method=method, law=Law(0.0), max_new_tokens=16)
    replies = run(settings=settings)
    assert [reply.ids for reply in replies] == said
    origins = {token.origin for reply in replies for token in reply.tokens}
    assert {"accepted", "corrected", "bonus"} <= origins
    if settings:
        assert [reply.ids for reply in run(link="3g")] == said


@pytest.mark.parametrize("method", SPLIT)
def test_tokens_depend_on_the_seed_and_not_on_times(
    pair: tuple[Language, Language], texts: list[torch.Tensor], method: str
) -> None:
    target, draft = pair
    settings = {"adapt": False} if method == "tk-slt" else {}
    run = partial(decode, target, draft, texts, method=method, settings=settings, max_new_tokens=16)
    base = [reply.ids for reply in run(seed=1)]
    assert base == [reply.ids for reply in run(seed=1)]
    assert base != [reply.ids for reply in run(seed=2)]
    slow = run(seed=1, link=Link(up=4e4, down=9e4, latency=0.2, loss=0.2, seed=3), device="laptop")
    assert base == [reply.ids for reply in slow]


@pytest.mark.parametrize("method", [*SPLIT, "cloud-only", "device-only"])
def test_in_a_batch_a_prompt_says_what_it_says_alone(small: tuple[Any, Any], method: str) -> None:
    target, draft = small
    texts = tiny.prompts(5)
    replies = decode(
        tiny.language(target), tiny.language(draft), texts, method=method, max_new_tokens=20,
        law=Law(0.8),
    )  # fmt: skip
    keys = seeds.keys(seeds.key(0), range(5)).tolist()
    for reply, text, key in zip(replies, texts, keys, strict=True):
        assert len(reply.ids) == 20 and reply.finished == "length" and not reply.problem
        if method == "device-only":
            row = plain.generate(draft, [text], 20, Law(0.8), [key])[0, len(text) :]
            assert reply.ids == row.tolist()
            continue
        # Parties put together by hand, which compute when they are asked, not in step.
        alone = Stage(target, draft, [text], method=method, keys=[key], law=Law(0.8))
        assert alone.run() == [reply.ids]
        assert alone.sessions[0].rounds[-1].accepted == reply.rounds[-1].accepted


def test_a_key_of_another_sequence_gives_another_text(small: tuple[Any, Any]) -> None:
    text = tiny.prompts(1)[0]
    assert len({tuple(Stage(*small, [text], keys=[key]).run()[0]) for key in range(8)}) == 8


@pytest.mark.parametrize("method", SPLIT)
def test_eager_devices_say_the_same(small: tuple[Any, Any], method: str) -> None:
    texts = tiny.prompts(3)
    lazy = Stage(*small, texts, method=method)
    eager = Stage(*small, texts, method=method, half={"eager": True})
    assert lazy.run() == eager.run()


# ---------------------------------------------------------------- the end of a text


@pytest.mark.parametrize("method", [*SPLIT, "cloud-only"])
def test_a_stop_token_ends_a_text_wherever_it_stands(small: tuple[Any, Any], method: str) -> None:
    text = tiny.prompts(1)[0]
    whole = Stage(*small, [text], method=method)
    (ids,) = whole.run()
    origins = {token.id: token.origin for token in reversed(whole.sessions[0].tokens)}
    assert method == "cloud-only" or "accepted" in origins.values()
    for stop in dict.fromkeys(ids):
        stage = Stage(*small, [text], method=method, stop=[stop, 1])
        assert stage.run() == [ids[: ids.index(stop) + 1]]
        assert stage.sessions[0].finished == "stop"
        assert stage.clean()


def test_an_edge_tells_no_more_than_the_text(small: tuple[Any, Any]) -> None:
    """It knows the stop tokens of a stream: nothing follows one on the way to the device."""
    text, ledger = tiny.prompts(1)[0], Ledger()
    (ids,) = Stage(*small, [text], method="cloud-only").run()
    stage = Stage(
        *small, [text], method="cloud-only", stop=ids[6:7], ledger=ledger,
        link=partial(Link, latency=0.5),
    )  # fmt: skip
    assert stage.run() == [ids[: ids.index(ids[6]) + 1]]
    assert ledger.total("rows", kind="verdict") == ids.index(ids[6]) + 1


def test_a_text_ends_where_the_smaller_context_does(small: tuple[Any, Any]) -> None:
    target, draft = small
    roomy = tiny.fresh(seed=8)
    roomy.config.max_position_embeddings = 4 * tiny.CONTEXT
    text = tiny.prompts(1)[0] * 8
    for edge, device in ((target, roomy), (roomy, draft)):
        for method in (*SPLIT, "cloud-only"):
            if method == "cloud-only" and edge is roomy:
                continue
            stage = Stage(edge, device, [text], method=method, count=500)
            (ids,) = stage.run()
            assert len(text) + len(ids) == tiny.CONTEXT
            assert stage.sessions[0].finished == "length" and stage.clean()


def test_nothing_asked_for_is_nothing_done(small: tuple[Any, Any]) -> None:
    ledger = Ledger()
    target, draft = (tiny.language(model) for model in small)
    (reply,) = decode(target, draft, tiny.prompts(1), max_new_tokens=0, ledger=ledger)
    assert (reply.ids, reply.finished, reply.seconds, len(ledger)) == ([], "length", 0.0, 0)
    assert decode(target, draft, []) == []


def test_what_cannot_be_decoded_is_refused(small: tuple[Any, Any]) -> None:
    target, draft = (tiny.language(model) for model in small)
    text = tiny.prompts(1)
    bad: list[tuple[str, Any]] = [
        ("prompt", lambda: decode(target, draft, [[]])),
        ("prompt", lambda: decode(target, draft, [[5] * tiny.CONTEXT])),
        ("prompt", lambda: decode(target, draft, [[tiny.VOCAB]])),
        ("prompt", lambda: decode(target, draft, [[-1]])),
        ("max_new_tokens", lambda: decode(target, draft, text, max_new_tokens=-1)),
        ("stop", lambda: decode(target, draft, text, stop=range(2, 70))),
        ("draft", lambda: decode(target, None, text, method="dssd")),
        ("draft", lambda: decode(target, None, text, method="cloud-only", fallback="device")),
        ("target", lambda: decode(None, draft, text, method="cloud-only")),
        ("target", lambda: decode(None, None, text)),
        ("fallback", lambda: decode(target, draft, text, fallback="cloud")),  # type: ignore
        ("settings.gamma", lambda: decode(target, draft, text, settings={"gamma": 65})),
        ("method", lambda: decode(target, draft, text, method="dsdd")),
        ("device", lambda: decode(target, draft, text, device="fone")),
    ]
    for field, call in bad:
        with pytest.raises(InputError) as error:
            call()
        assert error.value.field == field and "\n" not in str(error.value)
    other = tiny.language(tiny.fresh("gpt2"))
    other.model.resize_token_embeddings(tiny.VOCAB + 1)
    with pytest.raises(InputError, match="as the target has"):
        decode(target, other, text)


# ---------------------------------------------------------------- memories


class Watched(Engine):
    """An engine that notes what its memory holds whenever something is asked of it."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.seen: list[int] = []

    def rows(self, slot: int, ids: Any, last: int) -> Any:
        self.seen.append(self.memory.length(slot))
        return super().rows(slot, ids, last)

    def propose(self, slot: int, *rest: Any) -> Any:
        self.seen.append(self.memory.length(slot))
        return super().propose(slot, *rest)


@pytest.mark.parametrize("method", SPLIT)
def test_both_memories_hold_the_accepted_prefix_after_every_round(
    small: tuple[Any, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "Engine", Watched)
    text = tiny.prompts(1)[0]
    settings = {"gamma": 3} | ({"adapt": False} if method == "tk-slt" else {})
    stage = Stage(*small, [text], method=method, settings=settings, count=40)
    stage.run()
    rounds = stage.sessions[0].rounds
    assert {r.accepted for r in rounds} == {0, 1, 2, 3}  # whatever can happen has
    assert any(r.drafted > r.accepted for r in rounds)
    seen = stage.sessions[0].seen
    assert seen.rounds == sum(r.drafted > 0 for r in rounds)
    assert seen.accepted == sum(r.accepted for r in rounds)
    assert seen.judged == sum(min(r.accepted + 1, r.drafted) for r in rounds)
    stand = [r.at + r.accepted for r in rounds[:-1]]
    # At the edge: nothing, the prompt, then all that stands, the token after it not yet.
    assert stage.target.seen == [0, len(text), *stand]  # type: ignore[attr-defined]
    # On the device: the last drafted token was never fed.
    drafts = [min(r.at + r.accepted, r.at + 3 - 1) for r in rounds[:-1]]
    assert stage.draft.seen == [0, *drafts][: len(stage.draft.seen)]  # type: ignore[attr-defined]
    assert stage.clean()


# ---------------------------------------------------------------- bytes


BITS, ID, POSITION = 16, (tiny.VOCAB - 1).bit_length(), 8
ROW = tiny.VOCAB * BITS
TABLE = {
    "full-row": lambda g: g * (ROW + ID),
    "tk-slt": lambda g: g * (6 * (BITS + ID) + ID),
    "dssd": lambda g: g * (BITS + ID) + ID,
    "cloud-only": lambda g: 0,
}
"""Bits of an offer of g tokens, on paper; 6 entries of a row where the largest go up."""


class Counted(Link):
    """A link that notes the size of every message."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sizes: dict[str, list[int]] = {"up": [], "down": []}

    def send(self, bytes: int, direction: Any, now: float) -> Any:
        self.sizes[direction].append(bytes)
        return super().send(bytes, direction, now)


@pytest.mark.parametrize("method", [*SPLIT, "cloud-only"])
def test_the_ledger_has_every_byte_and_the_table_of_the_papers(
    small: tuple[Any, Any], method: str
) -> None:
    ledger, links = Ledger(), [Counted(), Counted()]
    settings = {"K": 6, "adapt": False} if method == "tk-slt" else {}
    stage = Stage(
        *small, tiny.prompts(2), method=method, settings=settings, ledger=ledger,
        link=iter(links).__next__, timeout=None,
    )  # fmt: skip
    stage.run()
    rows = [row for row in ledger.rows() if row["what"] == "crossing"]
    for number, (link, session) in enumerate(zip(links, stage.sessions, strict=True), 1):
        mine = [row for row in rows if row["session"] == number]
        for direction, sender in (("up", session.name), ("down", "edge")):
            assert [r["bytes"] for r in mine if r["from"] == sender] == link.sizes[direction]
        offers = [row for row in mine if row["kind"] == "offer"]
        verdicts = [row for row in mine if row["kind"] == "verdict"]
        rounds = session.rounds
        assert [r["round"] for r in verdicts] == list(range(len(rounds)))
        assert sum(r.down for r in rounds) == sum(r["bytes"] for r in verdicts)
        opening = sum(r["bytes"] for r in mine if r["kind"] == "open")
        assert sum(r.up for r in rounds) == opening + sum(r["bytes"] for r in offers)
        assert [r["values"] for r in offers] == [
            math.ceil(TABLE[method](r.drafted) / 8) for r in rounds[: len(offers)]
        ]
        for crossing, one in zip(verdicts, rounds, strict=True):
            rejected = one.accepted < one.drafted
            said = POSITION + (ROW if method == "dssd" and rejected else ID)
            said = ID if method == "cloud-only" else said
            assert crossing["values"] == math.ceil(said / 8)
            assert crossing["values"] < crossing["bytes"]
    kinds = ["open", "opened", "offer", "verdict", "close"]
    assert sorted({row["kind"] for row in rows}) == sorted(kinds)
    numbers = [(row["from"], row["sequence"]) for row in rows]
    assert len(set(numbers)) == len(numbers)


def test_a_text_in_step_crosses_as_one_by_hand(small: tuple[Any, Any]) -> None:
    texts, books = tiny.prompts(3), (Ledger(), Ledger())
    hand = Stage(*small, texts, ledger=books[0], timeout=None)
    hand.run()
    target, draft = (tiny.language(model) for model in small)
    replies = decode(target, draft, texts, max_new_tokens=20, ledger=books[1], stop=())
    assert [reply.ids for reply in replies] == hand.ids
    by = ("from", "kind", "session", "round")
    for count in ("bytes", "values", "rows"):
        one, other = (book.sums(count, by, what="crossing") for book in books)
        assert one == other
    assert books[0].sums("flops", "kind") == books[1].sums("flops", "kind")


@pytest.mark.parametrize("kind", ["offer", "verdict"])
def test_what_is_played_is_what_was_decoded(
    small: tuple[Any, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that is changed on its way does not pass for the one that was rehearsed."""
    method = method_of("full-row", tiny.VOCAB)
    schema, field = (method.up, "ids") if kind == "offer" else (method.down, "token")

    class Twisting(Clock):
        def _put(self, time: float, party: str, item: Any) -> None:
            if isinstance(item, Event) and item.kind == kind and item.data:
                message = read(item.data, schema)
                fields, tensors = dict(message.fields), dict(message.tensors)
                if field in fields:
                    fields[field] = (int(fields[field]) + 1) % tiny.VOCAB
                else:
                    tensors[field] = torch.tensor(tensors[field].tolist()[::-1]).to(torch.uint16)
                changed = Message(kind, fields, tensors, message.session, message.sequence)
                item = replace(item, data=encode(changed, schema, "compact"))
            super()._put(time, party, item)

    monkeypatch.setattr(together, "Clock", Twisting)
    target, draft = (tiny.language(model) for model in small)
    with pytest.raises(RuntimeError, match=f"{kind} at .* is not what was rehearsed"):
        decode(target, draft, tiny.prompts(1), method="full-row", max_new_tokens=20)


# ---------------------------------------------------------------- seconds


def hand_built() -> tuple[Device, Device, Link]:
    """Devices that compute and do not wait for memory, and a link of round numbers."""

    def device(name: str, rate: float) -> Device:
        tiers = {"ram": Tier(1e12, math.inf)}
        return Device(Profile(name, {"float32": rate}, tiers, Power(0.0, 1.0, 0.0)))

    return device("weak", 1e6), device("strong", 1e8), Link(8e3, 32e3, 0.25, 0.125)


@pytest.mark.parametrize("method", [*SPLIT, "cloud-only"])
def test_virtual_seconds_are_those_of_the_closed_form(small: tuple[Any, Any], method: str) -> None:
    weak, strong, link = hand_built()
    ledger = Ledger()
    target, draft = Engine(small[0]), Engine(small[1])
    settings = {"adapt": False} if method == "tk-slt" else {}
    kind, text = method_of(method, target.vocab, settings), tiny.prompts(3)[2]
    clock, edge = Clock(ledger), Edge(target, device=strong)
    session = Session(kind, text, draft=draft, key=5, max_new_tokens=12, timeout=None)
    clock.join(edge, strong)
    clock.join(session, weak)
    clock.connect("device", "edge", link)
    clock.at(0.0, session, Event("begin"))
    clock.run()

    rows = list(ledger.rows())
    sizes = {
        word: [row["bytes"] for row in rows if row["kind"] == word and row["what"] == "crossing"]
        for word in ("open", "opened", "offer", "verdict")
    }
    work = {
        who: [(r["kind"], r["flops"]) for r in rows if (r["from"], r["to"]) == (who, who)]
        for who in ("device", "edge")
    }

    def up(bytes: int) -> float:
        return 0.125 + bytes * 8 / 8e3 + 0.25

    def down(bytes: int) -> float:
        return 0.125 + bytes * 8 / 32e3 + 0.25

    arrived = up(sizes["open"][0])
    t = arrived + down(sizes["opened"][0])
    read = arrived + work["edge"][0][1] / 1e8
    assert work["edge"][0][0] == "prefill"
    judged = iter(work["edge"][1:])
    times: list[float] = []
    if method == "cloud-only":
        t = max(t + up(sizes["offer"][0]), read)
        free = 0.0  # the line down, on which verdicts queue
        for i, bytes in enumerate(sizes["verdict"]):
            t += 0.0 if i == 0 else next(judged)[1] / 1e8
            free = max(t, free) + 0.125 + bytes * 8 / 32e3
            times.append(free + 0.25)
    else:
        drafted = iter(work["device"])
        for i, bytes in enumerate(sizes["verdict"]):
            if session.rounds[i].drafted:
                t += next(drafted)[1] / 1e6
                t += next(drafted)[1] / 1e6 if i == 0 and session.rounds[0].drafted > 1 else 0.0
            t = max(t + up(sizes["offer"][i]), read) + next(judged)[1] / 1e8 + down(bytes)
            times.append(t)
        assert next(drafted, None) is None
    assert next(judged, None) is None
    assert [round.t for round in session.rounds] == pytest.approx(times, rel=1e-12)
    assert session.seconds == pytest.approx(times[-1], rel=1e-12)
    assert session.tokens[-1].t == session.seconds


def test_pending_alarms_do_not_count(small: tuple[Any, Any]) -> None:
    text = tiny.prompts(1)
    patient, calm = Stage(*small, text, timeout=1e6), Stage(*small, text, timeout=None)
    assert patient.run() == calm.run()
    assert patient.clock.now >= 1e6 > calm.sessions[0].seconds
    assert patient.sessions[0].seconds == calm.sessions[0].seconds


def test_work_of_a_batch_reads_the_weights_once(small: tuple[Any, Any]) -> None:
    """Two devices in step: one piece of work for both, and less time than for one by one."""
    text = tiny.prompts(1)[0]
    ledger = Ledger()
    stage = Stage(*small, [text, text], keys=[3, 3], ledger=ledger, timeout=None)
    first, second = stage.run()
    assert first == second
    rounds = len(stage.sessions[0].rounds)
    verify = [row for row in ledger.rows() if row["kind"] in ("verify", "decode")]
    assert len(verify) == rounds and {row["session"] for row in verify} == {0}
    lone = Ledger()
    Stage(*small, [text], keys=[3], ledger=lone, timeout=None).run()
    alone = [row for row in lone.rows() if row["kind"] in ("verify", "decode")]
    assert {row["session"] for row in alone} == {1}
    assert [row["round"] for row in alone] == list(range(rounds))
    assert [row["flops"] for row in verify] == [2 * row["flops"] for row in alone]
    assert all(
        both["seconds"] < 2 * one["seconds"] for both, one in zip(verify, alone, strict=True)
    )


def test_listeners_hear_every_token_in_order_of_time(small: tuple[Any, Any]) -> None:
    heard: list[tuple[int, Any]] = []
    target, draft = (tiny.language(model) for model in small)
    replies = decode(
        target, draft, tiny.prompts(3), link="lte", max_new_tokens=15, stop=(),
        listen=lambda i, token: heard.append((i, token)),
    )  # fmt: skip
    for i, reply in enumerate(replies):
        assert [token for j, token in heard if j == i] == reply.tokens
    times = [token.t for _, token in heard]
    assert times == sorted(times) and times[0] > 0.12
