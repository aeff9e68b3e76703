"""The compact layout: 12 bytes of framing, then the fields packed in declared order, then the
tensors; sizes that the schema leaves open come before the tensors as LEB128 varints.

Framing, little-endian: session u32, schema number u16, mark u16, sequence u32. The mark is never
zero, where a described message has the upper half of its header length, which always is.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from isthmus.wire.errors import WireError
from isthmus.wire.fields import SCALARS, Value
from isthmus.wire.schema import Message, Place, Schema, Shape, size

FRAMING = struct.Struct("<IHHI")
MARK = 0x1C01
_FRAME = [("session", "<u4"), ("kind", "<u4"), ("sequence", "<u4")]
"""As one table: `kind`, a name no field can have, is number and mark in one word."""


def head(schema: Schema, message: Message, places: tuple[Place, ...]) -> bytes:
    """Everything before the tensors."""
    if (fixed := _fixed(schema)) is not None:
        values = [message.fields[name] for name in schema.fields]
        framing = message.session, schema.number, MARK, message.sequence
        return fixed.pack(*framing, *values) + _sizes(schema, places)
    parts = [FRAMING.pack(message.session, schema.number, MARK, message.sequence)]
    for name, item in schema.fields.items():
        value = message.fields[name]
        if item.dtype in SCALARS:
            parts.append(struct.pack("<" + SCALARS[item.dtype].code, value))
        else:
            raw = value.encode() if isinstance(value, str) else cast(bytes, value)
            parts += [_varint(len(raw)), raw]
    parts.append(_sizes(schema, places))
    return b"".join(parts)


def heads(
    schema: Schema, columns: Mapping[str, list[Value]], places: tuple[Place, ...], n: int
) -> np.ndarray:
    """The heads of n messages of a fixed schema: uint8 `[n, start]`."""
    packed = _packed(schema)
    table = np.empty(n, packed)
    table["kind"] = MARK << 16 | schema.number
    for name, column in columns.items():
        table[name] = column
    filled = table.view(np.uint8).reshape(n, packed.itemsize)
    sizes = np.frombuffer(_sizes(schema, places), np.uint8)
    return np.hstack([filled, np.broadcast_to(sizes, (n, len(sizes)))]) if len(sizes) else filled


def read_heads(
    schema: Schema, matrix: np.ndarray, places: tuple[Place, ...], start: int
) -> dict[str, list[Value]] | None:
    """The fields of n messages `[n, L]`, or None when some head needs reading on its own."""
    packed = _packed(schema)
    sizes = np.frombuffer(_sizes(schema, places), np.uint8)
    if start != packed.itemsize + len(sizes) or (matrix[:, packed.itemsize : start] != sizes).any():
        return None
    raw = np.ascontiguousarray(matrix[:, : packed.itemsize])
    table = raw.view(packed).reshape(-1)
    if (table["kind"] != (MARK << 16 | schema.number)).any():
        return None
    for name, item in schema.fields.items():
        if item.dtype == "bool" and (table[name].view(np.uint8) > 1).any():
            return None
    return {name: table[name].tolist() for name in ("session", "sequence", *schema.fields)}


def start_of(schema: Schema, places: tuple[Place, ...]) -> int:
    """Where the tensors begin in a message of a fixed schema."""
    return _packed(schema).itemsize + len(_sizes(schema, places))


def read_head(
    schema: Schema, data: memoryview, finite: bool
) -> tuple[Message, tuple[Place, ...], int]:
    """Fields, places of the tensors and length of the head, all checked against the schema."""
    if schema.tensors is None:
        raise WireError("tensors", f"kind {schema.kind} leaves them open: declare them by template")
    if len(data) < FRAMING.size:
        raise WireError("framing", f"{len(data)} bytes are no message")
    session, number, mark, sequence = FRAMING.unpack_from(data)
    if mark != MARK or number != schema.number:
        raise WireError("framing", f"not a message of schema {schema.number}")
    at = FRAMING.size
    fields: dict[str, Value] = {}
    fixed = _fixed(schema)
    if fixed is not None and fixed.size <= len(data):
        values = fixed.unpack_from(data)[4:]
        for (name, item), value in zip(schema.fields.items(), values, strict=True):
            fields[name] = item.check(name, value, finite)
        at = fixed.size
    for name, item in () if fields else schema.fields.items():
        if item.dtype in SCALARS:
            stop = _within(name, at + struct.calcsize(SCALARS[item.dtype].code), data)
            value: Any = struct.unpack_from("<" + SCALARS[item.dtype].code, data, at)[0]
            if item.dtype == "bool" and data[at] > 1:
                raise WireError(name, f"byte {data[at]} is no bool")
        else:
            length, at = _read_varint(name, data, at)
            if length > item.limit:
                raise WireError(name, f"{length} bytes, at most {item.limit}")
            stop = _within(name, at + length, data)
            value = bytes(data[at:stop])
            if item.dtype == "str":
                try:
                    value = value.decode()
                except UnicodeDecodeError:
                    raise WireError(name, "text that is not valid UTF-8") from None
        fields[name] = item.check(name, value, finite)
        at = stop
    shapes: dict[str, Shape] = {}
    for name, spec in schema.tensors.items():
        axes: list[int] = []
        for axis in spec.shape:
            if axis is None:
                axis, at = _read_varint(name, data, at)
            axes.append(axis)
        shapes[name] = tuple(axes)
    room = len(data) - at
    for name, shape in shapes.items():
        room -= size(name, schema.tensors[name].dtype, shape, room)
    if room:
        raise WireError("tensors", f"{room} bytes left over")
    places = schema.place({name: (schema.tensors[name].dtype, s) for name, s in shapes.items()})
    return Message(schema.kind, fields, {}, session, sequence), places, at


def _fixed(schema: Schema) -> struct.Struct | None:
    """Framing and fields in one piece, where all fields are numbers of fixed width."""
    found = schema.frames.get("fixed", False)
    if found is False:
        codes = [
            SCALARS[item.dtype].code for item in schema.fields.values() if item.dtype in SCALARS
        ]
        plain = len(codes) == len(schema.fields) and "?" not in codes  # a bool may be malformed
        found = schema.keep("fixed", struct.Struct("<IHHI" + "".join(codes)) if plain else None)
    return cast("struct.Struct | None", found)


def _packed(schema: Schema) -> np.dtype[np.void]:
    found = schema.frames.get("compact")
    if found is None:
        items = [(name, SCALARS[item.dtype].numpy) for name, item in schema.fields.items()]
        found = schema.keep("compact", np.dtype([*_FRAME, *items]))
    return cast("np.dtype[np.void]", found)


def _sizes(schema: Schema, places: tuple[Place, ...]) -> bytes:
    if schema.tensors is None:
        raise WireError("tensors", f"kind {schema.kind} leaves them open: declare them by template")
    shapes = {place.name: place.shape for place in places}
    return b"".join(
        _varint(given)
        for name, spec in schema.tensors.items()
        for axis, given in zip(spec.shape, shapes[name], strict=True)
        if axis is None
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(name: str, data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 63, 7):
        _within(name, at + 1, data)
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and shift:
                raise WireError(name, "a size written longer than needed")
            return value, at
    raise WireError(name, "a size of more than 63 bits")


def _within(name: str, stop: int, data: memoryview) -> int:
    if stop > len(data):
        raise WireError(name, f"ends at byte {stop} of {len(data)}")
    return stop
