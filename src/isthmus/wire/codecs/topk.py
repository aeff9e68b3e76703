"""The largest entries of each tensor, with their places.

Top-k sparsification (Aji and Heafield, EMNLP 2017; Stich et al., "Sparsified SGD with memory",
NeurIPS 2018, definition 2.1): a contraction, ||C(x) - x||^2 <= (1 - k/d) ||x||^2. Biased: pair it
with error feedback.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.wire.codecs.base import Codec, Parts, computing, fraction, peak, size_of
from isthmus.wire.errors import WireError
from isthmus.wire.schema import TensorSpec


@catalogue.register("top-k", place="codec", status="verified")
@dataclass(frozen=True)
class TopK(Codec):
    """The k = ceil(fraction d) entries of largest magnitude: values, and places in rising order
    in the narrowest of uint8, uint16, int32 and int64 that holds them.
    """

    fraction: float = 0.01
    floats = True

    def __post_init__(self) -> None:
        fraction("topk", str(self.fraction))

    def __str__(self) -> str:
        return f"topk:{self.fraction!r}"

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        if len(options) > 1:
            raise InputError("codec topk", ",".join(options), "one fraction")
        return cls(*(fraction("topk", text) for text in options))

    def parts(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        d = size_of(spec)
        k = kept(self.fraction, d)
        return {"": TensorSpec(computing(spec), (k,)), ":index": TensorSpec(place_type(d), (k,))}

    def pack(self, name: str, x: Tensor, spec: TensorSpec, keys: Tensor) -> Parts:
        rows = x.numpy()
        peak(name, rows)
        n, d = rows.shape
        k = kept(self.fraction, d)
        index = np.empty((n, k), np.int64)
        if k:
            for i, row in enumerate(rows):
                index[i] = np.sort(np.argpartition(np.abs(row), d - k)[d - k :])
        values = np.take_along_axis(rows, index, axis=1)
        places = torch.as_tensor(index).to(place_type(d))
        return {"": torch.as_tensor(values), ":index": places}

    def unpack(self, name: str, parts: Parts, spec: TensorSpec, keys: Tensor) -> Tensor:
        index = parts[":index"].to(torch.int64)
        d = size_of(spec)
        if index.numel():
            rising = bool((index[:, 1:] > index[:, :-1]).all())
            if not (rising and index.min() >= 0 and index.max() < d):
                raise WireError(f"{name}:index", f"not rising places below {d}")
        out = torch.zeros((len(index), d), dtype=parts[""].dtype)
        return out.scatter_(1, index, parts[""])


def kept(part: float, d: int) -> int:
    """How many of d entries are kept: ceil(part d), none of none.

    >>> kept(0.01, 1000), kept(0.01, 10), kept(1.0, 7), kept(0.1, 0)
    (10, 1, 7, 0)
    """
    # The product is rounded first: 0.07 * 100 is a hair above 7.
    return min(d, math.ceil(round(part * d, 6))) if d else 0


def place_type(d: int) -> torch.dtype:
    """The narrowest type that holds the places 0 to d - 1."""
    for dtype, size in ((torch.uint8, 2**8), (torch.uint16, 2**16), (torch.int32, 2**31)):
        if d <= size:
            return dtype
    return torch.int64
