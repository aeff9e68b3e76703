"""One message to bytes and back, in either layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import unknown
from isthmus.wire import compact, described
from isthmus.wire.errors import WireError
from isthmus.wire.fields import NUMBER
from isthmus.wire.schema import Message, Place, Schema

Layout = Literal["described", "compact"]
LAYOUTS: dict[str, Any] = {"described": described, "compact": compact}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Envelope(NamedTuple):
    """What a receiver of several schemas needs first: the schema's kind (described) or number
    (compact), and the crossing."""

    schema: str | int
    session: int
    sequence: int


def encode(
    message: Message,
    schema: Schema,
    layout: Layout = "described",
    session: int | None = None,
    sequence: int | None = None,
) -> bytes:
    """The bytes of `message`; session and sequence default to those of the message.

    Raises `WireError` naming the field or tensor that the schema does not allow. Values are not
    searched for NaN here: the receiver does that.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if message.kind != schema.kind:
        raise WireError("kind", f"{message.kind} is not {schema.kind}")
    schema.check_names(message.fields, message.tensors)
    places = schema.place({name: (x.dtype, tuple(x.shape)) for name, x in message.tensors.items()})
    checked = Message(
        schema.kind,
        {name: item.check(name, message.fields[name]) for name, item in schema.fields.items()},
        message.tensors,
        cast(int, NUMBER.check("session", message.session if session is None else session)),
        cast(int, NUMBER.check("sequence", message.sequence if sequence is None else sequence)),
    )
    head = LAYOUTS[layout].head(schema, checked, places)
    check_size(len(head) + (places[-1].stop if places else 0), schema)
    return b"".join([head, *(whole(message.tensors[place.name]).data for place in places)])


def decode(data: bytes | bytearray | memoryview, schema: Schema, finite: bool = True) -> Message:
    """The message in untrusted `data`, of either layout.

    Tensors are views of a writable `data` where it is aligned; a read-only one is copied, since
    arithmetic in place would change it. `finite` refuses NaN and infinity in fields and in the
    tensors that the schema guards. Raises `WireError` naming the field, and nothing else; memory
    is bounded by the size of the input, which is bounded by the schema.
    """
    view = memoryview(data).cast("B")
    check_size(len(view), schema)
    message, places, start = layout_of(view).read_head(schema, view, finite)
    raw = np.frombuffer(view, np.uint8) if len(view) else np.empty(0, np.uint8)
    tensors = {
        place.name: _tensor(raw[start + place.start : start + place.stop], place)
        for place in places
    }
    if schema.tensors is not None:
        tensors = {name: tensors[name] for name in schema.tensors}
    if finite:
        check_finite({n: x for n, x in tensors.items() if schema.guarded(n, x.dtype)})
    return Message(message.kind, message.fields, tensors, message.session, message.sequence)


def peek(data: bytes | bytearray | memoryview) -> Envelope:
    """Which schema and crossing a message claims, before it is decoded; raises `WireError`."""
    view = memoryview(data).cast("B")
    if layout_of(view) is compact:
        if len(view) < compact.FRAMING.size:
            raise WireError("framing", f"{len(view)} bytes are no message")
        session, number, _, sequence = compact.FRAMING.unpack_from(view)
        return Envelope(number, session, sequence)
    return Envelope(*described.envelope(view))


def check_finite(tree: Mapping[str, Tensor]) -> None:
    """Raises `WireError` naming the first float tensor that holds NaN or infinity.

    One minimum and maximum per tensor, which NaN passes through.
    """
    for name, x in tree.items():
        if x.is_floating_point() and x.numel() and not _finite(x.detach()):
            raise WireError(name, "holds NaN or infinity")


def check_size(length: int, schema: Schema) -> None:
    """Raises `WireError` for a message longer than its schema allows."""
    if length > schema.max_bytes:
        raise WireError("message", f"{length} bytes, at most {schema.max_bytes}")


def layout_of(data: memoryview) -> Any:
    """The module of the layout that `data` is in: the upper half of a header length is zero."""
    return compact if len(data) >= 8 and any(data[4:8]) else described


def whole(x: Tensor) -> np.ndarray:
    """The values of a tensor as bytes in row-major order, copied only when they do not lie so."""
    # By way of integers: numpy has none of the shorter floats.
    bits = x.detach().cpu().view(BITS[x.dtype.itemsize]).numpy()
    return np.ascontiguousarray(bits).view(np.uint8)


def _tensor(raw: np.ndarray, place: Place) -> Tensor:
    if not len(raw):
        return torch.empty(place.shape, dtype=place.dtype)
    if place.dtype == torch.bool and raw.max() > 1:
        raise WireError(place.name, "a byte that is no bool")
    own = raw.flags.writeable and not raw.ctypes.data % place.dtype.itemsize
    return torch.frombuffer(raw if own else bytearray(raw), dtype=place.dtype).view(place.shape)


def _finite(x: Tensor) -> bool:
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        array = x.numpy()
        return bool(np.isfinite(array.min()) and np.isfinite(array.max()))
    if x.dtype.itemsize == 1:
        x = x.to(torch.float16)  # float8 has no reductions, and float16 holds its values
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(x))
