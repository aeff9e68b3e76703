"""What a kind of message may hold: names, types, shapes, ranges and the largest size.

A schema is declared once and serves both layouts (see `isthmus.wire.message`). Whatever depends
on the schema alone is worked out once and kept with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from isthmus.errors import InputError
from isthmus.wire.errors import WireError
from isthmus.wire.fields import SCALARS, Field, Value

Shape = tuple[int, ...]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The tensor types that cross, by their names in a safetensors header."""

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
RESERVED = ("kind", "session", "sequence")
OPEN_HEADER = 1 << 22
"""Largest header in bytes of a described message whose tensors the schema leaves open."""


MOST_ENTRIES = 1 << 48
"""More entries than any tensor has: larger shapes are refused before they overflow anything."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One declared tensor: type, shape with `None` for any size, covered by the guard or not."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]
    finite: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in NAMES:
            raise InputError("tensor type", self.dtype, ", ".join(map(str, NAMES)))
        if any(size is not None and size < 0 for size in self.shape):
            raise InputError("shape", self.shape, "sizes of 0 or more, or None")

    def check(self, name: str, dtype: torch.dtype, shape: Shape) -> None:
        """Raises `WireError` when a tensor of this type and shape is not what is declared."""
        if dtype != self.dtype:
            raise WireError(name, f"{dtype} is not {self.dtype}")
        if len(shape) != len(self.shape) or any(
            want is not None and want != size for want, size in zip(self.shape, shape, strict=True)
        ):
            raise WireError(name, f"shape {list(shape)} is not {list(self.shape)}")


class Place(NamedTuple):
    """Where one tensor lies: bytes `start:stop`, counted from the end of the head."""

    name: str
    dtype: torch.dtype
    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True)
class Schema:
    """The declaration of one kind of message.

    `number` (16 bits) names the kind in the compact layout. `tensors=None` leaves the tensors
    open: the described layout then carries whatever tensors it is given, up to `max_bytes`; the
    compact layout needs them declared (`of_tree`). Raises `InputError` for a bad declaration.
    """

    kind: str
    number: int
    fields: Mapping[str, Field] = field(default_factory=dict[str, Field])
    tensors: Mapping[str, TensorSpec] | None = field(default_factory=dict[str, TensorSpec])
    max_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if not 0 <= self.number < 2**16:
            raise InputError("number", self.number, "0 to 65535")
        for name in self.fields:
            if not name or name in RESERVED:
                raise InputError("field", name, f"a name other than {', '.join(RESERVED)}")
        if self.tensors is not None and "__metadata__" in self.tensors:
            raise InputError("tensor", "__metadata__", "any other name")

    @classmethod
    def of_tree(
        cls,
        kind: str,
        number: int,
        fields: Mapping[str, Field],
        tree: Mapping[str, Tensor | TensorSpec],
        max_bytes: int = 1 << 30,
    ) -> Schema:
        """The schema of messages that carry tensors of the types and shapes of `tree`."""
        specs = {
            name: x if isinstance(x, TensorSpec) else TensorSpec(x.dtype, tuple(x.shape))
            for name, x in tree.items()
        }
        return cls(kind, number, dict(fields), specs, max_bytes)

    @cached_property
    def fixed(self) -> bool:
        """True when every field has a fixed width, so that all heads are equally long."""
        return all(item.dtype in SCALARS for item in self.fields.values())

    @cached_property
    def declared(self) -> tuple[Place, ...] | None:
        """The places of the tensors, when every size is declared."""
        if self.tensors is None or any(None in spec.shape for spec in self.tensors.values()):
            return None
        return self.place({n: (x.dtype, cast(Shape, x.shape)) for n, x in self.tensors.items()})

    @cached_property
    def frames(self) -> dict[Any, Any]:
        """What the layouts keep with the schema."""
        return {}

    @cached_property
    def header_limit(self) -> int:
        """Largest header in bytes of a described message."""
        if self.tensors is None:
            return OPEN_HEADER
        fields = sum(6 * (len(name) + item.limit) + 64 for name, item in self.fields.items())
        tensors = sum(6 * len(name) + 128 + 24 * len(x.shape) for name, x in self.tensors.items())
        return 512 + 6 * len(self.kind) + fields + tensors

    def check_names(self, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Raises `WireError` when a declared name is missing or an undeclared one is given."""
        for declared, given in ((self.fields, fields), (self.tensors, tensors)):
            if declared is None or declared.keys() == given.keys():
                continue
            for name in declared:
                if name not in given:
                    raise WireError(name, f"missing in a message of kind {self.kind}")
            for name in given:
                if name not in declared:
                    raise WireError(name, f"not declared by kind {self.kind}")

    def place(self, given: Mapping[str, tuple[torch.dtype, Shape]]) -> tuple[Place, ...]:
        """The places of tensors of these types and shapes, checked: widest types first, so that
        every tensor is aligned when the first one is."""
        key = ("places", tuple(given.items()))
        found = self.frames.get(key)
        if found is None:
            order = given if self.tensors is None else self.tensors
            for name, (dtype, shape) in given.items():
                spec = TensorSpec(dtype, shape) if self.tensors is None else self.tensors[name]
                spec.check(name, dtype, shape)
            places: list[Place] = []
            start = 0
            for name in sorted(order, key=lambda name: _rank(given[name][0])):
                dtype, shape = given[name]
                stop = start + math.prod(shape) * dtype.itemsize
                places.append(Place(name, dtype, shape, start, stop))
                start = stop
            found = self.keep(key, tuple(places))
        return cast(tuple[Place, ...], found)

    def keep(self, key: Any, value: Any) -> Any:
        """Remember what follows from the schema and the shapes; bounded, for varying shapes."""
        if len(self.frames) >= 256:
            self.frames.clear()
        self.frames[key] = value
        return value

    def guarded(self, name: str, dtype: torch.dtype) -> bool:
        """True when the finite guard covers this tensor."""
        return dtype.is_floating_point and (self.tensors is None or self.tensors[name].finite)


@dataclass(frozen=True, slots=True)
class Message:
    """One message: the fields and tensors of a schema, and the crossing it was sent under."""

    kind: str
    fields: Mapping[str, Value]
    tensors: Mapping[str, Tensor]
    session: int = 0
    sequence: int = 0


def size(name: str, dtype: torch.dtype, shape: Shape, room: int) -> int:
    """Bytes of a tensor of untrusted shape; raises `WireError` when they do not fit in `room`."""
    count = dtype.itemsize * math.prod(shape)
    # An empty tensor of absurd other sizes costs nothing here, but overflows strides later on.
    if count > room or math.prod(max(axis, 1) for axis in shape) > MOST_ENTRIES:
        raise WireError(name, f"shape {list(shape)} does not fit in {room} bytes")
    return count


def is_int(value: object) -> TypeGuard[int]:
    """True for an integer that is not a bool (JSON knows both)."""
    return isinstance(value, int) and not isinstance(value, bool)


def _rank(dtype: torch.dtype) -> tuple[int, str]:
    return -dtype.itemsize, str(dtype)
