"""Bytes from strangers: only WireError, bounded memory, nothing half done."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import tracemalloc
from collections.abc import Iterator

import pytest
import torch

from isthmus.wire.message import Field, Message, Schema, TensorSpec, WireError, decode, encode

FIELDS = {
    "round": Field("u16"),
    "loss": Field("f32"),
    "last": Field("bool"),
    "note": Field("str", limit=30),
    "tag": Field("bytes", limit=30),
}
SPECS = {
    "w": TensorSpec(torch.float32, (None, 3)),
    "mask": TensorSpec(torch.bool, (4,)),
    "n": TensorSpec(torch.int64, ()),
}
SCHEMA = Schema("probe", 5, FIELDS, SPECS, max_bytes=1 << 16)
OPEN = Schema("probe", 5, FIELDS, None, max_bytes=1 << 16)
MESSAGE = Message(
    "probe",
    {"round": 3, "loss": 0.5, "last": False, "note": "hello", "tag": b"abc"},
    {
        "w": torch.arange(6.0).view(2, 3),
        "mask": torch.tensor([True, False, False, True]),
        "n": torch.tensor(-4),
    },
)


@contextlib.contextmanager
def traced() -> Iterator[list[int]]:
    """The most memory in bytes that the block held, as the first entry of the list."""
    most: list[int] = []
    tracemalloc.start()
    try:
        yield most
        most.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def survives(data: bytes, schema: Schema) -> bool:
    """True when `data` decodes to a message that its own schema would send; anything but a
    message or a WireError fails the test."""
    before = bytes(data)
    try:
        message = decode(data, schema)
    except WireError as error:
        assert error.field and error.problem
        return False
    finally:
        assert data == before
    assert sum(x.nbytes for x in message.tensors.values()) <= len(data)
    encode(message, schema)
    return True


def mutate(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out)) if out else 0
        match rng.randrange(5):
            case 0 if out:
                out[at] = rng.randrange(256)
            case 1 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at : at + rng.randint(1, 9)]
            case 3:
                out[at:at] = rng.randbytes(rng.randint(1, 9))
            case _:
                # Structure-aware: a piece of the message copied elsewhere.
                start = rng.randrange(len(out) + 1)
                out[at:at] = out[start : start + rng.randint(1, 40)]
    return bytes(out)


@pytest.mark.parametrize("layout", ["described", "compact"])
@pytest.mark.parametrize("schema", [SCHEMA, OPEN], ids=["closed", "open"])
def test_ten_thousand_random_and_mutated_messages(layout: str, schema: Schema) -> None:
    rng = random.Random(f"{layout}{schema.tensors is None}")
    good = encode(MESSAGE, SCHEMA, layout)
    assert survives(good, SCHEMA)
    accepted = 0
    for i in range(10_000):
        match i % 4:
            case 0:
                data = rng.randbytes(rng.randrange(200))
            case 1:
                # A sound start, then noise: reaches deeper than noise alone.
                cut = rng.randrange(len(good))
                data = good[:cut] + rng.randbytes(rng.randrange(64))
            case _:
                data = mutate(good, rng)
        accepted += survives(data, schema)
    assert accepted < 10_000


def header(entries: object, body: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


META = {
    "kind": "probe",
    "round": "3",
    "loss": "0.5",
    "last": "true",
    "note": "",
    "tag": "",
}


def entry(shape: list, low: int, high: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [low, high]}


HOSTILE = {
    "endless header": struct.pack("<Q", 2**63) + b"{}",
    "long header": struct.pack("<Q", 60000) + b" " * 60000,
    "deep": header(b'{"a":' + b"[" * 30000),
    "not an object": header([1]),
    "no metadata": header({}),
    "metadata a list": header({"__metadata__": []}),
    "not utf-8": header(b'{"\xff": 1}'),
    "nan": header(b'{"a": NaN}'),
    "huge number": header(b'{"a": ' + b"9" * 5000 + b"}"),
    "twice": header(b'{"__metadata__":{"kind":"probe","kind":"probe"}}'),
    "number field": header({"__metadata__": META | {"round": 3}}),
    "plus": header({"__metadata__": META | {"round": "+3"}}),
    "underscore": header({"__metadata__": META | {"round": "1_0"}}),
    "other digits": header({"__metadata__": META | {"round": "\u0663"}}),
    "lone surrogate": header(
        b'{"__metadata__":' + json.dumps(META | {"note": "\ud800"}).encode() + b"}"
    ),
    "kind": header({"__metadata__": META | {"kind": "other"}}),
    "session": header({"__metadata__": META | {"session": "4294967296"}}),
    "no base64": header({"__metadata__": META | {"tag": "a"}}),
    "overlap": header(
        {"__metadata__": META, "a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"
    ),
    "hole": header({"__metadata__": META, "a": entry([1], 4, 8)}, b"12345678"),
    "trailing": header({"__metadata__": META, "a": entry([1], 0, 4)}, b"12345678"),
    "beyond": header({"__metadata__": META, "a": entry([3], 0, 12)}, b"12345678"),
    "negative": header({"__metadata__": META, "a": entry([-1], 0, 4)}, b"1234"),
    "bool size": header({"__metadata__": META, "a": entry([True], 0, 4)}, b"1234"),
    "shape overflow": header({"__metadata__": META, "a": entry([2**40, 2**40, 0], 0, 0)}),
    "shape wraps": header({"__metadata__": META, "a": entry([2**62, 4], 0, 0)}),
    "many axes": header({"__metadata__": META, "a": entry([1] * 100, 0, 4)}, b"1234"),
    "dtype": header({"__metadata__": META, "a": entry([1], 0, 4, "F33")}, b"1234"),
    "bool byte": header({"__metadata__": META, "a": entry([2], 0, 2, "BOOL")}, b"\x01\x02"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str) -> None:
    assert not survives(HOSTILE[name], OPEN)
    assert not survives(HOSTILE[name], SCHEMA)


def test_the_open_schema_takes_the_sound_neighbour_of_the_hostile_ones() -> None:
    assert survives(header({"__metadata__": META, "a": entry([2], 0, 8)}, b"\0" * 8), OPEN)


def test_a_size_that_promises_more_than_was_sent_allocates_nothing() -> None:
    schema = Schema("p", 1, {"b": Field("bytes", limit=1 << 40)}, {"w": SPECS["w"]}, 1 << 40)
    sound = encode(Message("p", {"b": b""}, {"w": torch.zeros(1, 3)}), schema, "compact")
    claims = [
        sound[:12] + b"\xff" * 8 + b"\x7f" + sound[13:],  # a field of 2^63 - 1 bytes
        sound[:13] + b"\xff" * 5 + b"\x01" + sound[14:],  # a tensor of 2^36 rows
        sound[:13] + b"\xff" * 12,
        sound[:13] + b"\x81\x00" + sound[14:],  # 1, written in two bytes
        struct.pack("<Q", 2**39) + sound[8:],
    ]
    with traced() as most:
        for data, name in zip(claims, ["b", "w", "w", "w", "framing"], strict=True):
            with pytest.raises(WireError) as caught:
                decode(data, schema)
            assert caught.value.field == name
    assert most[0] < 1 << 18


def test_memory_follows_the_input() -> None:
    schema = Schema.of_tree("m", 1, {}, {"w": torch.zeros(1 << 18)})
    data = encode(Message("m", {}, {"w": torch.ones(1 << 18)}), schema)
    with traced() as most:
        decode(data, schema)
    assert len(data) < most[0] < 1.1 * len(data) + (1 << 16)
