"""The described layout: a safetensors file whose `__metadata__` holds the fields.

Fields of fixed width are padded with blanks after their closing quote, which JSON allows, so that
all heads of one schema and shape are equally long and differ only inside these slots.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import torch

from isthmus.wire.errors import WireError
from isthmus.wire.fields import FLOATS, NUMBER, SCALARS, Field, Value
from isthmus.wire.schema import (
    DTYPES,
    NAMES,
    OPEN_HEADER,
    Message,
    Place,
    Schema,
    Shape,
    is_int,
    size,
)

REMEMBERED = 1 << 12
"""Heads whose text is kept with a schema."""

_ENVELOPE = {"session": NUMBER, "sequence": NUMBER}
_INTEGER = re.compile(r"-?[0-9]{1,20}")
_FLOAT = re.compile(r"-?([0-9]{1,20}(\.[0-9]{1,24})?(e[+-]?[0-9]{1,3})?|inf|nan)")


class Frame(NamedTuple):
    """What all heads of one schema and shape share.

    `text` and `tail` stand before and after the texts of fields without a fixed width; `slots`
    are those with one: name, field, where it begins and ends. Where all fields have one, `shared`
    is the whole head with empty slots, and `outside` tells which of its bytes lie outside them.

    `written` holds what follows the session in heads written lately, by its values, and `read`
    the values by that text; `latest` both for the latest cohort, column by column: it declares
    much the same from round to round, and text is slow to write and read.
    """

    text: bytes
    slots: tuple[tuple[str, Field, int, int], ...]
    tail: bytes
    shared: bytes
    outside: np.ndarray
    written: dict[tuple[Value, ...], bytes]
    read: dict[bytes, tuple[Value, ...]]
    latest: list[tuple[list[list[Value]], list[bytes]]]


def frame(schema: Schema, places: tuple[Place, ...]) -> Frame:
    """The frame for tensors in these places, built once."""
    key = "described" if places is schema.declared else ("described", places)
    found = schema.frames.get(key)
    if found is None:
        text = f'{{"__metadata__":{{"kind":{_quote(schema.kind)}'.encode()
        slots: list[tuple[str, Field, int, int]] = []
        for name, item in (_ENVELOPE | dict(schema.fields)).items():
            if item.dtype not in SCALARS:
                continue
            text += f",{_quote(name)}:".encode()
            width = SCALARS[item.dtype].text + 2
            slots.append((name, item, 8 + len(text), 8 + len(text) + width))
            text += b" " * width
        entries = [
            f'{_quote(place.name)}:{{"dtype":"{NAMES[place.dtype]}","shape":'
            f'[{",".join(map(str, place.shape))}],"data_offsets":[{place.start},{place.stop}]}}'
            for place in places
        ]
        tail = ("}" + "".join(f",{entry}" for entry in entries) + "}").encode()
        shared = bytes(_sealed(text + tail))
        outside = np.ones(len(shared), bool)
        for _, _, low, high in slots:
            outside[low:high] = False
        found = schema.keep(key, Frame(text, tuple(slots), tail, shared, outside, {}, {}, []))
    return cast(Frame, found)


def head(schema: Schema, message: Message, places: tuple[Place, ...]) -> bytes:
    """Everything before the tensors: length, header, blanks up to a multiple of 8."""
    base = frame(schema, places)
    texts = "".join(
        f",{_quote(name)}:{_text(item, message.fields[name])}"
        for name, item in schema.fields.items()
        if item.dtype not in SCALARS
    )
    whole = _sealed(base.text + texts.encode() + base.tail)
    envelope = {"session": message.session, "sequence": message.sequence}
    for name, item, start, stop in base.slots:
        value = envelope[name] if name in envelope else message.fields[name]
        whole[start:stop] = _text(item, value).ljust(stop - start).encode()
    return bytes(whole)


def heads(
    schema: Schema, columns: Mapping[str, list[Value]], places: tuple[Place, ...], n: int
) -> np.ndarray:
    """The heads of n messages of a fixed schema: uint8 `[n, start]`."""
    base = frame(schema, places)
    _, item, low, cut = base.slots[0]
    tails = _tails(base, [columns[name] for name, *_ in base.slots[1:]])
    sessions = columns["session"]
    first = base.shared[:low]
    if sessions.count(sessions[0]) == n:
        lead = first + _text(item, sessions[0]).ljust(cut - low).encode()
        block = lead + lead.join(tails)
    else:
        leads = [first + _text(item, session).ljust(cut - low).encode() for session in sessions]
        block = b"".join([part for row in zip(leads, tails, strict=True) for part in row])
    return np.frombuffer(block, np.uint8).reshape(n, len(base.shared))


def read_heads(
    schema: Schema, matrix: np.ndarray, places: tuple[Place, ...], start: int
) -> dict[str, list[Value]] | None:
    """The fields of n messages `[n, L]`, or None unless every head is written as `heads` does."""
    base = frame(schema, places)
    if start != len(base.shared):
        return None
    _, item, low, cut = base.slots[0]
    block, n = matrix[:, :start].tobytes(), len(matrix)
    lead = block[:cut]
    if lead[:low] == base.shared[:low]:
        said = _said(base, block, lead, n)
        session = _read_text(item, lead[low:].decode("latin-1"))
        if said is not None and session is not None:
            names = [name for name, *_ in base.slots[1:]]
            return {"session": [session] * n, **dict(zip(names, said, strict=True))}
    shared = np.frombuffer(base.shared, np.uint8)
    if ((matrix[:, :start] != shared) & base.outside).any():
        return None
    columns: dict[str, list[Value]] = {}
    for name, item, low, high in base.slots:
        values = _read_column(item, matrix[:, low:high])
        if values is None:
            return None
        columns[name] = values
    return columns


def _tails(base: Frame, said: list[list[Value]]) -> list[bytes]:
    """The heads of a cohort from the end of their session on, for these columns of values."""
    for before, tails in base.latest:
        if before == said:
            return tails
    rows = list(zip(*said, strict=True))
    found = list(map(base.written.get, rows))
    if None in found:
        return [tail or _tail(base, row) for tail, row in zip(found, rows, strict=True)]
    tails = cast("list[bytes]", found)
    base.latest[:] = [([list(column) for column in said], tails)]
    return tails


def _said(base: Frame, block: bytes, lead: bytes, n: int) -> list[list[Value]] | None:
    """The columns of n heads that all begin with `lead`; None where one is not remembered."""
    for before, tails in base.latest:
        if len(tails) == n and block == lead + lead.join(tails):
            return [list(column) for column in before]
    start, cut = len(base.shared), len(lead)
    tails = [block[at + cut : at + start] for at in range(0, n * start, start)]
    rows = list(map(base.read.get, tails))
    if None in rows or block != lead + lead.join(tails):
        return None
    said = list(map(list, zip(*cast("list[tuple[Value, ...]]", rows), strict=True)))
    base.latest[:] = [([list(column) for column in said], tails)]
    return said


def _tail(base: Frame, row: tuple[Value, ...]) -> bytes:
    """A head from the end of its session on, with these values in the other slots."""
    cut = base.slots[0][3]
    tail = bytearray(base.shared[cut:])
    for (_, item, low, high), value in zip(base.slots[1:], row, strict=True):
        tail[low - cut : high - cut] = _text(item, value).ljust(high - low).encode()
    whole = bytes(tail)
    if all(value != 0 or not isinstance(value, float) for value in row):  # 0.0 equals -0.0
        if len(base.read) >= REMEMBERED:
            base.written.clear()
            base.read.clear()
        base.written[row], base.read[whole] = whole, row
    return whole


def start_of(schema: Schema, places: tuple[Place, ...]) -> int:
    """Where the tensors begin in a message whose head `heads` wrote."""
    return len(frame(schema, places).shared)


def read_head(
    schema: Schema, data: memoryview, finite: bool
) -> tuple[Message, tuple[Place, ...], int]:
    """Fields, places of the tensors and length of the head, all checked against the schema."""
    entries, start = read_json(data, schema.header_limit)
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        raise WireError("header", "no __metadata__")
    texts = cast(dict[str, Any], metadata)
    for name, text in texts.items():
        if not isinstance(text, str):
            raise WireError(name, "metadata that is not text")
    if texts.pop("kind", None) != schema.kind:
        raise WireError("kind", f"not a message of kind {schema.kind}")
    envelope = {
        name: _parse(name, item, texts.pop(name, "0"), True) for name, item in _ENVELOPE.items()
    }
    given = {name: _spec(name, entry, len(data) - start) for name, entry in entries.items()}
    schema.check_names(texts, given)
    fields = {name: _parse(name, item, texts[name], finite) for name, item in schema.fields.items()}
    places = tuple(
        Place(name, dtype, shape, low, high) for name, (dtype, shape, low, high) in given.items()
    )
    for place in places:
        if schema.tensors is not None:
            schema.tensors[place.name].check(place.name, place.dtype, place.shape)
    _covered(places, len(data) - start)
    session, sequence = cast(int, envelope["session"]), cast(int, envelope["sequence"])
    return Message(schema.kind, fields, {}, session, sequence), places, start


def envelope(data: memoryview) -> tuple[str, int, int]:
    """Kind, session and sequence that the metadata claims."""
    metadata = read_json(data, OPEN_HEADER)[0].get("__metadata__")
    if not isinstance(metadata, dict):
        raise WireError("header", "no __metadata__")
    texts = cast(dict[str, Any], metadata)
    kind, *numbers = (texts.get(name, "0") for name in ("kind", *_ENVELOPE))
    if "kind" not in texts or not all(isinstance(text, str) for text in (kind, *numbers)):
        raise WireError("kind", "missing, or no text")
    session, sequence = (
        cast(int, _parse(name, item, text, True))
        for (name, item), text in zip(_ENVELOPE.items(), numbers, strict=True)
    )
    return kind, session, sequence


def read_json(data: memoryview, limit: int) -> tuple[dict[str, Any], int]:
    """The header's object and where the tensors begin; bounded by `limit` and the input."""
    if len(data) < 8:
        raise WireError("header", f"{len(data)} bytes are no message")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(limit, len(data) - 8):
        raise WireError("header", f"a header of {length} bytes is too long")
    try:
        header = json.loads(
            bytes(data[8 : 8 + length]).decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
        )
    except WireError:
        raise
    except (ValueError, RecursionError) as error:
        raise WireError("header", f"no JSON: {type(error).__name__}") from None
    if not isinstance(header, dict):
        raise WireError("header", "not an object")
    return cast(dict[str, Any], header), 8 + length


def _sealed(header: bytes) -> bytearray:
    """Length first, blanks last, so that the tensors start at a multiple of 8."""
    padded = header + b" " * (-len(header) % 8)
    return bytearray(struct.pack("<Q", len(padded)) + padded)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _text(item: Field, value: Value) -> str:
    if isinstance(value, bytes):
        return f'"{base64.b64encode(value).decode()}"'
    if isinstance(value, str):
        return _quote(value)
    if item.dtype == "bool":
        return '"true"' if value else '"false"'
    return f'"{value!r}"'


def _read_column(item: Field, slots: np.ndarray) -> list[Value] | None:
    """The values in the slots `[n, width]`, or None when one is not exactly as it is written."""
    n, width = slots.shape
    text = slots.tobytes().decode("latin-1")
    if n > 1 and text == text[:width] * n:
        value = _read_text(item, text[:width])
        return None if value is None else [value] * n
    values = [_read_text(item, text[at : at + width]) for at in range(0, n * width, width)]
    return None if None in values else cast("list[Value]", values)


def _read_text(item: Field, text: str) -> Value | None:
    """The value in a slot with this text, or None when it is not exactly as it is written."""
    word = text.rstrip(" ")[1:-1]
    read: Any = float if item.dtype in FLOATS else int
    try:
        value: Value = word == "true" if item.dtype == "bool" else read(word)
    except ValueError:
        return None
    # Written again and compared: whatever was read too kindly above shows here.
    return value if _text(item, value).ljust(len(text)) == text else None


def _parse(name: str, item: Field, text: str, finite: bool) -> Value:
    if item.dtype == "str":
        return item.check(name, text)
    if item.dtype == "bytes":
        if len(text) > 4 * (item.limit // 3 + 1):
            raise WireError(name, f"longer than {item.limit} bytes")
        try:
            return item.check(name, base64.b64decode(text.encode("ascii"), validate=True))
        except (binascii.Error, UnicodeEncodeError):
            raise WireError(name, "no base64") from None
    if item.dtype == "bool":
        if text not in ("true", "false"):
            raise WireError(name, "neither true nor false")
        return text == "true"
    pattern, number = (_FLOAT, float) if item.dtype in FLOATS else (_INTEGER, int)
    if not pattern.fullmatch(text):
        raise WireError(name, f"{text[:24]!r} is no {item.dtype}")
    return item.check(name, number(text), finite)


def _spec(name: str, entry: Any, room: int) -> tuple[torch.dtype, Shape, int, int]:
    match entry:
        case {"dtype": str(word), "shape": list(), "data_offsets": [low, high]}:
            axes = cast(list[Any], entry["shape"])
            if len(entry) != 3 or not all(is_int(axis) and axis >= 0 for axis in axes):
                raise WireError(name, "a bad shape or an unknown entry")
            if word not in DTYPES:
                raise WireError(name, f"unknown type {word[:16]}")
            if len(axes) > 64 or not (is_int(low) and is_int(high) and 0 <= low <= high <= room):
                raise WireError(name, f"does not lie within {room} bytes")
            dtype, sizes = DTYPES[word], tuple(cast(list[int], axes))
            if size(name, dtype, sizes, room) != high - low:
                raise WireError(name, f"{high - low} bytes are no {word} of shape {list(sizes)}")
            return dtype, sizes, low, high
        case _:
            raise WireError(name, "not dtype, shape and data_offsets")


def _covered(places: Sequence[Place], total: int) -> None:
    """The tensors lie side by side and fill the message: nothing hidden, nothing shared."""
    end = 0
    for place in sorted(places, key=lambda place: (place.start, place.stop)):
        if place.start != end:
            raise WireError(place.name, f"begins at {place.start}, expected {end}")
        end = place.stop
    if end != total:
        raise WireError("tensors", f"{total - end} bytes left over")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise WireError("header", "a name is given twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise WireError("header", f"{word} is no JSON")
