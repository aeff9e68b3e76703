"""What a codec is: tensors to the packed tensors that are sent, and back.

A codec is written once, for rows: `pack` and `unpack` see one tensor of n messages as `[n, d]`
and treat every row by itself. A single message is n = 1, so a cohort and a loop over its members
give the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.tree import Tree
from isthmus.wire.errors import WireError
from isthmus.wire.schema import MOST_ENTRIES, NAMES, TensorSpec

CHUNK = 1 << 16
"""Entries worked on at a time: a few buffers of this many stay in the second-level cache."""

KEY = ":key"
"""The part that carries the key, for codecs that draw the same numbers again when decoding."""

Parts = dict[str, Tensor]
Template = Mapping[str, Tensor | TensorSpec]


@dataclass(frozen=True, slots=True)
class Payload:
    """What a codec sends: packed tensors, and as text what the receiver does not know yet.

    The values of tensor `w` are the part `w`; what belongs to them is `w:scale`, `w:index`.
    `rows` messages are stacked (1 when not stacked).
    """

    tensors: Tree
    meta: dict[str, str] = field(default_factory=dict)
    rows: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all that is sent, of all `rows` messages: parts, and the text with its names."""
        text = sum(len(name.encode()) + len(value.encode()) for name, value in self.meta.items())
        return sum(x.numel() * x.element_size() for x in self.tensors.values()) + self.rows * text


class Codec(ABC):
    """Tensors to a `Payload` and back. Only floating-point tensors are changed; others pass.

    `discrete`: a tiny change of the input can change the output by much more (ranks, signs,
    rounding). `floats`: the values sent are floating point, so that `|` may encode them again.
    `keyed`: decoding needs the key.
    """

    discrete: ClassVar[bool] = True
    floats: ClassVar[bool] = False
    keyed: ClassVar[bool] = False

    @abstractmethod
    def parts(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """What is sent for one tensor, by suffix: `""` are the values."""

    @abstractmethod
    def pack(self, name: str, x: Tensor, spec: TensorSpec, keys: Tensor) -> Parts:
        """Rows `[n, d]` (float32 or float64) to parts `[n, *shape]`; `keys` is int64 `[n]`."""

    @abstractmethod
    def unpack(self, name: str, parts: Parts, spec: TensorSpec, keys: Tensor) -> Tensor:
        """Parts of the declared types and shapes to rows `[n, d]`. Values are not trusted."""

    @classmethod
    @abstractmethod
    def read(cls, options: Sequence[str]) -> Self:
        """From the words after the colon of its text; raises `InputError`."""

    def __or__(self, then: Codec) -> Codec:
        """This codec, with the values that it sends encoded by `then`."""
        return Chain(self, then)

    def encode(self, tensors: Mapping[str, Tensor], key: int, declared: bool = False) -> Payload:
        """The payload of one message.

        `key` (see `isthmus.seeds`) decides every random choice. With `declared`, the receiver
        knows the template, and shapes are not sent. Raises `WireError` naming a tensor that
        holds NaN or infinity.
        """
        stacked = {name: x.unsqueeze(0) for name, x in tensors.items()}
        many = self.encode_many(stacked, [key], declared)
        return Payload({name: x[0] for name, x in many.tensors.items()}, many.meta)

    def encode_many(
        self, stacked: Mapping[str, Tensor], keys: Sequence[int] | Tensor, declared: bool = False
    ) -> Payload:
        """n messages at once, from tensors `[n, *shape]` and n keys: stacked parts."""
        keys = torch.as_tensor(keys, dtype=torch.int64)
        n = keys.numel()
        template: dict[str, TensorSpec] = {}
        for name, x in stacked.items():
            if x.ndim == 0 or x.shape[0] != n:
                raise InputError(name, list(x.shape), f"{n} stacked messages")
            template[name] = TensorSpec(x.dtype, tuple(x.shape[1:]))
        self.declare(template)
        out: Tree = {KEY: keys.clone()} if self.keyed else {}
        for name, spec in template.items():
            if not spec.dtype.is_floating_point:
                out[name] = stacked[name].detach().cpu()
                continue
            x = stacked[name].detach().reshape(n, size_of(spec)).cpu().contiguous()
            x = x if x.dtype == torch.float64 else x.float()
            packed = self.pack(name, x, spec, tensor_keys(keys, name))
            out |= {name + suffix: part for suffix, part in packed.items()}
        meta = {} if declared else {name: _write_spec(spec) for name, spec in template.items()}
        return Payload(out, meta, n)

    def decode(self, payload: Payload, template: Template | None = None) -> Tree:
        """The tensors of one message; shapes from `template`, or else from the payload's text.

        Raises `WireError` naming the part that is missing, misshapen or out of range.
        """
        stacked = {name: x.unsqueeze(0) for name, x in payload.tensors.items()}
        many = self.decode_many(Payload(stacked, payload.meta, 1), template)
        return {name: x[0] for name, x in many.items()}

    def decode_many(self, payload: Payload, template: Template | None = None) -> Tree:
        """The stacked tensors of n messages, from stacked parts."""
        if template is None:
            specs = {name: _read_spec(name, text) for name, text in payload.meta.items()}
        else:
            specs = {name: _spec(x) for name, x in template.items()}
        try:
            wanted = self.declare(specs)
        except InputError as error:
            raise WireError(error.field, str(error)) from None
        for name, part in wanted.items():
            if name not in payload.tensors:
                raise WireError(name, "missing in the payload")
            x = payload.tensors[name]
            part.check(name, x.dtype, tuple(x.shape[1:]))
            if x.ndim == 0 or x.shape[0] != payload.rows:
                raise WireError(name, f"not stacked for {payload.rows} messages")
        for name in payload.tensors:
            if name not in wanted:
                raise WireError(name, "not a part of the payload")
        keys = payload.tensors[KEY] if self.keyed else torch.zeros(payload.rows, dtype=torch.int64)
        out: Tree = {}
        for name, spec in specs.items():
            x = payload.tensors[name]
            if spec.dtype.is_floating_point:
                suffixes = self.parts(spec)
                parts = {suffix: payload.tensors[name + suffix].cpu() for suffix in suffixes}
                x = self.unpack(name, parts, spec, tensor_keys(keys, name)).to(spec.dtype)
                x = x.view(payload.rows, *shape_of(spec))
            out[name] = x
        return out

    def declare(self, template: Template) -> dict[str, TensorSpec]:
        """The types and shapes of what is sent for tensors like these: what a schema declares.

        Raises `InputError` when a tensor has the name of a part of another.
        """
        out = {KEY: TensorSpec(torch.int64, ())} if self.keyed else {}
        for name, x in template.items():
            spec = _spec(x)
            parts = self.parts(spec) if spec.dtype.is_floating_point else {"": spec}
            for suffix, part in parts.items():
                if name + suffix in out:
                    raise InputError("tensor", name + suffix, "a name that no other part has")
                out[name + suffix] = part
        return out


@dataclass(frozen=True)
class Chain(Codec):
    """`first | then`: the values of the first are encoded by the second."""

    first: Codec
    then: Codec

    def __post_init__(self) -> None:
        if not self.first.floats:
            raise InputError("codec", f"{self.first}|{self.then}", f"nothing after {self.first}")
        probe = TensorSpec(torch.float32, (2, 3))
        inner = self.first.parts(probe)
        twice = (inner.keys() & self.then.parts(inner[""]).keys()) - {""}
        if twice:
            raise InputError("codec", f"{self.first}|{self.then}", f"one codec with {min(twice)}")

    def __str__(self) -> str:
        return f"{self.first}|{self.then}"

    @property
    def discrete(self) -> bool:  # type: ignore[override]
        return self.first.discrete or self.then.discrete

    @property
    def floats(self) -> bool:  # type: ignore[override]
        return self.then.floats

    @property
    def keyed(self) -> bool:  # type: ignore[override]
        return self.first.keyed or self.then.keyed

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        raise InputError("codec", "|".join(options), "text read by codecs.parse")

    def parts(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        outer = self.first.parts(spec)
        return outer | self.then.parts(outer[""])

    def pack(self, name: str, x: Tensor, spec: TensorSpec, keys: Tensor) -> Parts:
        outer = self.first.pack(name, x, spec, keys)
        inner = self.first.parts(spec)[""]
        values = outer[""].reshape(len(x), size_of(inner))
        values = values if values.dtype == torch.float64 else values.float()
        return outer | self.then.pack(name, values, inner, tensor_keys(keys, "then"))

    def unpack(self, name: str, parts: Parts, spec: TensorSpec, keys: Tensor) -> Tensor:
        inner = self.first.parts(spec)[""]
        values = self.then.unpack(name, parts, inner, tensor_keys(keys, "then"))
        values = values.to(inner.dtype).view(len(values), *shape_of(inner))
        return self.first.unpack(name, parts | {"": values}, spec, keys)


def peak(name: str, x: np.ndarray) -> np.ndarray:
    """The largest magnitude of each row of `[g, d]`: also the finite guard, as NaN stays NaN."""
    if x.size == 0:
        return np.zeros(len(x), x.dtype)
    top = np.maximum(x.max(axis=1), -x.min(axis=1))
    if not np.isfinite(top).all():
        raise WireError(name, "holds NaN or infinity")
    return top


def blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cuts of a matrix that fit the cache: whole rows, or pieces of one long row."""
    if columns >= CHUNK:
        for i in range(rows):
            for start in range(0, columns, CHUNK):
                yield slice(i, i + 1), slice(start, min(start + CHUNK, columns))
    else:
        step = CHUNK // max(columns, 1)
        for i in range(0, rows, step):
            yield slice(i, min(i + step, rows)), slice(0, columns)


def tensor_keys(keys: Tensor, word: str) -> Tensor:
    """The keys of one tensor or stage, from those of its messages: int64 `[n]`."""
    return cast(Tensor, seeds.fold(keys, seeds.key(word)))


def computing(spec: TensorSpec) -> torch.dtype:
    """The type in which a tensor is worked on: float64 stays, the narrower become float32."""
    return torch.float64 if spec.dtype == torch.float64 else torch.float32


def shape_of(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a tensor that is at hand: no size is open."""
    return cast(tuple[int, ...], spec.shape)


def size_of(spec: TensorSpec) -> int:
    """Entries of one tensor."""
    return math.prod(shape_of(spec))


def fraction(codec: str, text: str) -> float:
    """A part of the entries, in (0, 1]; raises `InputError`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise InputError(f"codec {codec}", text, "a fraction above 0, up to 1")
    return value


def _spec(x: Tensor | TensorSpec) -> TensorSpec:
    return x if isinstance(x, TensorSpec) else TensorSpec(x.dtype, tuple(x.shape))


def _write_spec(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')}[{','.join(map(str, spec.shape))}]"


def _read_spec(name: str, text: str) -> TensorSpec:
    word, bracket, sizes = text.removesuffix("]").partition("[")
    axes = sizes.split(",") if sizes else []
    if word not in _TYPES or not bracket:
        raise WireError(name, f"{text[:32]!r} is no type and shape")
    if len(axes) > 64 or not all(a.isascii() and a.isdigit() and len(a) < 16 for a in axes):
        raise WireError(name, f"{text[:32]!r} is no shape")
    shape = tuple(map(int, axes))
    if math.prod(max(axis, 1) for axis in shape) > MOST_ENTRIES:
        raise WireError(name, f"{text[:32]!r} is too large")
    return TensorSpec(_TYPES[word], shape)


_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}
