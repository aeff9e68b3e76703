"""The service: its texts and figures are those of a session alone, its forwards are shared."""

from __future__ import annotations

import gc
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from isthmus import catalogue, seeds
from isthmus.errors import InputError
from isthmus.inference import together
from isthmus.inference.server.meeting import Meeting
from isthmus.inference.server.service import Busy, Service
from isthmus.inference.server.text import Ask, Piece, Text
from isthmus.models.decode import Law, generate
from isthmus.models.language import Language
from isthmus.wire.ledger import Ledger

PROMPT = "If the file"
METHODS = catalogue.names("serving")


@pytest.mark.parametrize("method", METHODS)
def test_a_text_is_the_sessions_own_and_its_figures_are_its_ledgers(
    method: str, service: Service, pair: tuple[Language, Language], hear: Callable[..., Any]
) -> None:
    target, draft = pair
    heard = hear(service, PROMPT, 24, seed=5, method=method, link="lte").end()
    ledger = Ledger()
    (reply,) = together.decode(
        target, draft, [target.encode(PROMPT)], method=method, law=Law(0.8), max_new_tokens=24,
        seed=5, link="lte", ledger=ledger,
    )  # fmt: skip
    last = heard.pieces[-1]
    assert target.decode([*target.encode(PROMPT), *reply.ids]) == PROMPT + heard.text
    assert last.finish == reply.finished and last.problem == ""
    assert [p.origin for p in heard.pieces[:-1]] == [token.origin for token in reply.tokens]
    assert [p.t for p in heard.pieces[:-1]] == [token.t for token in reply.tokens]
    figures = last.figures
    assert (figures.tokens, figures.rounds) == (len(reply.tokens), len(reply.rounds))
    assert figures.seconds == reply.seconds > 0
    sums = ledger.sums("bytes", ("direction", "kind"), what="crossing")
    for direction, kind in (("up", "offer"), ("down", "verdict")):
        every = sum(count for (way, _), count in sums.items() if way == direction)
        mine = sums.get((direction, kind), 0)
        assert getattr(figures, direction) == every
        assert getattr(figures, f"{kind}s") == mine
        assert (mine > 0) == (method != "device-only")
    spent = ledger.total("joules")
    assert figures.device_joules + figures.edge_joules == pytest.approx(spent) and spent > 0
    assert figures.edge_joules == pytest.approx(ledger.total("joules", sender="edge", what="work"))
    assert figures.accepted == sum(round.accepted for round in reply.rounds)


def test_figures_only_grow_and_one_piece_ends(service: Service, hear: Callable[..., Any]) -> None:
    pieces = hear(service, PROMPT, 24, seed=1).end().pieces
    for before, after in itertools.pairwise(pieces):
        assert all(a <= b for a, b in zip(before.figures, after.figures, strict=True))
        assert before.t <= after.t
    assert [p.figures.tokens for p in pieces[:-1]] == list(range(1, len(pieces)))
    assert [bool(p.finish) for p in pieces] == [False] * (len(pieces) - 1) + [True]


def test_the_seed_decides_and_cloud_only_is_plain_decoding(
    service: Service, pair: tuple[Language, Language], hear: Callable[..., Any]
) -> None:
    target = pair[0]
    texts = [
        hear(service, PROMPT, 24, seed=seed, method="cloud-only").end().text for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    ids = target.encode(PROMPT)
    plain = generate(target.model, [ids], 24, Law(0.8), seeds.key(1), stop=target.stop)[0]
    assert target.decode(plain) == PROMPT + texts[0]


def test_texts_at_once_are_their_solo_texts_in_fewer_forwards(
    service: Service, hear: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[int] = []
    extend = type(service.judging.memory).extend

    def counted(self: Any, slots: list[int], *args: Any) -> torch.Tensor:
        forwards.append(len(slots))
        return extend(self, slots, *args)

    monkeypatch.setattr(type(service.judging.memory), "extend", counted)
    asks = [
        {"seed": seed, "method": METHODS[seed % len(METHODS)], "prompt": PROMPT + " is" * seed}
        for seed in range(10)
    ]
    alone = [hear(service, tokens=20, **ask).end().pieces for ask in asks]
    one_by_one = len(forwards)
    forwards.clear()
    together_ = [heard.end().pieces for heard in [hear(service, tokens=20, **ask) for ask in asks]]
    for a, b in zip(alone, together_, strict=True):
        strip = [p._replace(figures=p.figures._replace(wall=0.0)) for p in a]
        assert strip == [p._replace(figures=p.figures._replace(wall=0.0)) for p in b]
    assert len(forwards) < one_by_one / 2 and max(forwards) > 1


def test_a_stop_string_ends_the_text_before_it(service: Service, hear: Callable[..., Any]) -> None:
    whole = hear(service, PROMPT, 40, seed=3).end().text
    stop = whole[len(whole) // 2 :][:5]
    heard = hear(service, PROMPT, 40, seed=3, stop=("never said", stop)).end()
    assert heard.text == whole[: whole.index(stop)]
    assert heard.pieces[-1].finish == "stop"
    told = ""
    for piece in heard.pieces:
        told += "".join(span.text for span in piece.spans)
        assert heard.text.startswith(told)


def _idle(service: Service) -> bool:
    gauges = service.gauges()
    return gauges["isthmus_sessions_active"] == gauges["isthmus_sessions_waiting"] == 0


def _free(service: Service) -> bool:
    return _idle(service) and not any(
        engine.memory._lengths for engine in (service.judging, service.drafting) if engine
    )


def _soon(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("it does not come to that")


def test_a_cancelled_text_ends_and_frees_its_memory(pair: tuple[Language, Language]) -> None:
    service = Service(*pair)
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    held = threading.Event()
    text: list[Text] = []

    def listen(piece: Piece) -> None:
        pieces.put(piece)
        if piece.figures.tokens == 3:
            assert held.wait(30)
            text[0].cancel()

    ids = tuple(pair[0].encode(PROMPT).tolist())
    text.append(service.start(Ask(ids, 400, Law(1.0), 2), listen))
    held.set()
    _soon(lambda: _free(service))
    got = [pieces.get() for _ in range(pieces.qsize())]
    assert got[-1].finish == "cancelled" and 3 <= got[-1].figures.tokens < 12
    assert len(service.judging.memory._free) == 1  # the slot it had
    service.close()


def test_a_listener_that_fails_ends_its_text_and_no_other(
    service: Service, hear: Callable[..., Any]
) -> None:
    def broken(piece: Piece) -> None:
        raise RuntimeError("nobody is there")

    ids = tuple(service.language.encode(PROMPT).tolist())
    service.start(Ask(ids, 400, Law(0.8), 1), broken)
    other = hear(service, PROMPT, 24, seed=1).end()
    assert other.pieces[-1].finish in ("stop", "length")
    _soon(lambda: _free(service))


def test_what_a_model_fails_at_fails_for_who_asked_and_nobody_later(
    service: Service, hear: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(service.judging.memory, "extend", lambda *args: 1 / 0)
        failed = [hear(service, PROMPT, seed=seed) for seed in range(3)]
        for heard in failed:
            assert heard.end().pieces[-1].finish == "error"
            assert "defect" in heard.pieces[-1].problem
    _soon(lambda: _free(service))
    assert hear(service, PROMPT, seed=1).end().pieces[-1].finish in ("stop", "length")


def test_too_many_texts_are_refused_and_those_that_wait_are_made(
    pair: tuple[Language, Language], hear: Callable[..., Any]
) -> None:
    service = Service(*pair, at_once=1, waiting=2)
    gate = threading.Event()
    ids = tuple(pair[0].encode(PROMPT).tolist())
    service.start(Ask(ids, 8), lambda piece: gate.wait(60) and None)
    waiting = [hear(service, PROMPT, seed=seed) for seed in (1, 2)]
    with pytest.raises(Busy, match="3 texts"):
        hear(service, PROMPT)
    gate.set()
    assert all(heard.end().text for heard in waiting)
    _soon(lambda: _free(service))
    service.close()
    with pytest.raises(Busy, match="closing"):
        hear(service, PROMPT)
    assert not service.alive


def test_closing_ends_every_text(pair: tuple[Language, Language], hear: Callable[..., Any]) -> None:
    service = Service(*pair, at_once=2)
    heard = [hear(service, PROMPT, 400, seed=seed) for seed in range(5)]
    service.close()
    ends = {one.end().pieces[-1].finish for one in heard}
    assert ends <= {"cancelled", "stop"} and "cancelled" in ends
    assert _free(service)


def test_nothing_grows_with_the_number_of_texts(service: Service) -> None:
    ids = tuple(service.language.encode(PROMPT).tolist())
    ended = queue.SimpleQueue[str]()
    texts = [
        weakref.ref(service.start(Ask(ids, 8, seed=seed), lambda p: p.finish and ended.put("")))
        for seed in range(12)
    ]
    for _ in texts:
        ended.get(timeout=60)
    _soon(lambda: _free(service))
    gc.collect()
    assert [text() for text in texts] == [None] * 12
    assert not service.judging._mine and not service.judging._asked


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        ({"method": "dsdd"}, "nearest: dssd"),
        ({"method": "/etc/passwd.py:x"}, "method"),
        ({"link": "wify"}, "nearest: wifi"),
        ({"link": "wifi,attempts=1e9"}, "link"),
        ({"settings": {"gama": 3}}, "nearest: gamma"),
        ({"settings": {"gamma": 65}}, "gamma"),
        ({"ids": (5000,)}, "prompt"),
        ({"ids": tuple([5] * 600)}, "prompt"),
    ],
)
def test_what_cannot_be_decoded_is_one_line(
    service: Service, ask: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        service.start(Ask(**{"ids": (5, 6), **ask}), print)


def test_models_and_methods_must_go_together(pair: tuple[Language, Language]) -> None:
    target, draft = pair
    with pytest.raises(InputError, match="without a draft"):
        Service(target, None)
    with pytest.raises(InputError, match="fallback"):
        Service(target, None, method="cloud-only", fallback="device")
    with pytest.raises(InputError, match="nearest: phone"):
        Service(target, draft, device="fone")
    with pytest.raises(InputError, match="at_once"):
        Service(target, draft, at_once=0)
    alone = Service(target, None, method="cloud-only")
    assert list(alone.methods) == ["cloud-only"] and alone.alive
    alone.close()


def test_of_two_engines_both_get_their_turn(pair: tuple[Language, Language]) -> None:
    """One text that asks the first engine without end does not keep the other's waiting."""
    meeting = Meeting()
    first, second = (meeting.engine(one.model) for one in pair)
    done = threading.Event()

    def busy() -> None:
        with meeting.part():
            slot = first.open()
            for _ in range(200):
                if done.is_set():
                    return
                first.rows(slot, [5], 1).get()

    def once() -> None:
        with meeting.part():
            second.rows(second.open(), [5, 6], 1).get()
            done.set()

    threads = [threading.Thread(target=busy), threading.Thread(target=once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done.is_set() and first.memory.nbytes() and not first._mine and not second._mine
