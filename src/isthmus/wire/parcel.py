"""All messages of one schema in one buffer: what a cohort sends, written and read in one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from isthmus import tree
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
from isthmus.wire.schema import Message, Place, Schema, Shape


@dataclass(frozen=True, slots=True)
class Parcel:
    """n messages: `buffer` uint8, message i is `buffer[offsets[i]:offsets[i+1]]`.

    Where tensors were lent, that is its head alone, and row i of `lent` `[n, d]` follows it.
    """

    buffer: Tensor
    offsets: Tensor
    lent: Tensor | None = None

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __getitem__(self, i: int) -> memoryview:
        """The bytes of message i, copied only where tensors were lent."""
        start, stop = self.offsets.numpy()[i : i + 2]
        head = self.buffer.numpy()[start:stop].data
        if self.lent is None:
            return head
        return memoryview(bytearray(b"".join([head, whole(self.lent[i]).data])))

    @property
    def rest(self) -> int:
        """Bytes of each message that were lent."""
        return 0 if self.lent is None else self.lent.shape[1] * self.lent.element_size()

    @property
    def sizes(self) -> np.ndarray:
        """The bytes of each message, int64 `[n]`; read only."""
        n = len(self)
        length = self.buffer.numel() // max(n, 1)
        if self.offsets is _even(n, length):
            return _alike(n, length + self.rest)
        return np.diff(self.offsets.numpy()) + self.rest


def encode_many(
    schema: Schema,
    fields: Mapping[str, Sequence[Any] | np.ndarray],
    tensors: Mapping[str, Tensor],
    layout: Layout = "described",
    session: int | Sequence[int] | np.ndarray = 0,
    sequence: int | Sequence[int] | np.ndarray = 0,
    lend: bool = False,
) -> Parcel:
    """n messages at once, byte for byte what `encode` gives for each.

    `fields` holds n values of each field, `tensors` is stacked (`[n, *shape]`); `session` and
    `sequence` are one number for all, or n numbers. With `lend`, tensors that lie side by side
    as in a message are not copied, and must not change while the parcel is in use. Raises
    `WireError` naming the field.
    """
    written = LAYOUTS[layout]
    form = _known(schema, written, fields, tensors, session, sequence)
    if form is None:
        schema.check_names(fields, tensors)
        n = _count(fields, tensors, session, sequence)
        places = schema.place({name: (x.dtype, x.shape[1:]) for name, x in tensors.items()})
    else:
        n, places = form.n, cast("tuple[Place, ...]", schema.declared)
    columns = {
        "session": _listed("session", session, n),
        "sequence": _listed("sequence", sequence, n),
    }
    if n == 0 or not schema.fixed:
        return _one_by_one(schema, fields, tensors, layout, columns, n)
    for name, item in schema.fields.items():
        columns[name] = item.listed(name, fields[name], n)
    form = form or _form(schema, written, places, n)
    heads = written.heads(schema, columns, places, n)
    inside = {place.name: tensors[place.name] for place in places}
    rows = None if form.kind is None else tree.rows(inside)
    if lend and rows is not None and rows.device.type == "cpu":
        first = torch.from_numpy(heads.reshape(-1).copy())
        return Parcel(first, _even(n, form.start), rows.detach())
    buffer = torch.empty(n * form.length, dtype=torch.uint8)
    matrix = buffer.numpy().reshape(n, form.length)
    matrix[:, : form.start] = heads
    _copy(matrix[:, form.start :], form, inside, rows)
    return Parcel(buffer, form.offsets)


def _known(
    schema: Schema,
    layout: Any,
    fields: Mapping[str, Sequence[Any] | np.ndarray],
    tensors: Mapping[str, Tensor],
    *numbers: int | Sequence[int] | np.ndarray,
) -> _Form | None:
    """The form that was kept for just these names, types and shapes; None to look closer."""
    first = next(iter(tensors.values()), None)
    if first is None or not first.ndim or fields.keys() != schema.fields.keys():
        return None
    n = first.shape[0]
    form = cast("_Form | None", schema.frames.get(("form", layout, n)))
    if form is None or len(tensors) != len(form.stacked):
        return None
    for name, dtype, shape in form.stacked:
        x = tensors.get(name)
        if x is None or x.dtype is not dtype or x.shape != shape:
            return None
    for column in (*fields.values(), *numbers):
        if not isinstance(column, int) and len(column) != n:
            return None
    return form


def _copy(body: np.ndarray, form: _Form, tensors: Tree, rows: Tensor | None) -> None:
    """Copy tensors behind the heads `[n, b]`: all at once where they are the matrix `rows`."""
    if form.kind is None:
        parts = [whole(x) for x in tensors.values()]
    else:
        body = body.view(_WHOLE[form.kind])
        parts = [x.numpy(force=True) for x in (tensors.values() if rows is None else [rows])]
    at = 0
    for part in parts:
        flat = part.reshape(form.n, -1)
        body[:, at : at + flat.shape[1]] = flat
        at += flat.shape[1]


def decode_many(
    parcel: Parcel, schema: Schema, finite: bool = True
) -> tuple[dict[str, list[Value]], Tree]:
    """The fields (n values each) and the stacked tensors of all messages, checked like `decode`.

    The tensors are strided views of the parcel where its alignment allows. Nothing is handed
    over unless every message is sound; raises `WireError` naming the field, and the message
    where one differs from the others.
    """
    if parcel.offsets.ndim != 1 or parcel.offsets.numel() == 0:
        raise WireError("offsets", "not the bounds of messages")
    n = len(parcel)
    if n == 0:
        return _nothing(schema)
    buffer = _messages(parcel, n)
    if buffer is None:
        return _each(parcel, schema, finite)
    matrix = buffer.numpy().reshape(n, -1)
    length = matrix.shape[1] + parcel.rest
    check_size(length, schema)
    layout = layout_of(matrix[0].data)
    columns, places, start = _heads(layout, schema, parcel, matrix, length, finite)
    if columns is None:
        return _each(parcel, schema, finite)
    fields = {
        name: item.listed(name, columns[name], n, finite) for name, item in schema.fields.items()
    }
    form = _form(schema, layout, places, n)
    body, sound = _body(parcel, form, buffer), False
    if body is not None:
        step, origin = body.stride(0), body.storage_offset()
        tensors = {
            place.name: body.as_strided((n, *place.shape), (step, *strides), origin + low)
            for place, strides, low in zip(places, form.strides, form.lows, strict=True)
        }
        sound = not finite or _sound(body)
    elif parcel.lent is not None:
        return _each(parcel, schema, finite)
    else:
        tensors = {
            place.name: _stacked(matrix[:, start + place.start : start + place.stop], place)
            for place in places
        }
        for place in places:
            if place.dtype == torch.bool and (tensors[place.name].view(torch.uint8) > 1).any():
                raise WireError(place.name, "a byte that is no bool")
    if finite and not sound:
        check_finite({p.name: tensors[p.name] for p in places if schema.guarded(p.name, p.dtype)})
    order = schema.tensors if schema.tensors is not None else tensors
    return fields, {name: tensors[name] for name in order}


def _messages(parcel: Parcel, n: int) -> Tensor | None:
    """The bytes in the buffer of n messages of one length, or None where lengths differ."""
    stop = parcel.buffer.numel()
    if parcel.offsets is _even(n, stop // n):
        return parcel.buffer
    offsets = parcel.offsets.numpy()
    lengths = np.diff(offsets)
    if offsets[0] < 0 or (lengths < 0).any() or offsets[-1] > stop:
        raise WireError("offsets", "do not lie in order within the buffer")
    if (lengths != lengths[0]).any():
        return None
    return parcel.buffer[int(offsets[0]) : int(offsets[-1])]


def _heads(
    layout: Any, schema: Schema, parcel: Parcel, matrix: np.ndarray, length: int, finite: bool
) -> tuple[dict[str, list[Value]] | None, tuple[Place, ...], int]:
    """The fields of all heads, places and start; no fields when some head stands apart.

    Heads exactly as `encode_many` writes them for the declared shapes need no parsing.
    """
    places = schema.declared
    if schema.fixed and places is not None:
        start = layout.start_of(schema, places)
        if length == start + (places[-1].stop if places else 0) and start <= matrix.shape[1]:
            columns = layout.read_heads(schema, matrix, places, start)
            if columns is not None:
                return columns, places, start
    _, places, start = layout.read_head(schema, parcel[0], finite)
    fixed = schema.fixed and start <= matrix.shape[1]
    return layout.read_heads(schema, matrix, places, start) if fixed else None, places, start


def _body(parcel: Parcel, form: _Form, buffer: Tensor) -> Tensor | None:
    """The tensors of all messages as one matrix `[n, d]` of their type (a view); None where they
    are not all of one, or not aligned."""
    if form.kind is None:
        return None
    size, width = form.kind.itemsize, form.width
    if (lent := parcel.lent) is not None:
        alike = lent.dtype is form.kind and lent.shape == (form.n, width)
        return lent if alike and buffer.numel() == form.n * form.start else None
    if buffer.data_ptr() % size:
        return None
    flat = buffer.view(form.kind)
    place = flat.storage_offset() + form.start // size
    return flat.as_strided((form.n, width), (form.length // size, 1), place)


class _Form(NamedTuple):
    """What n messages of one schema and shape have in common, worked out once: where tensors
    begin, the length, and what is `stacked`. When all tensors are aligned and of one type, also
    that `kind`; and in entries, counted from the first, how many there are (`width`), where each
    tensor begins (`lows`) and its own strides."""

    n: int
    start: int
    length: int
    offsets: Tensor
    stacked: tuple[tuple[str, torch.dtype, Shape], ...]
    kind: torch.dtype | None = None
    width: int = 0
    lows: tuple[int, ...] = ()
    strides: tuple[tuple[int, ...], ...] = ()


@lru_cache(maxsize=256)
def _alike(n: int, length: int) -> np.ndarray:
    sizes = np.full(n, length)
    sizes.flags.writeable = False
    return sizes


@lru_cache(maxsize=256)
def _even(n: int, length: int) -> Tensor:
    """The bounds of n messages of one length: one tensor, by which such parcels are known."""
    return torch.arange(n + 1) * length


def _form(schema: Schema, layout: Any, places: tuple[Place, ...], n: int) -> _Form:
    key = ("form", layout, n)
    found = schema.frames.get(key) if places is schema.declared else None
    if found is None:
        start = layout.start_of(schema, places)
        length = start + (places[-1].stop if places else 0)
        check_size(length, schema)
        stacked = tuple((place.name, place.dtype, (n, *place.shape)) for place in places)
        found = _Form(n, start, length, _even(n, length), stacked)
        kinds = {place.dtype for place in places}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind in _WHOLE and start % kind.itemsize == length % kind.itemsize == 0:
            size = kind.itemsize
            lows = tuple([place.start // size for place in places])
            strides = tuple([torch.empty(p.shape, device="meta").stride() for p in places])
            width = (length - start) // size
            found = found._replace(kind=kind, width=width, lows=lows, strides=strides)
        if places is schema.declared:
            schema.keep(key, found)
    return cast(_Form, found)


def _sound(body: Tensor) -> bool:
    """True only if all entries are finite: NaN and infinity stay in a sum, whatever is added.

    A sum that overflows by itself is no proof of either, and left to the exact check.
    """
    return math.isfinite(float(body.sum()))


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


def _listed(name: str, given: int | Sequence[int] | np.ndarray, n: int) -> list[Value]:
    """n session or sequence numbers, from one for all or one for each."""
    if isinstance(given, int):
        return [NUMBER.check(name, given)] * n
    return NUMBER.listed(name, given, n)


_WHOLE = {torch.float32: np.dtype("<f4"), torch.float64: np.dtype("<f8")}
