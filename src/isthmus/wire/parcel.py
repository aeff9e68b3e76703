"""All messages of one schema in one buffer: what a cohort sends, written and read in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from isthmus.tree import Tree
from isthmus.wire.errors import WireError
from isthmus.wire.fields import NUMBER, Value
from isthmus.wire.layouts import (
    LAYOUTS,
    Layout,
    check_finite,
    check_size,
    decode,
    encode,
    layout_of,
    whole,
)
from isthmus.wire.schema import Message, Place, Schema


@dataclass(frozen=True, slots=True)
class Parcel:
    """n messages side by side: `buffer` uint8, message i is `buffer[offsets[i]:offsets[i+1]]`."""

    buffer: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __getitem__(self, i: int) -> memoryview:
        """The bytes of message i, not copied."""
        start, stop = self.offsets.numpy()[i : i + 2]
        return self.buffer.numpy()[start:stop].data

    @property
    def sizes(self) -> np.ndarray:
        """The bytes of each message, int64 `[n]`."""
        return np.diff(self.offsets.numpy())


def encode_many(
    schema: Schema,
    fields: Mapping[str, Sequence[Any] | np.ndarray],
    tensors: Mapping[str, Tensor],
    layout: Layout = "described",
    session: int | Sequence[int] | np.ndarray = 0,
    sequence: int | Sequence[int] | np.ndarray = 0,
) -> Parcel:
    """n messages in one buffer, byte for byte what `encode` gives for each.

    `fields` holds n values of each field, `tensors` is stacked (`[n, *shape]`); `session` and
    `sequence` are one number for all, or n numbers. Raises `WireError` naming the field.
    """
    schema.check_names(fields, tensors)
    n = _count(fields, tensors, session, sequence)
    given = {name: (x.dtype, tuple(x.shape[1:])) for name, x in tensors.items()}
    places = schema.place(given)
    columns = {
        "session": NUMBER.listed("session", _spread(session, n), n),
        "sequence": NUMBER.listed("sequence", _spread(sequence, n), n),
    }
    if n == 0 or not schema.fixed:
        return _one_by_one(schema, fields, tensors, layout, columns, n)
    for name, item in schema.fields.items():
        columns[name] = item.listed(name, fields[name], n)
    shared, filled = LAYOUTS[layout].heads(schema, columns, places, n)
    start = len(shared)
    length = start + (places[-1].stop if places else 0)
    check_size(length, schema)
    matrix = np.empty((n, length), np.uint8)
    matrix[:, :start] = shared
    for low, high, block in filled:
        matrix[:, low:high] = block
    for place in places:
        flat = whole(tensors[place.name]).reshape(n, place.stop - place.start)
        matrix[:, start + place.start : start + place.stop] = flat
    return Parcel(torch.as_tensor(matrix.reshape(-1)), torch.arange(n + 1) * length)


def decode_many(
    parcel: Parcel, schema: Schema, finite: bool = True
) -> tuple[dict[str, list[Value]], Tree]:
    """The fields (n values each) and the stacked tensors of all messages, checked like `decode`.

    The tensors are strided views of the buffer where its alignment allows. Nothing is handed
    over unless every message is sound; raises `WireError` naming the field, and the message
    where one differs from the others.
    """
    offsets = parcel.offsets.numpy()
    if offsets.ndim != 1 or len(offsets) == 0 or offsets[0] < 0:
        raise WireError("offsets", "not the bounds of messages")
    lengths = np.diff(offsets)
    if (lengths < 0).any() or offsets[-1] > parcel.buffer.numel():
        raise WireError("offsets", "do not lie in order within the buffer")
    n = len(lengths)
    if n == 0:
        return _nothing(schema)
    length = int(lengths[0])
    check_size(length, schema)
    if (lengths != length).any():
        return _each(parcel, schema, finite)
    raw = parcel.buffer.numpy()[offsets[0] : offsets[-1]]
    matrix = raw.reshape(n, length)
    first = raw[:length].data
    layout = layout_of(first)
    columns, places, start = _heads(layout, schema, matrix, first, finite)
    if columns is None:
        return _each(parcel, schema, finite)
    fields = {
        name: item.listed(name, columns[name], n, finite) for name, item in schema.fields.items()
    }
    tensors = {
        place.name: _stacked(matrix[:, start + place.start : start + place.stop], place)
        for place in places
    }
    _guard(schema, matrix[:, start:], places, tensors, finite)
    order = schema.tensors if schema.tensors is not None else tensors
    return fields, {name: tensors[name] for name in order}


def _heads(
    layout: Any, schema: Schema, matrix: np.ndarray, first: memoryview, finite: bool
) -> tuple[dict[str, list[Value]] | None, tuple[Place, ...], int]:
    """The fields of all heads, places and start; no fields when some head stands apart.

    Heads exactly as `encode_many` writes them for the declared shapes need no parsing.
    """
    places = schema.declared
    if schema.fixed and places is not None:
        start = layout.start_of(schema, places)
        if matrix.shape[1] == start + (places[-1].stop if places else 0):
            columns = layout.read_heads(schema, matrix, places, start)
            if columns is not None:
                return columns, places, start
    _, places, start = layout.read_head(schema, first, finite)
    columns = layout.read_heads(schema, matrix, places, start) if schema.fixed else None
    return columns, places, start


def _guard(
    schema: Schema,
    body: np.ndarray,
    places: Sequence[Place],
    tensors: Tree,
    finite: bool,
) -> None:
    """The checks of `decode` on all tensors: one reduction over each run of float32 or float64."""
    for place in places:
        if place.dtype == torch.bool and (body[:, place.start : place.stop] > 1).any():
            raise WireError(place.name, "a byte that is no bool")
    guarded = {p.name: tensors[p.name] for p in places if schema.guarded(p.name, p.dtype)}
    if not finite or not guarded:
        return
    dtypes = {place.dtype for place in places}
    kind = _NUMPY.get(dtypes.pop()) if len(dtypes) == 1 else None
    if kind and _aligned(body, kind.itemsize) and body.size:
        run = body.view(kind)
        if np.isfinite(run.min()) and np.isfinite(run.max()):
            return
    check_finite(guarded)


def _aligned(block: np.ndarray, width: int) -> bool:
    """Every row of bytes `[n, b]` begins at a multiple of `width`."""
    return block.ctypes.data % width == 0 and block.strides[0] % width == 0


def _stacked(block: np.ndarray, place: Place) -> Tensor:
    """Bytes `[n, b]` as a tensor `[n, *shape]`: a view where every row is aligned."""
    if not block.size:
        return torch.empty((len(block), *place.shape), dtype=place.dtype)
    if not _aligned(block, place.dtype.itemsize):
        block = block.copy()
    return torch.as_tensor(block).view(place.dtype).view(len(block), *place.shape)


def _one_by_one(
    schema: Schema,
    fields: Mapping[str, Sequence[Any] | np.ndarray],
    tensors: Mapping[str, Tensor],
    layout: Layout,
    columns: Mapping[str, list[Value]],
    n: int,
) -> Parcel:
    """Messages whose heads may differ in length."""
    parts = [
        encode(
            Message(
                schema.kind,
                {name: cast(Value, values[i]) for name, values in fields.items()},
                {name: x[i] for name, x in tensors.items()},
            ),
            schema,
            layout,
            int(columns["session"][i]),
            int(columns["sequence"][i]),
        )
        for i in range(n)
    ]
    buffer = torch.as_tensor(np.frombuffer(bytearray(b"".join(parts)), np.uint8))
    return Parcel(buffer, torch.tensor([0, *map(len, parts)]).cumsum(0))


def _each(parcel: Parcel, schema: Schema, finite: bool) -> tuple[dict[str, list[Value]], Tree]:
    """Messages that differ in length or in how their heads are written, read one by one."""
    messages: list[Message] = []
    for i in range(len(parcel)):
        try:
            messages.append(decode(parcel[i], schema, finite))
        except WireError as error:
            raise WireError(error.field, f"{error.problem} (message {i})") from None
    fields = {name: [m.fields[name] for m in messages] for name in schema.fields}
    tensors: Tree = {}
    for name, x in messages[0].tensors.items():
        rows = [m.tensors[name] for m in messages if name in m.tensors]
        if len(rows) != len(messages) or any(
            row.shape != x.shape or row.dtype != x.dtype for row in rows
        ):
            raise WireError(name, "differs in shape or type between messages")
        tensors[name] = torch.stack(rows)
    return fields, tensors


def _nothing(schema: Schema) -> tuple[dict[str, list[Value]], Tree]:
    specs = schema.tensors or {}
    return {name: [] for name in schema.fields}, {
        name: torch.empty((0, *(axis or 0 for axis in spec.shape)), dtype=spec.dtype)
        for name, spec in specs.items()
    }


def _count(
    fields: Mapping[str, Sequence[Any] | np.ndarray], tensors: Mapping[str, Tensor], *numbers: Any
) -> int:
    """How many messages there are; every part must agree."""
    lengths = {name: len(values) for name, values in fields.items()}
    for name, x in tensors.items():
        if x.ndim == 0:
            raise WireError(name, "not stacked: it has no axis")
        lengths[name] = x.shape[0]
    for name, given in zip(("session", "sequence"), numbers, strict=True):
        if not isinstance(given, int):
            lengths[name] = len(given)
    n = next(iter(lengths.values()), 1)
    for name, length in lengths.items():
        if length != n:
            raise WireError(name, f"{length} values for {n} messages")
    return n


def _spread(given: int | Sequence[int] | np.ndarray, n: int) -> Sequence[int] | np.ndarray:
    return [given] * n if isinstance(given, int) else given


_NUMPY = {torch.float32: np.dtype("<f4"), torch.float64: np.dtype("<f8")}
