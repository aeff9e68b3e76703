"""Every entry as a floating-point number: as it is, or in 32 or 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from isthmus import catalogue
from isthmus.errors import InputError, unknown
from isthmus.wire.codecs.base import Codec, Parts, peak, shape_of
from isthmus.wire.errors import WireError
from isthmus.wire.schema import TensorSpec

FORMATS = {"exact": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@catalogue.register("dense", place="codec", status="verified")
@dataclass(frozen=True)
class Dense(Codec):
    """All entries in one format, rounded to nearest.

    `exact` keeps the type of each tensor. The relative error is at most 2^-24 in fp32, 2^-8 in
    bf16 and, for normal numbers, 2^-11 in fp16. Values beyond the format raise `WireError`.
    """

    format: str = "exact"
    floats = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise unknown("codec dense", self.format, FORMATS)

    def __str__(self) -> str:
        return "dense" if self.format == "exact" else f"dense:{self.format}"

    @property
    def discrete(self) -> bool:  # type: ignore[override]
        return self.format in ("bf16", "fp16")

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        if len(options) > 1:
            raise InputError("codec dense", ",".join(options), "one format")
        return cls(*options)

    def parts(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"": TensorSpec(FORMATS[self.format] or spec.dtype, spec.shape)}

    def pack(self, name: str, x: Tensor, spec: TensorSpec, keys: Tensor) -> Parts:
        dtype = self.parts(spec)[""].dtype
        top = peak(name, x.numpy())
        if top.size and top.max() > torch.finfo(dtype).max:
            raise WireError(name, f"{top.max():g} is too large for {self.format}")
        return {"": x.to(dtype).view(len(x), *shape_of(spec))}

    def unpack(self, name: str, parts: Parts, spec: TensorSpec, keys: Tensor) -> Tensor:
        return parts[""].to(spec.dtype)
