"""A cohort in one pass: the bytes and the checks of one message at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import tree as trees
from isthmus.wire.message import (
    Field,
    Message,
    Parcel,
    Schema,
    TensorSpec,
    WireError,
    decode,
    decode_many,
    encode,
    encode_many,
)

LAYOUTS = ("described", "compact")


def joined(parts: list[bytes]) -> Parcel:
    data = bytearray(b"".join(parts))
    buffer = (
        torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    )
    return Parcel(buffer, torch.tensor([0, *map(len, parts)]).cumsum(0))


def one(schema: Schema, fields: dict, stacked: dict, i: int) -> Message:
    return Message(
        schema.kind,
        {name: values[i] for name, values in fields.items()},
        {name: x[i] for name, x in stacked.items()},
    )


VALUES = {
    "u8": st.integers(0, 255),
    "u16": st.integers(0, 2**16 - 1),
    "u32": st.integers(0, 2**32 - 1),
    "u64": st.integers(0, 2**64 - 1),
    "i64": st.integers(-(2**63), 2**63 - 1),
    "f32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "f64": st.floats(allow_nan=False, allow_infinity=False),
    "bool": st.booleans(),
    "str": st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    "bytes": st.binary(max_size=6),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64, torch.bool)


@st.composite
def cohorts(draw, kinds=tuple(VALUES)):
    n = draw(st.integers(0, 5))
    fields, columns = {}, {}
    for i, kind in enumerate(draw(st.lists(st.sampled_from(kinds), max_size=4))):
        fields[f"f{i}"] = Field(kind, limit=30)
        alike = draw(st.booleans())
        values = draw(st.lists(VALUES[kind], min_size=n, max_size=n))
        columns[f"f{i}"] = values[:1] * n if alike else values
    specs, stacked = {}, {}
    for i in range(draw(st.integers(0, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        raw = torch.randint(-99, 99, (n, *shape), generator=torch.Generator().manual_seed(i))
        stacked[f"t{i}"] = (raw > 0 if dtype == torch.bool else raw).to(dtype)
        opened = draw(st.booleans()) and n > 0
        specs[f"t{i}"] = TensorSpec(dtype, (None,) * len(shape) if opened else shape)
    if not columns and not stacked:
        fields["f"], columns["f"] = Field("u8"), [3] * n
    return Schema("h", 9, fields, specs), columns, stacked, n


@settings(max_examples=200, deadline=None)
@given(cohorts(), st.sampled_from(LAYOUTS))
def test_a_cohort_is_its_messages_side_by_side(cohort, layout: str) -> None:
    schema, columns, stacked, n = cohort
    sequence = [7 * i for i in range(n)]
    parcel = encode_many(schema, columns, stacked, layout, session=5, sequence=sequence)
    singles = [encode(one(schema, columns, stacked, i), schema, layout, 5, 7 * i) for i in range(n)]
    assert len(parcel) == n and [bytes(parcel[i]) for i in range(n)] == singles
    assert parcel.sizes.tolist() == list(map(len, singles))
    assert parcel.buffer.numel() == sum(map(len, singles))
    fields, tensors = decode_many(parcel, schema)
    assert repr(fields) == repr({name: list(values) for name, values in columns.items()})
    assert trees.equal(tensors, stacked)


def decoded_together_as_one_by_one(broken: Parcel, schema: Schema) -> None:
    """Either both refuse the messages, or both read the same from them."""
    try:
        each = [decode(broken[i], schema) for i in range(len(broken))]
    except WireError:
        each = []
    first = each[0].tensors if each else {}
    if not each or any(m.tensors[n].shape != x.shape for m in each for n, x in first.items()):
        with pytest.raises(WireError):
            decode_many(broken, schema)
        return
    fields, tensors = decode_many(broken, schema)
    assert repr(fields) == repr({name: [m.fields[name] for m in each] for name in schema.fields})
    assert trees.equal(tensors, trees.stack([dict(m.tensors) for m in each]) if first else {})


@settings(max_examples=150, deadline=None)
@given(
    cohorts(("u8", "u32", "f32", "f64", "bool")).filter(lambda c: c[3] > 1),
    st.sampled_from(LAYOUTS),
    st.data(),
)
def test_decoding_many_agrees_with_decoding_each(cohort, layout: str, data) -> None:
    schema, columns, stacked, _ = cohort
    parcel = encode_many(schema, columns, stacked, layout)
    buffer = parcel.buffer.clone()
    for _ in range(data.draw(st.integers(1, 2))):
        buffer[data.draw(st.integers(0, len(buffer) - 1))] ^= data.draw(st.integers(1, 255))
    decoded_together_as_one_by_one(Parcel(buffer, parcel.offsets), schema)


@settings(max_examples=150, deadline=None)
@given(
    cohorts(("u8", "u32", "f64")).filter(lambda c: c[3] > 0),
    st.sampled_from(LAYOUTS),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 3),
    st.data(),
)
def test_tensors_that_are_lent_are_not_copied(cohort, layout: str, dtype, gap: int, data) -> None:
    """The same bytes and sizes, read without a copy; and checked like any others."""
    _, columns, stacked, n = cohort
    flat = {name: x.to(dtype).reshape(n, -1) for name, x in stacked.items()}
    width = sum(x.shape[1] for x in flat.values())
    matrix = torch.full((n, width + gap), 7.0, dtype=dtype)
    tensors, at = {}, 0
    for name, x in flat.items():
        matrix[:, at : at + x.shape[1]] = x
        tensors[name] = matrix[:, at : at + x.shape[1]].view(stacked[name].shape)
        at += x.shape[1]
    specs = {name: TensorSpec(dtype, tuple(x.shape[1:])) for name, x in tensors.items()}
    schema = Schema("h", 9, {name: Field("f64") for name in columns}, specs)
    columns = {name: list(map(float, values)) for name, values in columns.items()}
    parcel = encode_many(schema, columns, tensors, layout, sequence=range(n), lend=True)
    copied = encode_many(schema, columns, tensors, layout, sequence=range(n))
    assert [bytes(parcel[i]) for i in range(n)] == [bytes(copied[i]) for i in range(n)]
    assert parcel.sizes.tolist() == copied.sizes.tolist()
    if layout == "described" and tensors and all(x.numel() for x in tensors.values()):
        assert parcel.lent is not None  # compact heads may end between two entries
    fields, got = decode_many(parcel, schema)
    assert fields == columns and trees.equal(got, tensors)
    if parcel.lent is not None:
        assert all(got[name].data_ptr() == x.data_ptr() for name, x in tensors.items() if x.numel())
        narrow = Parcel(parcel.buffer, parcel.offsets, parcel.lent[:, :-1])
        other = Parcel(parcel.buffer, parcel.offsets, parcel.lent.to(torch.bfloat16))
        for wrong in (narrow, other):
            with pytest.raises(WireError):
                decode_many(wrong, schema)
    heads = parcel.buffer.clone()
    if len(heads):
        heads[data.draw(st.integers(0, len(heads) - 1))] ^= data.draw(st.integers(1, 255))
    decoded_together_as_one_by_one(Parcel(heads, parcel.offsets, parcel.lent), schema)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_number_that_is_lent_is_refused(layout: str) -> None:
    schema = Schema("k", 1, {}, {"w": TensorSpec(torch.float32, (2,))})
    matrix = torch.zeros(3, 4)
    matrix[:, 2:] = math.nan  # not sent
    x = {"w": matrix[:, :2]}
    decode_many(encode_many(schema, {}, x, layout, lend=True), schema)
    matrix[1, 1] = math.inf
    with pytest.raises(WireError, match=r"^w: "):
        decode_many(encode_many(schema, {}, x, layout, lend=True), schema)


TREE = {"w": torch.zeros(3, 2), "b": torch.zeros(5)}
SCHEMA = Schema.of_tree("update", 2, {"n": Field("u32", low=1), "loss": Field("f32")}, TREE)
COLUMNS = {"n": [3, 1, 4], "loss": [0.5, 0.25, 1.5]}
STACKED = {name: torch.arange(3.0 * x.numel()).view(3, *x.shape) for name, x in TREE.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoded_tensors_are_views_of_the_buffer(layout: str) -> None:
    parcel = encode_many(SCHEMA, COLUMNS, STACKED, layout)
    _, tensors = decode_many(parcel, SCHEMA)
    low, high = parcel.buffer.data_ptr(), parcel.buffer.data_ptr() + parcel.buffer.numel()
    assert all(low <= x.data_ptr() < high for x in tensors.values())


def test_rows_out_of_line_are_copied_and_equal() -> None:
    schema = Schema.of_tree("update", 2, {"odd": Field("u8")}, TREE)
    parcel = encode_many(schema, {"odd": [1, 2, 3]}, STACKED, "compact")
    _, tensors = decode_many(parcel, schema)
    assert trees.equal(tensors, STACKED)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["w", "b"])
def test_one_bad_number_in_one_message_refuses_all(layout: str, bad: float, where: str) -> None:
    stacked = trees.clone(STACKED)
    stacked[where][2, -1] = bad
    parcel = encode_many(SCHEMA, COLUMNS, stacked, layout)
    with pytest.raises(WireError, match=f"^{where}: "):
        decode_many(parcel, SCHEMA)
    _, tensors = decode_many(parcel, SCHEMA, finite=False)
    assert torch.equal(tensors[where].isfinite(), stacked[where].isfinite())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exempt_tensor_does_not_hide_a_guarded_one(layout: str) -> None:
    specs = dict(SCHEMA.tensors) | {"w": TensorSpec(torch.float32, (3, 2), finite=False)}
    schema = Schema("update", 2, SCHEMA.fields, specs)
    stacked = trees.clone(STACKED)
    stacked["w"][0] = math.nan
    decode_many(encode_many(schema, COLUMNS, stacked, layout), schema)
    stacked["b"][0, 0] = math.nan
    with pytest.raises(WireError, match=r"^b: "):
        decode_many(encode_many(schema, COLUMNS, stacked, layout), schema)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_field_out_of_range_in_any_message_is_found(layout: str) -> None:
    loose = Schema("update", 2, SCHEMA.fields | {"n": Field("u32")}, SCHEMA.tensors)
    parcel = encode_many(loose, COLUMNS | {"n": [3, 1, 0]}, STACKED, layout)
    with pytest.raises(WireError, match=r"^n: 0 is below 1"):
        decode_many(parcel, SCHEMA)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"n": [1, 2, -3], "loss": [0.0] * 3}, "n"),
        ({"n": [1, 2, 2**32], "loss": [0.0] * 3}, "n"),
        ({"n": [1, 2, 2.5], "loss": [0.0] * 3}, "n"),
        ({"n": [True] * 3, "loss": [0.0] * 3}, "n"),
        ({"n": [1, 2], "loss": [0.0] * 3}, "loss"),
        ({"n": [1, 2, 3], "loss": [0.0, 0.0, 1e39]}, "loss"),
        ({"n": [1, 2, 3], "loss": ["0", "1", "2"]}, "loss"),
        ({"n": [1, 2, 3]}, "loss"),
    ],
)
def test_bad_columns_are_named(columns: dict, name: str) -> None:
    with pytest.raises(WireError) as caught:
        encode_many(SCHEMA, columns, STACKED)
    assert caught.value.field == name


def test_arrays_and_tensors_are_columns_too() -> None:
    lists = encode_many(SCHEMA, COLUMNS, STACKED)
    arrays = {"n": np.array([3, 1, 4]), "loss": torch.tensor([0.5, 0.25, 1.5])}
    assert torch.equal(encode_many(SCHEMA, arrays, STACKED).buffer, lists.buffer)


def test_heads_written_in_another_way_are_still_read() -> None:
    whole = encode_many(SCHEMA, COLUMNS, STACKED)
    parts = [bytes(whole[i]) for i in range(3)]
    parts[1] = parts[1].replace(b'"n":"1"  ', b'"n": "1" ')
    fields, tensors = decode_many(joined(parts), SCHEMA)
    assert fields == COLUMNS and trees.equal(tensors, STACKED)


def test_what_only_a_kind_reader_would_take_is_refused_in_a_cohort_too() -> None:
    whole = encode_many(SCHEMA, COLUMNS, STACKED)
    for text in (b'"+1" ', b'"1_0"', b"'1'  ", b'" 1" '):
        parts = [bytes(whole[i]) for i in range(3)]
        parts[1] = parts[1].replace(b'"n":"1"  ', b'"n":' + text)
        assert len(parts[1]) == len(parts[0])
        with pytest.raises(WireError):
            decode_many(joined(parts), SCHEMA)


def test_messages_of_other_kinds_and_mixed_layouts() -> None:
    whole = [encode_many(SCHEMA, COLUMNS, STACKED, layout) for layout in LAYOUTS]
    mixed = [bytes(whole[i % 2][i]) for i in range(3)]
    fields, tensors = decode_many(joined(mixed), SCHEMA)
    assert fields == COLUMNS and trees.equal(tensors, STACKED)
    other = Schema.of_tree("other", 3, SCHEMA.fields, TREE)
    for parcel in whole:
        with pytest.raises(WireError):
            decode_many(parcel, other)


@pytest.mark.parametrize("offsets", [[], [0, 9, 5], [-1, 5], [0, 10**9]])
def test_bounds_outside_the_buffer_are_refused(offsets: list[int]) -> None:
    parcel = encode_many(SCHEMA, COLUMNS, STACKED)
    with pytest.raises(WireError, match="offsets"):
        decode_many(Parcel(parcel.buffer, torch.tensor(offsets, dtype=torch.int64)), SCHEMA)


def test_open_tensors_in_a_described_cohort() -> None:
    schema = Schema("any", 1, {}, None)
    parcel = encode_many(schema, {}, STACKED)
    assert trees.equal(decode_many(parcel, schema)[1], STACKED)


def test_open_sizes_that_differ_between_messages_cannot_be_stacked() -> None:
    schema = Schema("s", 1, {}, {"x": TensorSpec(torch.int8, (None, None))})
    parts = [
        encode(Message("s", {}, {"x": torch.zeros(shape, dtype=torch.int8)}), schema, "compact")
        for shape in ((2, 6), (3, 4))
    ]
    with pytest.raises(WireError, match="differs in shape"):
        decode_many(joined(parts), schema)


def test_remembered_heads_keep_values_apart_that_are_equal_but_written_unlike() -> None:
    schema = Schema("k", 1, {"a": Field("f64"), "b": Field("u8")}, {})
    for a in ([0.0, -0.0, 1.0], [-0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [2.0, 3.0, 1.0]):
        for _ in range(3):
            parcel = encode_many(
                schema, {"a": a, "b": [0, 1, 1]}, {}, session=4, sequence=[0, 1, 2]
            )
            for i, value in enumerate(a):
                message = Message("k", {"a": value, "b": min(i, 1)}, {}, 4, i)
                assert bytes(parcel[i]) == encode(message, schema)
            got, _ = decode_many(parcel, schema)
            assert [math.copysign(1, x) for x in got["a"]] == [math.copysign(1, x) for x in a]


def test_what_a_cohort_said_is_remembered_by_value() -> None:
    """Also where the caller changes its lists, the ones it was given, or the session."""
    schema = Schema("k", 1, {"a": Field("u8")}, {})
    a, sequence = [1, 2, 3], [7, 8, 9]
    for round in range(4):
        parcel = encode_many(schema, {"a": a}, {}, session=round, sequence=sequence)
        got, _ = decode_many(parcel, schema)
        assert got == {"a": a}
        got["a"][0] = 99
        for i in range(3):
            message = Message("k", {"a": a[i]}, {}, round, sequence[i])
            assert bytes(parcel[i]) == encode(message, schema)
    a[1] = 200
    parcel = encode_many(schema, {"a": a}, {}, session=4, sequence=sequence)
    assert decode_many(parcel, schema)[0] == {"a": [1, 200, 3]}


def test_more_heads_than_are_remembered() -> None:
    schema = Schema("k", 1, {"a": Field("u32")}, {})
    for start in (0, 5000, 0):
        a = list(range(start, start + 5000))
        parcel = encode_many(schema, {"a": a}, {}, session=start, sequence=a)
        assert decode_many(parcel, schema)[0]["a"] == a
        frame = schema.frames["described"]
        assert 0 < len(frame.written) <= 4096 and 0 < len(frame.read) <= 4096


def test_large_numbers_whose_sum_overflows_are_finite() -> None:
    most = torch.finfo(torch.float32).max
    x = {"w": torch.full((3, 4), most)}
    schema = Schema.of_tree("k", 1, {}, {"w": x["w"][0]})
    assert torch.equal(decode_many(encode_many(schema, {}, x), schema)[1]["w"], x["w"])
    x["w"][1, 2] = torch.inf
    x["w"][2, 3] = -torch.inf
    with pytest.raises(WireError, match="w"):
        decode_many(encode_many(schema, {}, x), schema)


def test_a_session_for_each_message() -> None:
    schema = Schema("k", 1, {"a": Field("u8")}, {})
    parcel = encode_many(schema, {"a": [3, 3]}, {}, session=[5, 6], sequence=[1, 1])
    for i, session in enumerate((5, 6)):
        assert decode(bytes(parcel[i]), schema).session == session
    assert decode_many(parcel, schema)[0] == {"a": [3, 3]}
