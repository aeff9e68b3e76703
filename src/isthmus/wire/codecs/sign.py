"""One bit per entry: its sign, with the mean magnitude of the tensor.

C(x) = (||x||_1 / d) sign(x): scaled sign (Karimireddy et al., "Error feedback fixes SignSGD and
other gradient compression schemes", ICML 2019, section 4). Biased: pair it with error feedback.
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
from isthmus.wire.codecs.base import Codec, Parts, blocks, computing, peak, size_of
from isthmus.wire.errors import WireError
from isthmus.wire.schema import TensorSpec


@catalogue.register("sign", place="codec", status="verified")
@dataclass(frozen=True)
class Sign(Codec):
    """Signs packed eight to a byte (0 counts as positive) and one float scale per tensor."""

    def __str__(self) -> str:
        return "sign"

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        if options:
            raise InputError("codec sign", ",".join(options), "no options")
        return cls()

    def parts(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        packed = TensorSpec(torch.uint8, ((size_of(spec) + 7) // 8,))
        return {"": packed, ":scale": TensorSpec(computing(spec), ())}

    def pack(self, name: str, x: Tensor, spec: TensorSpec, keys: Tensor) -> Parts:
        rows = x.numpy()
        n, d = rows.shape
        peak(name, rows)
        packed = np.empty((n, (d + 7) // 8), np.uint8)
        total = np.zeros(n)
        for at, columns in blocks(n, d):
            block = rows[at, columns]
            packed[at, columns.start // 8 : (columns.stop + 7) // 8] = np.packbits(block >= 0, 1)
            total[at] += np.abs(block).sum(axis=1, dtype=np.float64)
        scale = torch.as_tensor(total / max(d, 1)).to(computing(spec))
        return {"": torch.as_tensor(packed), ":scale": scale}

    def unpack(self, name: str, parts: Parts, spec: TensorSpec, keys: Tensor) -> Tensor:
        scale = parts[":scale"].numpy().reshape(-1, 1)
        if not np.isfinite(scale).all():
            raise WireError(f"{name}:scale", "not finite")
        packed = parts[""].numpy()
        n, d = len(packed), size_of(spec)
        out = np.empty((n, d), scale.dtype)
        for at, columns in blocks(n, d):
            eighths = packed[at, columns.start // 8 : (columns.stop + 7) // 8]
            bits = np.unpackbits(eighths, axis=1, count=columns.stop - columns.start)
            signs = (2 * bits - 1).view(np.int8)
            np.multiply(signs, scale[at], out=out[at, columns])
        return torch.as_tensor(out)
