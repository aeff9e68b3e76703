"""Random entries of each tensor; the receiver draws their places again from the key.

Random-k sparsification (Stich et al., "Sparsified SGD with memory", NeurIPS 2018, definition 2.1;
Konecny et al., arXiv:1610.05492, section 3: random masks from a seed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.wire.codecs.base import Codec, Parts, blocks, computing, fraction, peak, size_of
from isthmus.wire.codecs.draws import hashes
from isthmus.wire.codecs.topk import kept
from isthmus.wire.errors import WireError
from isthmus.wire.schema import TensorSpec

FEW = 1 << 12
"""Up to so many places it is quicker to hash all of them than to draw until k differ."""


@catalogue.register("random-k", place="codec", status="verified")
@dataclass(frozen=True)
class RandomK(Codec):
    """k = ceil(fraction d) entries drawn without replacement; sent are the values and one 8-byte
    key for all tensors. `unbiased` multiplies by d/k, so that E[C(x)] = x; without it C is a
    contraction, which error feedback needs.
    """

    fraction: float = 0.01
    unbiased: bool = False
    discrete = False
    floats = True
    keyed = True

    def __post_init__(self) -> None:
        fraction("randomk", str(self.fraction))

    def __str__(self) -> str:
        return f"randomk:{self.fraction!r}" + (",unbiased" if self.unbiased else "")

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        numbers = [text for text in options if text != "unbiased"]
        if len(numbers) > 1:
            raise InputError("codec randomk", ",".join(options), "a fraction, unbiased")
        return cls(*(fraction("randomk", text) for text in numbers), unbiased="unbiased" in options)

    def parts(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"": TensorSpec(computing(spec), (kept(self.fraction, size_of(spec)),))}

    def pack(self, name: str, x: Tensor, spec: TensorSpec, keys: Tensor) -> Parts:
        peak(name, x.numpy())
        d = size_of(spec)
        k = kept(self.fraction, d)
        values = x.gather(1, places(keys, d, k))
        if self.unbiased and k:
            values *= d / k
            if values.numel() and not torch.isfinite(values).all():
                raise WireError(name, f"too large to be multiplied by {d / k:g}")
        return {"": values}

    def unpack(self, name: str, parts: Parts, spec: TensorSpec, keys: Tensor) -> Tensor:
        values, d = parts[""], size_of(spec)
        out = torch.zeros((len(values), d), dtype=values.dtype)
        return out.scatter_(1, places(keys, d, values.shape[1]), values)


def places(keys: Tensor, d: int, k: int) -> Tensor:
    """k different places of d for each key, in rising order: int64 `[n, k]`.

    Those of the k smallest of d hashes; of many places, the first k different draws.
    """
    out = np.empty((len(keys), k), np.int64)
    if k > 0 and d <= FEW:
        for rows, _ in blocks(len(keys), d):
            drawn = hashes(keys[rows], d)
            out[rows] = np.sort(np.argpartition(drawn, k - 1, axis=1)[:, :k], axis=1)
    elif k:
        for i in range(len(keys)):
            out[i] = _draw(keys[i : i + 1], d, k)
    return torch.as_tensor(out)


def _draw(key: Tensor, d: int, k: int) -> np.ndarray:
    if 2 * k > d:
        # Most are kept: draw those that are not.
        keep = np.ones(d, bool)
        keep[_draw(key, d, d - k)] = False
        return np.flatnonzero(keep)
    tries = k + k // 2 + 8
    while True:
        found, first = np.unique(hashes(key, tries) % np.uint64(d), return_index=True)
        if len(found) >= k:
            return np.sort(found[np.argsort(first)[:k]]).astype(np.int64)
        tries *= 2
