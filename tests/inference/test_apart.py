"""Device and edge as real processes: the same tokens, and what happens when one is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inference import remote_edge, tiny

import isthmus
from isthmus.errors import InputError
from isthmus.inference.apart import decode_at
from isthmus.inference.edge import Edge
from isthmus.inference.engine import Engine
from isthmus.inference.messages import OPEN, fingerprint
from isthmus.inference.together import Reply, decode
from isthmus.models.decode import Law
from isthmus.wire.clock import Action, After, Event
from isthmus.wire.ledger import Ledger
from isthmus.wire.message import Message, Schema, encode, peek
from isthmus.wire.transport import InProcess, drive

TOKEN = "a token of enough characters"
EDGED = ["full-row", "tk-slt", "dssd", "cloud-only"]


def started(ledger: str = "") -> tuple[subprocess.Popen[str], str]:
    """An edge in another process, and its address."""
    source, root = Path(isthmus.__path__[0]).parent, Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, remote_edge.__file__, TOKEN, ledger],
        env=os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{root}"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as lines:
        return process, f"127.0.0.1:{int(lines.readline())}"


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edge") / "ledger.jsonl"


@pytest.fixture(scope="module")
def address(book: Path) -> Iterator[str]:
    process, where = started(str(book))
    yield where
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    target = tiny.fresh()
    return tiny.language(target), tiny.language(tiny.near(target))


OPTIONS: dict[str, Any] = {"max_new_tokens": 20, "seed": 4, "law": Law(0.9), "stop": ()}


@pytest.mark.parametrize("method", EDGED)
def test_apart_as_together(address: str, pair: tuple[Any, Any], method: str) -> None:
    texts, books = tiny.prompts(3), (Ledger(), Ledger())
    draft = None if method == "cloud-only" else pair[1]
    link = "lora"  # one that makes a method adapt
    options = OPTIONS | {"method": method, "link": link}
    together = decode(*pair, texts, ledger=books[0], **options)
    heard: list[int] = []
    apart = decode_at(
        address, draft, texts, token=TOKEN, timeout=60.0, vocab=tiny.VOCAB, ledger=books[1],
        listen=lambda i, token: heard.append(token.id), **options,
    )  # fmt: skip
    assert [r.ids for r in apart] == [r.ids for r in together] and len(together[0].ids) == 20
    assert heard == [id for reply in apart for id in reply.ids]
    shape = [[round[:3] for round in reply.rounds] for reply in apart]
    assert shape == [[round[:3] for round in reply.rounds] for reply in together]
    for reply in apart:
        times = [token.t for token in reply.tokens]
        assert times == sorted(times) and times[0] > 0 and reply.seconds == times[-1]
        assert reply.finished == "length" and not reply.problem
    # The same crossings went up, each with the four bytes of its frame.
    by = ("kind", "session", "round")
    up = [book.sums("bytes", by, to="edge", what="crossing") for book in books]
    assert up[1] == {key: bytes + 4 for key, bytes in up[0].items()}
    paper = [book.sums("values", by, to="edge", what="crossing") for book in books]
    assert paper[0] == paper[1]


def test_a_device_only_text_needs_no_edge(pair: tuple[Any, Any]) -> None:
    options = OPTIONS | {"method": "device-only"}
    (alone,) = decode_at("127.0.0.1:9", pair[1], tiny.prompts(1), **options)
    assert alone.ids == decode(None, pair[1], tiny.prompts(1), **options)[0].ids
    assert not alone.problem and alone.finished == "length"


def test_several_devices_at_one_edge(address: str, pair: tuple[Any, Any]) -> None:
    texts = tiny.prompts(4)
    drafts = [tiny.language(tiny.near(pair[0].model)) for _ in texts]
    found: dict[int, Reply] = {}

    def device(i: int) -> None:
        method = EDGED[i]
        (found[i],) = decode_at(
            address, drafts[i], [texts[i]], token=TOKEN, timeout=60.0, method=method, **OPTIONS
        )

    threads = [threading.Thread(target=device, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    for i in range(4):
        (reply,) = decode(*pair, [texts[i]], method=EDGED[i], **OPTIONS)
        assert found[i].ids == reply.ids


@pytest.mark.parametrize("token", [None, "another token of this length"])
def test_without_the_token_nobody_is_served(
    address: str, pair: tuple[Any, Any], token: str | None
) -> None:
    for fallback in ("none", "device"):
        (reply,) = decode_at(
            address, pair[1], tiny.prompts(1), token=token, fallback=fallback, **OPTIONS
        )
        assert "no greeting" in reply.problem and "\n" not in reply.problem
        assert reply.finished == ("error" if fallback == "none" else "length")
        assert {token.origin for token in reply.tokens} == (
            set() if fallback == "none" else {"device"}
        )


def test_an_edge_that_knows_another_tokenizer_says_so(address: str, pair: tuple[Any, Any]) -> None:
    options: dict[str, Any] = OPTIONS | {"token": TOKEN, "method": "cloud-only"}
    (reply,) = decode_at(address, None, tiny.prompts(1), vocab=tiny.VOCAB - 1, **options)
    assert reply.finished == "error" and "refuses: fingerprint" in reply.problem
    (reply,) = decode_at(address, None, [[tiny.VOCAB - 1]], vocab=tiny.VOCAB, **options)
    assert reply.finished == "length"


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":1", "localhost:x", "a:70000"])
def test_an_address_has_a_host_and_a_port(pair: tuple[Any, Any], address: str) -> None:
    with pytest.raises(InputError, match="host:port"):
        decode_at(address, pair[1], tiny.prompts(1))


def test_a_device_without_models_says_what_its_ids_mean() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        decode_at("localhost:1", None, tiny.prompts(1), method="cloud-only")


@pytest.mark.parametrize("method", ["dssd", pytest.param("cloud-only", marks=pytest.mark.slow)])
def test_an_edge_that_is_killed_in_the_middle_of_a_text(pair: tuple[Any, Any], method: str) -> None:
    text = tiny.prompts(1)
    (whole,) = decode(*pair, text, method=method, **OPTIONS)
    process, address = started()
    heard: list[int] = []

    def listen(_: int, token: Any) -> None:
        heard.append(token.id)
        if len(heard) == 6:
            process.kill()
            process.wait()

    options = OPTIONS | {"token": TOKEN, "method": method, "listen": listen}
    if method == "cloud-only":  # many tokens may be on their way by now
        options |= {"max_new_tokens": 80}
        (whole,) = decode(*pair, text, **OPTIONS | {"method": method, "max_new_tokens": 80})
    try:
        (reply,) = decode_at(address, pair[1], text, fallback="device", **options)
    finally:
        process.kill()
    told = sum(token.origin != "device" for token in reply.tokens)
    assert 6 <= told <= len(whole.ids) and reply.finished == "length"
    assert reply.ids[:told] == whole.ids[:told] and heard == reply.ids
    if told < len(whole.ids):
        assert reply.problem.startswith("edge ")
    heard.clear()
    (gone,) = decode_at(address, pair[1], text, **options | {"timeout": 5.0})
    assert gone.finished == "error" and "cannot be reached" in gone.problem and not heard


# ---------------------------------------------------------------- how messages come before timers


class Gathering:
    """Notes what comes, and asks for a `batch` at the first message after one."""

    name = "edge"

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.batches: list[int] = []

    def on(self, event: Event, now: float) -> Iterable[Action]:
        if event.kind == "batch":
            self.batches.append(len(self.seen))
            self.seen.clear()
            return []
        self.seen.append(1)
        return [After(0.0, Event("batch"))] if len(self.seen) == 1 else []


@pytest.mark.parametrize(("count", "first"), [(5, 5), (1000, 257)])
def test_what_has_arrived_comes_before_a_timer_of_now(count: int, first: int) -> None:
    """All of it is one batch, but a flood does not keep a timer from its turn for ever."""
    hub: Any = {}
    edge, device = InProcess("edge", hub), InProcess("device", hub)
    tick = Schema("tick", 1)
    for sequence in range(1, count + 1):
        device.send("edge", encode(Message("tick", {}, {}), tick, "compact", 1, sequence))
    party = Gathering()
    drive(
        party, edge, kinds={1: "tick"}, seconds=30.0,
        until=lambda: sum(party.batches) + len(party.seen) == count and not party.seen,
    )  # fmt: skip
    assert party.batches[0] in (first, first + 1) and sum(party.batches) == count


def test_what_waits_for_a_live_edge_is_one_batch() -> None:
    """Six devices have asked before the edge looks: one forward reads all their prompts."""
    edge = Edge(Engine(tiny.fresh()), fingerprint=fingerprint(None, tiny.VOCAB))
    sizes: list[int] = []
    read = edge.judging.read
    edge.judging.read = lambda batch: sizes.append(len(batch)) or read(batch)  # type: ignore
    hub: Any = {}
    there = InProcess("edge", hub)
    devices = [InProcess(f"device/{i}", hub) for i in range(6)]
    for device, prompt in zip(devices, tiny.prompts(6), strict=True):
        fields = {
            "method": "dssd", "settings": "{}", "temperature": 1.0, "top_k": 0, "top_p": 1.0,
            "key": 5, "max_new_tokens": 20, "fingerprint": edge.fingerprint,
        }  # fmt: skip
        tensors = {"prompt": torch.tensor(prompt), "stop": torch.empty(0)}
        tensors = {name: tensor.to(torch.int32) for name, tensor in tensors.items()}
        device.send("edge", encode(Message("open", fields, tensors), OPEN, session=1, sequence=1))
    drive(edge, there, seconds=30.0, until=lambda: bool(sizes) and not edge._fresh)
    assert sizes == [6] and len(edge.texts) == 6
    for device in devices:
        answer = device.receive(0.0)
        assert answer is not None and peek(answer.data).schema == "opened"
    for device in devices[:4]:
        device.close()
    drive(edge, there, seconds=30.0, until=lambda: len(edge.texts) == 2)
    assert {who for who, _ in edge.texts} == {"device/4", "device/5"}
