"""What sessions cost on the virtual clock: closed forms against runs, sums against parts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from isthmus.bench import serving
from isthmus.bench.serving import PARTS, Served, as_embedded, as_large, break_even, serve, timed
from isthmus.inference import work
from isthmus.inference.engine import Engine
from isthmus.inference.session import Round
from isthmus.inference.together import Reply
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

SETTINGS: dict[str, dict[str, Any]] = {
    "cloud-only": {},
    "device-only": {},
    "full-row": {"gamma": 3},
    "tk-slt": {"gamma": 3, "adapt": False},
    "dssd": {"gamma": 3},
}


def served(method: str, link: Link) -> Served:
    return serve(method, link, serving.prompts(2, 16), as_embedded(), SETTINGS[method], new=12)


@pytest.mark.parametrize("method", SETTINGS)
def test_seconds_over_another_uplink_are_those_of_a_run_over_it(method: str) -> None:
    here = served(method, Link(up=3e6, down=40e6, latency=2e-3))
    there = served(method, Link(up=0.2e6, down=40e6, latency=11e-3))
    assert [reply.ids for reply in here.replies] == [reply.ids for reply in there.replies]
    assert here.at(0.2e6, 11e-3) == pytest.approx(there.seconds, rel=1e-9)
    assert there.at(3e6, 2e-3) == pytest.approx(here.seconds, rel=1e-9)
    assert here.at(3e6) == pytest.approx(here.seconds, rel=1e-12)
    if method != "device-only":
        assert there.seconds > 1.2 * here.seconds
    assert (here.up, here.down, here.sent) == (there.up, there.down, there.sent)


@pytest.mark.parametrize("method", SETTINGS)
def test_the_parts_of_virtual_time_add_up(method: str) -> None:
    seen = served(method, Link(up=1e6, down=20e6, latency=4e-3))
    assert list(seen.parts) == list(PARTS)
    assert sum(seen.parts.values()) == pytest.approx(seen.seconds, rel=1e-9)
    silent = {"cloud-only": {"draft"}, "device-only": {"verify", "up", "down"}}.get(method, set())
    for part in ("draft", "verify", "up", "down"):
        assert (seen.parts[part] == 0) == (part in silent)
    if method in ("full-row", "tk-slt", "dssd"):
        # Nothing overlaps: bits take their time on the air, messages two latencies a round.
        assert seen.parts["up"] == pytest.approx(8 * seen.sent / 1e6)
        assert seen.parts["waiting"] == pytest.approx(2 * seen.messages * 4e-3)


def test_parts_of_one_session_by_hand() -> None:
    """A draft of 1 s, 8000 bits up (1 s, and 0.5 s on the way), 0.25 s of judging, overlapped
    by the device's next draft for 0.1 s, 4000 bits down, cut at the last token."""
    link, ledger = Link(up=8000, down=16000, latency=0.5), Ledger()
    ledger.work(party="device/0", kind="draft", t=0.0, seconds=1.0)
    up = {"sender": "device/0", "receiver": "edge", "kind": "offer"}
    ledger.cross(**up, t=1.0, seconds=1.5, bytes=1000)
    ledger.work(party="edge", kind="verify", t=2.5, seconds=0.25)
    ledger.work(party="device/0", kind="draft", t=2.65, seconds=0.1)
    down = {"sender": "edge", "receiver": "device/0", "kind": "verdict"}
    ledger.cross(**down, t=2.75, seconds=0.75, bytes=500)
    ledger.cross(**up, t=3.5, seconds=1.5, bytes=1000)
    found = serving.spent(list(ledger.rows()), link, 3.5)
    expected = {"draft": 1.1, "verify": 0.15, "up": 1.0, "down": 0.25, "waiting": 1.0}
    assert found == pytest.approx(expected)


def of_rounds(*rounds: tuple[int, int], **more: Any) -> Served:
    """What these (drafted, accepted) rounds came to."""
    each = [Round(0, drafted, accepted, 0.0, 0, 0) for drafted, accepted in rounds]
    reply = Reply([0], [], each, 2.0, "length", "")
    counts = {"up": 0, "down": 0, "up_values": 0, "down_values": 0, "sent": 0, "messages": 0}
    return Served([reply], Link(up=1e6), **{**counts, **more}, parts={})


def test_acceptance_by_hand() -> None:
    """Of (4, 4), (4, 1), (3, 0), (0, 0): judged 4 + 2 + 1, accepted 5, in three rounds."""
    seen = of_rounds((4, 4), (4, 1), (3, 0), (0, 0))
    assert seen.acceptance == pytest.approx(5 / 7)
    assert seen.length == pytest.approx(5 / 3)
    assert [seen.standing(j) for j in range(4)] == pytest.approx([2 / 3, 1 / 2, 1.0, 1.0])
    assert math.isnan(of_rounds((0, 0)).acceptance) and math.isnan(of_rounds().length)


def test_break_even_is_where_both_take_as_long() -> None:
    slow = of_rounds(sent=1000)  # 2 s at 1 Mbit/s, of which 8 ms on the air
    quick = of_rounds(sent=40_000)
    quick = replace(quick, replies=[replace(quick.replies[0], seconds=2.2)])
    rate = break_even(quick, slow)
    assert rate == pytest.approx(8 * 39_000 / (1.992 - 1.88))
    assert quick.at(rate) == pytest.approx(slow.at(rate))
    assert quick.at(2 * rate) < slow.at(2 * rate) and quick.at(rate / 2) > slow.at(rate / 2)
    assert break_even(slow, quick) == math.inf
    lean = replace(quick, sent=0, replies=[replace(quick.replies[0], seconds=1.0)])
    assert break_even(lean, slow) == 0


def test_devices_take_the_time_they_are_given() -> None:
    target, draft = serving.pair()
    where = timed(0.013, 0.17)
    assert work.judging_seconds(Engine(draft.model), where.device, 0, 64) == pytest.approx(0.013)
    assert work.judging_seconds(Engine(target.model), where.edge, 0, 64) == pytest.approx(0.17)
    # 68 M parameters at 2e10 FLOP/s; 14 GB of weights at 600 GB/s
    large = as_large()
    assert work.judging_seconds(Engine(draft.model), large.device, 0, 64) == pytest.approx(6.8e-3)
    assert work.judging_seconds(Engine(target.model), large.edge, 0, 64) == pytest.approx(7 / 300)


def test_prompts_are_held_out_documents_without_an_end() -> None:
    found = serving.prompts(5, 16)
    end = serving.pair()[0].tokenizer.eos_token_id
    assert len({tuple(ids.tolist()) for ids in found}) == 5
    assert all(len(ids) == 16 and end not in ids[1:].tolist() for ids in found)
