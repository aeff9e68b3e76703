"""Integers on a uniform grid: 8 bits, or 4 bits packed two to a byte.

x is sent as q = round(x / s), with one step s for the tensor or for each of its rows:
s = max|x| / L, L = 127 or 7. *Nearest* rounding is off by at most s / 2. *Stochastic* rounding
goes up with the probability of the remainder, so that E[q s] = x (QSGD: Alistarh et al., NeurIPS
2017, section 3.1, with the largest magnitude in place of the norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from isthmus import catalogue
from isthmus.errors import unknown
from isthmus.wire.codecs.base import Codec, Parts, blocks, computing, peak, shape_of, size_of
from isthmus.wire.codecs.draws import Lanes
from isthmus.wire.errors import WireError
from isthmus.wire.schema import TensorSpec

LEAST_STEP = 2.0**-100
"""Steps are never finer than this, so that their reciprocals stay finite in float32."""

UNIT = 1 << 16
"""Stochastic rounding works in this fraction of a step: as fine as its 16-bit draws."""


@dataclass(frozen=True)
class Integer(Codec):
    """Uniform quantisation with one float step per tensor, or per row of its first axis.

    Nearest: |decoded - x| <= s/2. Stochastic: |decoded - x| < s and
    |E[decoded] - x| <= s 2^-17, both up to the rounding of the arithmetic itself.
    """

    rounding: Literal["nearest", "stochastic"] = "nearest"
    per_row: bool = False
    bits: ClassVar[int]
    levels: ClassVar[int]

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "stochastic"):
            raise unknown(f"codec int{self.bits}", self.rounding, ["nearest", "stochastic"])

    def __str__(self) -> str:
        words = [self.rounding] if self.rounding != "nearest" else []
        words += ["per_row"] if self.per_row else []
        return f"int{self.bits}" + (":" + ",".join(words) if words else "")

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        chosen: dict[str, Any] = {}
        for word in options:
            if word in ("nearest", "stochastic"):
                chosen["rounding"] = word
            elif word.replace("-", "_") == "per_row":
                chosen["per_row"] = True
            else:
                raise unknown(f"codec int{cls.bits}", word, ["nearest", "stochastic", "per_row"])
        return cls(**chosen)

    def parts(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        packed = TensorSpec(torch.int8, spec.shape)
        if self.bits == 4:
            packed = TensorSpec(torch.uint8, ((size_of(spec) + 1) // 2,))
        rows = spec.shape[:1] if self._by_row(spec) else ()
        return {"": packed, ":scale": TensorSpec(computing(spec), rows)}

    def pack(self, name: str, x: Tensor, spec: TensorSpec, keys: Tensor) -> Parts:
        n, groups = len(x), self._groups(spec)
        rows = x.numpy().reshape(n * groups, -1 if x.numel() else 0)
        top = peak(name, rows)
        if top.size and top.max() > np.finfo(top.dtype).max * (1 - 2.0**-20):
            raise WireError(name, f"{top.max():g} is too large for a step")
        step = np.maximum(top / top.dtype.type(self.levels), top.dtype.type(LEAST_STEP))
        codes = np.empty(rows.shape, np.int8)
        if self.rounding == "stochastic":
            _stochastic(rows, step, keys, groups, codes)
        else:
            _nearest(rows, step, codes)
        values = codes.reshape(n, size_of(spec))
        if self.bits == 4:
            packed = torch.as_tensor(pack_nibbles(values))
        else:
            packed = torch.as_tensor(values).view(n, *shape_of(spec))
        scale = torch.as_tensor(step)
        return {
            "": packed,
            ":scale": scale.view(n, groups) if self._by_row(spec) else scale.view(n),
        }

    def unpack(self, name: str, parts: Parts, spec: TensorSpec, keys: Tensor) -> Tensor:
        n, groups = len(parts[""]), self._groups(spec)
        step = parts[":scale"].numpy().reshape(-1, 1)
        with np.errstate(over="ignore"):
            if not np.isfinite(step * step.dtype.type(self.levels)).all():
                raise WireError(f"{name}:scale", "not finite, or too large")
        values = parts[""].reshape(n, -1 if n else 0).numpy()
        if self.bits == 4:
            values = unpack_nibbles(values, size_of(spec))
        if values.size and values.min() < -self.levels:
            raise WireError(name, f"a code below -{self.levels}")
        codes = values.reshape(n * groups, -1 if values.size else 0)
        out = np.empty(codes.shape, step.dtype)
        for rows, columns in blocks(*codes.shape):
            np.multiply(codes[rows, columns], step[rows], out=out[rows, columns])
        return torch.as_tensor(out).view(n, size_of(spec))

    def _by_row(self, spec: TensorSpec) -> bool:
        return self.per_row and len(spec.shape) > 1

    def _groups(self, spec: TensorSpec) -> int:
        return shape_of(spec)[0] if self._by_row(spec) else 1


@catalogue.register("int8", place="codec", status="verified")
@dataclass(frozen=True)
class Int8(Integer):
    """-127 to 127, one byte each."""

    bits, levels = 8, 127


@catalogue.register("int4", place="codec", status="verified")
@dataclass(frozen=True)
class Int4(Integer):
    """-7 to 7, two to a byte."""

    bits, levels = 4, 7


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """int8 `[n, d]` of -8 to 7 to uint8 `[n, ceil(d / 2)]`: the even entry in the low half.

    >>> pack_nibbles(np.array([[1, -8, 7]], np.int8))
    array([[ 9, 15]], dtype=uint8)
    """
    n, d = values.shape
    out = np.full((n, (d + 1) // 2), 0x80, np.uint8) if d % 2 else np.empty((n, d // 2), np.uint8)
    for rows, columns in blocks(n, d):
        unsigned = (values[rows, columns] + 8).view(np.uint8)
        half = out[rows, columns.start // 2 : (columns.stop + 1) // 2]
        half[:] = unsigned[:, ::2]
        half[:, : unsigned.shape[1] // 2] |= unsigned[:, 1::2] << 4
    return out


def unpack_nibbles(packed: np.ndarray, d: int) -> np.ndarray:
    """The inverse of `pack_nibbles`."""
    out = np.empty((len(packed), d), np.int8)
    for rows, columns in blocks(len(packed), d):
        half = packed[rows, columns.start // 2 : (columns.stop + 1) // 2]
        block = out[rows, columns].view(np.uint8)
        block[:, ::2] = half & 15
        block[:, 1::2] = half[:, : block.shape[1] // 2] >> 4
        block -= 8
    return out


def _nearest(x: np.ndarray, step: np.ndarray, out: np.ndarray) -> None:
    inverse = (1 / step)[:, None]
    for rows, columns in blocks(*x.shape):
        scaled = x[rows, columns] * inverse[rows]
        np.rint(scaled, out=scaled)
        np.copyto(out[rows, columns], scaled, casting="unsafe")


def _stochastic(
    x: np.ndarray, step: np.ndarray, keys: Tensor, groups: int, out: np.ndarray
) -> None:
    """q = floor(x / s + u) in units of 2^-16: the sum is an exact integer, so that the chance
    of going up is exactly the remainder of x / s, rounded to 16 bits.

    The largest entry stays on the largest code: the step and its reciprocal are rounded with
    relative errors of at most 2^-24 / m and 2^-24 m / 2 (m in [1, 2) the significand of the
    step), which is less than 0.75 units at 127 x 2^16, where float32 is spaced by 0.5; a tie of
    0.5 goes to the even 127 x 2^16. Draws below a whole step never carry it further.
    """
    inverse = (step.dtype.type(UNIT) / step)[:, None]
    lanes = Lanes(keys, groups, x.shape[1])
    for rows, columns in blocks(*x.shape):
        scaled = x[rows, columns] * inverse[rows]
        np.rint(scaled, out=scaled)
        units = scaled.astype(np.int32)
        units += lanes.block(rows, columns)
        units >>= 16
        np.copyto(out[rows, columns], units, casting="unsafe")
