"""The single values of a message: their types, ranges and how they are checked."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from isthmus.errors import InputError, unknown
from isthmus.wire.errors import WireError

Value = int | float | bool | str | bytes
FieldType = Literal["u8", "u16", "u32", "u64", "i64", "f32", "f64", "bool", "str", "bytes"]


class Scalar(NamedTuple):
    """How one fixed-width field is written: struct code, numpy type, widest text, range."""

    code: str
    numpy: str
    text: int
    low: float
    high: float


_F32 = float(np.finfo(np.float32).max)

SCALARS: dict[str, Scalar] = {
    "u8": Scalar("B", "u1", 3, 0, 2**8 - 1),
    "u16": Scalar("H", "<u2", 5, 0, 2**16 - 1),
    "u32": Scalar("I", "<u4", 10, 0, 2**32 - 1),
    "u64": Scalar("Q", "<u8", 20, 0, 2**64 - 1),
    "i64": Scalar("q", "<i8", 20, -(2**63), 2**63 - 1),
    "f32": Scalar("f", "<f4", 24, -_F32, _F32),
    "f64": Scalar("d", "<f8", 24, -math.inf, math.inf),
    "bool": Scalar("?", "?", 5, 0, 1),
}
_INTEGERS = frozenset({"u8", "u16", "u32", "u64", "i64"})
FLOATS = ("f32", "f64")
TEXTS = ("str", "bytes")


@dataclass(frozen=True, slots=True)
class Field:
    """One declared value: its type, its range, and for text the most bytes (UTF-8).

    Integers and floats are checked against `low` and `high` (both allowed values) where given.
    """

    dtype: FieldType
    low: float | None = None
    high: float | None = None
    limit: int = 1024

    def __post_init__(self) -> None:
        if self.dtype not in SCALARS and self.dtype not in TEXTS:
            raise unknown("field type", str(self.dtype), [*SCALARS, *TEXTS])
        if self.limit < 0:
            raise InputError("limit", self.limit, "0 or more bytes")

    def check(self, name: str, value: Any, finite: bool = False) -> Value:
        """`value` as it will be read on the far side; raises `WireError` when it breaks the field.

        Floats of type f32 come back rounded to it. NaN and infinity are refused when `finite`,
        or when a bound excludes them.
        """
        kind = type(value)
        if kind is int and self.low is self.high is None and self.dtype in _INTEGERS:
            scalar = SCALARS[self.dtype]
            if scalar.low <= value <= scalar.high:
                return value
        if self.dtype in TEXTS:
            return self._check_text(name, value)
        if self.dtype == "bool":
            if not isinstance(value, bool | np.bool_):
                raise WireError(name, f"{value!r} is not a bool")
            return bool(cast(Any, value))
        scalar = SCALARS[self.dtype]
        if self.dtype in FLOATS:
            number = self._float(name, value, scalar)
            if finite and not math.isfinite(number):
                raise WireError(name, f"{number} is not finite")
        else:
            if isinstance(value, bool | np.bool_):
                raise WireError(name, f"{value!r} is not an integer")
            try:
                number = operator.index(value)
            except TypeError:
                raise WireError(name, f"{value!r} is not an integer") from None
            if not scalar.low <= number <= scalar.high:
                raise WireError(name, f"{number} is no {self.dtype}")
        if self.low is not None and not number >= self.low:
            raise WireError(name, f"{number} is below {self.low}")
        if self.high is not None and not number <= self.high:
            raise WireError(name, f"{number} is above {self.high}")
        return number

    def _float(self, name: str, value: Any, scalar: Scalar) -> float:
        if isinstance(value, str | bytes | bool | np.bool_):
            raise WireError(name, f"{value!r} is not a number")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise WireError(name, f"{value!r} is not a number") from None
        if self.dtype == "f64" or not math.isfinite(number):
            return number
        if not scalar.low <= number <= scalar.high:
            raise WireError(name, f"{number} is no f32")
        return float(np.float32(number))

    def _check_text(self, name: str, value: Any) -> str | bytes:
        if not isinstance(value, str if self.dtype == "str" else bytes):
            raise WireError(name, f"a {type(value).__name__} is not {self.dtype}")
        try:
            raw = value.encode() if isinstance(value, str) else value
        except UnicodeEncodeError:
            raise WireError(name, "text that is not valid Unicode") from None
        if len(raw) > self.limit:
            raise WireError(name, f"{len(raw)} bytes, at most {self.limit}")
        return value

    def listed(
        self, name: str, values: Sequence[Any] | np.ndarray, n: int, finite: bool = False
    ) -> list[Value]:
        """`check` of n values of a fixed-width field, as plain values."""
        if type(values) is list and len(values) == n and self.dtype not in ("bool", "f32"):
            scalar = SCALARS[self.dtype]
            kind = float if self.dtype == "f64" else int
            bound = sys.float_info.max if finite and kind is float else math.inf
            least = max(scalar.low if self.low is None else max(self.low, scalar.low), -bound)
            most = min(scalar.high if self.high is None else min(self.high, scalar.high), bound)
            if set(map(type, values)) == {kind} and least <= min(values) and max(values) <= most:
                total = sum(values)
                if total == total:  # NaN, which no comparison above need have met, stays in a sum
                    return values
        return cast("list[Value]", self.column(name, values, n, finite).tolist())

    def column(
        self, name: str, values: Sequence[Any] | np.ndarray, n: int, finite: bool = False
    ) -> np.ndarray:
        """`check` of n values of a fixed-width field at once: an array of the field's type."""
        scalar = SCALARS[self.dtype]
        array = np.asarray(values)
        if array.shape != (n,):
            raise WireError(name, f"{array.shape} values for {n} messages")
        kinds = {"bool": "b", "f32": "fiu", "f64": "fiu"}.get(self.dtype, "iu")
        if n and array.dtype.kind not in kinds:
            return np.array([self.check(name, value, finite) for value in values], scalar.numpy)
        if n and self.dtype != "bool":
            low, high = array.min(), array.max()
            least = scalar.low if self.low is None else max(self.low, scalar.low)
            most = scalar.high if self.high is None else min(self.high, scalar.high)
            sound = bool(least <= low and high <= most)
            if not sound or (finite and not (math.isfinite(low) and math.isfinite(high))):
                # One by one, to name the value at fault (or to let a permitted NaN pass).
                for value in array.tolist():
                    self.check(name, value, finite)
        return array.astype(scalar.numpy)


NUMBER = Field("u32")
"""A session or sequence number."""
