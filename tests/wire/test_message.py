"""Messages: both layouts, their sizes, what they refuse."""

from __future__ import annotations

import json
import math
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import tree as trees
from isthmus.errors import InputError
from isthmus.wire.message import (
    Field,
    Message,
    Schema,
    TensorSpec,
    WireError,
    check_finite,
    decode,
    encode,
    peek,
)
from isthmus.wire.schema import DTYPES

LAYOUTS = ("described", "compact")
FIELDS = {
    "round": Field("u16"),
    "tiny": Field("u8"),
    "count": Field("u32", high=1000),
    "big": Field("u64"),
    "signed": Field("i64", low=-5),
    "loss": Field("f32"),
    "rate": Field("f64", low=0.0, high=1.0),
    "last": Field("bool"),
    "note": Field("str", limit=20),
    "tag": Field("bytes", limit=8),
}
VALUES = {
    "round": 65535,
    "tiny": 7,
    "count": 1000,
    "big": 2**64 - 1,
    "signed": -5,
    "loss": 0.1,
    "rate": 0.1,
    "last": True,
    "note": 'a "quote"\n\u00e4\U0001f600',
    "tag": b"\x00\xff\x01",
}
TENSORS = {
    "w": torch.tensor([[1.5, -2.0, 0.25], [3.0, 4.0, 5.0]]),
    "n": torch.tensor(12345678901, dtype=torch.int64),
    "mask": torch.tensor([True, False, True]),
    "half": torch.tensor([0.5, -0.125], dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
}
SCHEMA = Schema.of_tree("probe", 513, FIELDS, TENSORS)
MESSAGE = Message("probe", VALUES, TENSORS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_of_every_field_type(layout: str) -> None:
    data = encode(MESSAGE, SCHEMA, layout, session=2**32 - 1, sequence=77)
    back = decode(data, SCHEMA)
    assert back.fields == VALUES | {"loss": struct.unpack("f", struct.pack("f", 0.1))[0]}
    assert trees.equal(back.tensors, TENSORS) and list(back.tensors) == list(TENSORS)
    assert (back.session, back.sequence) == (2**32 - 1, 77)
    # A decoded message is a message again, and says the same bytes.
    assert encode(back, SCHEMA, layout) == data


def test_compact_is_framing_plus_the_packed_declaration() -> None:
    data = encode(MESSAGE, SCHEMA, "compact")
    fields = 2 + 1 + 4 + 8 + 8 + 4 + 8 + 1
    texts = (1 + len(VALUES["note"].encode())) + (1 + 3)
    assert len(data) - fields - texts - trees.nbytes(TENSORS) == 12


def test_a_fixed_shape_costs_nothing_and_an_open_size_one_varint() -> None:
    x = {"x": torch.arange(300.0)}
    closed = Schema("a", 1, {}, {"x": TensorSpec(torch.float32, (300,))})
    opened = Schema("a", 1, {}, {"x": TensorSpec(torch.float32, (None,))})
    message = Message("a", {}, x)
    assert len(encode(message, closed, "compact")) == 12 + 1200
    data = encode(message, opened, "compact")
    assert len(data) == 12 + 2 + 1200
    assert torch.equal(decode(data, opened).tensors["x"], x["x"])


def test_described_is_a_safetensors_file() -> None:
    data = encode(MESSAGE, SCHEMA, session=5, sequence=6)
    assert trees.equal(
        dict(sorted(safetensors.torch.load(data).items())), dict(sorted(TENSORS.items()))
    )
    (length,) = struct.unpack_from("<Q", data)
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert metadata["note"] == VALUES["note"] and metadata["big"] == str(2**64 - 1)
    assert (metadata["kind"], metadata["session"], metadata["sequence"]) == ("probe", "5", "6")


def test_a_file_written_by_safetensors_is_a_message() -> None:
    schema = Schema.of_tree("file", 1, {"round": Field("u8"), "loss": Field("f64")}, TENSORS)
    data = safetensors.torch.save(TENSORS, {"kind": "file", "round": "3", "loss": "2.5e-3"})
    back = decode(data, schema)
    assert back.fields == {"round": 3, "loss": 0.0025} and trees.equal(back.tensors, TENSORS)


def test_open_tensors_travel_described_only() -> None:
    schema = Schema("any", 9, tensors=None)
    message = Message("any", {}, {"b": torch.ones(2, 3), "a": torch.zeros(1, dtype=torch.int16)})
    assert trees.equal(decode(encode(message, schema), schema).tensors, message.tensors)
    with pytest.raises(WireError, match="template"):
        encode(message, schema, "compact")


def test_peek_tells_schema_and_crossing() -> None:
    assert peek(encode(MESSAGE, SCHEMA, "compact", 3, 4)) == (513, 3, 4)
    assert peek(encode(MESSAGE, SCHEMA, "described", 3, 4)) == ("probe", 3, 4)
    for data in (b"", b"\x01" * 11, b"\x02\0\0\0\0\0\0\0{}"):
        with pytest.raises(WireError):
            peek(data)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_type_crosses(dtype: torch.dtype, layout: str) -> None:
    x = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    schema = Schema.of_tree("t", 1, {"odd": Field("u8")}, {"x": x})
    back = decode(encode(Message("t", {"odd": 1}, {"x": x}), schema, layout), schema)
    assert back.tensors["x"].dtype == dtype
    assert torch.equal(back.tensors["x"].view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(10.0)[::5][:1],
        torch.arange(12.0).view(3, 4).T,
        torch.arange(12.0)[::3],
        torch.ones(1).expand(5),
        torch.arange(3.0, requires_grad=True),
        torch.empty(3, 0).T,
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_do_not_lie_in_order(x: torch.Tensor, layout: str) -> None:
    schema = Schema.of_tree("s", 1, {}, {"x": x})
    back = decode(encode(Message("s", {}, {"x": x}), schema, layout), schema)
    assert torch.equal(back.tensors["x"], x)


def test_writable_input_is_viewed_and_read_only_input_is_not() -> None:
    schema = Schema.of_tree("v", 1, {}, {"x": torch.zeros(4)})
    data = bytearray(encode(Message("v", {}, {"x": torch.arange(4.0)}), schema))
    decode(data, schema).tensors["x"][1] = 9.0
    assert decode(data, schema).tensors["x"].tolist() == [0.0, 9.0, 2.0, 3.0]
    frozen = bytes(data)
    decode(frozen, schema).tensors["x"][1] = -1.0
    assert decode(frozen, schema).tensors["x"].tolist() == [0.0, 9.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("round", -1),
        ("round", 65536),
        ("round", 1.0),
        ("round", True),
        ("count", 1001),
        ("signed", -6),
        ("big", 2**64),
        ("loss", 1e39),
        ("loss", "1"),
        ("rate", 1.5),
        ("rate", math.nan),
        ("last", 1),
        ("note", "x" * 21),
        ("note", b"x"),
        ("note", "\ud800"),
        ("tag", b"123456789"),
    ],
)
def test_a_bad_field_is_named_before_it_is_sent(name: str, value: object) -> None:
    with pytest.raises(WireError) as caught:
        encode(Message("probe", VALUES | {name: value}, TENSORS), SCHEMA)
    assert caught.value.field == name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_receiver_checks_what_a_careless_sender_does_not(layout: str) -> None:
    loose = Schema.of_tree("probe", 513, FIELDS | {"count": Field("u32")}, TENSORS)
    data = encode(Message("probe", VALUES | {"count": 1001}, TENSORS), loose, layout)
    with pytest.raises(WireError) as caught:
        decode(data, SCHEMA)
    assert caught.value.field == "count"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_finite_guard_is_the_callers_policy(layout: str, bad: float) -> None:
    x = {"a": torch.ones(3), "w": torch.tensor([1.0, bad, 2.0]), "h": torch.ones(2).half()}
    schema = Schema.of_tree("g", 1, {"loss": Field("f32")}, x)
    data = encode(Message("g", {"loss": 1.0}, x), schema, layout)
    with pytest.raises(WireError, match=r"^w: "):
        decode(data, schema)
    assert torch.equal(
        decode(data, schema, finite=False).tensors["w"].isfinite(), x["w"].isfinite()
    )
    field = encode(Message("g", {"loss": bad}, x), schema, layout)
    with pytest.raises(WireError, match=r"^loss: "):
        decode(field, schema)
    exempt = Schema(
        "g",
        1,
        schema.fields,
        dict(schema.tensors) | {"w": TensorSpec(torch.float32, (3,), finite=False)},
    )
    assert decode(data, exempt).tensors["a"].sum() == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_check_finite_names_the_tensor(dtype: torch.dtype) -> None:
    good = torch.tensor([1.0, -2.0]).to(dtype)
    check_finite({"good": good, "empty": torch.empty(0), "int": torch.tensor([2**31])})
    with pytest.raises(WireError, match=r"^bad: "):
        check_finite({"good": good, "bad": torch.tensor([1.0, math.inf]).to(dtype)})


def test_names_must_be_those_declared() -> None:
    for fields, tensors, name in (
        ({}, TENSORS, "round"),
        (VALUES | {"more": 1}, TENSORS, "more"),
        (VALUES, {}, "w"),
        (VALUES, TENSORS | {"more": torch.ones(1)}, "more"),
        (VALUES, TENSORS | {"w": torch.ones(3, 2)}, "w"),
        (VALUES, TENSORS | {"w": torch.ones(2, 3).double()}, "w"),
    ):
        with pytest.raises(WireError) as caught:
            encode(Message("probe", fields, tensors), SCHEMA)
        assert caught.value.field == name
    with pytest.raises(WireError, match="kind"):
        encode(Message("other", VALUES, TENSORS), SCHEMA)


def test_size_is_bounded_both_ways() -> None:
    data = encode(MESSAGE, SCHEMA)
    small = Schema.of_tree("probe", 513, FIELDS, TENSORS, max_bytes=len(data) - 1)
    for attempt in (lambda: encode(MESSAGE, small), lambda: decode(data, small)):
        with pytest.raises(WireError, match="at most"):
            attempt()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Field("u128"),
        lambda: Field("str", limit=-1),
        lambda: TensorSpec(torch.complex64, ()),
        lambda: TensorSpec(torch.float32, (-1,)),
        lambda: Schema("k", 65536),
        lambda: Schema("k", 1, {"session": Field("u8")}),
        lambda: Schema("k", 1, {}, {"__metadata__": TensorSpec(torch.float32, ())}),
    ],
)
def test_a_bad_declaration_is_refused(make) -> None:
    with pytest.raises(InputError):
        make()


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(InputError, match="described, compact"):
        encode(MESSAGE, SCHEMA, "packed")


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.int8, torch.int64, torch.bool])


@st.composite
def messages(draw):
    fields, values = {}, {}
    kinds = {
        "u8": st.integers(0, 255),
        "u64": st.integers(0, 2**64 - 1),
        "i64": st.integers(-(2**63), 2**63 - 1),
        "f32": st.floats(width=32, allow_nan=False, allow_infinity=False),
        "f64": st.floats(allow_nan=False, allow_infinity=False),
        "bool": st.booleans(),
        "str": st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
        "bytes": st.binary(max_size=9),
    }
    for i, kind in enumerate(draw(st.lists(st.sampled_from(list(kinds)), max_size=5))):
        fields[f"f{i}"] = Field(kind, limit=40)
        values[f"f{i}"] = draw(kinds[kind])
    specs, tensors = {}, {}
    for i in range(draw(st.integers(0, 3))):
        shape, dtype = draw(shapes), draw(dtypes)
        raw = torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(i))
        tensors[f"t{i}"] = (raw > 0 if dtype == torch.bool else raw).to(dtype)
        opened = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
        declared = tuple(None if o else size for o, size in zip(opened, shape, strict=True))
        specs[f"t{i}"] = TensorSpec(dtype, declared)
    return Message("h", values, tensors), Schema("h", 40000, fields, specs)


@settings(max_examples=150, deadline=None)
@given(messages(), st.sampled_from(LAYOUTS), st.integers(0, 2**32 - 1))
def test_what_is_sent_is_what_arrives(pair, layout: str, number: int) -> None:
    message, schema = pair
    data = encode(message, schema, layout, session=number, sequence=number // 3)
    back = decode(data, schema)
    assert back.fields == message.fields and trees.equal(back.tensors, message.tensors)
    assert (back.session, back.sequence) == (number, number // 3)
    assert repr(back.fields) == repr(message.fields)  # also the sign of zero
