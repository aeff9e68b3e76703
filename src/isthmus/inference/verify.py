"""Rejection sampling on sub-measures: the one piece of mathematics behind every exact method.

Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding", ICML 2023,
arXiv:2211.17192, appendix A.1; Chen et al., "Accelerating large language model decoding with
speculative sampling", arXiv:2302.01318, theorem 1. Both accept by the draft's own row q. Here q
may first be cut down to any s with 0 <= s <= q that is cheap to send: truncated, rounded toward
zero, or both; its sum may be below 1.

    device:    x ~ q;  keep x with probability s(x) / q(x), else it is void
    verifier:  accept a kept x with probability min(1, p(x) / s(x)); reject a void one
    rejected:  draw from r = max(0, p - s) / (1 - beta),  beta = sum_x min(p, s); the round ends
    all kept:  draw one more token from the target's next row

*Theorem.* A step follows p, whatever q and s are. *Proof.* x is drawn, kept and accepted with
probability q (s / q) min(1, p / s) = min(p, s), in sum beta. With the rest, 1 - beta =
sum_x max(0, p - s), it is drawn from r. Together: min(p, s) + max(0, p - s) = p. Texts follow by
induction, since a round ends at its first rejection. Acceptance is beta: 1 - TV(p, q) for s = q.

A target row that is itself rounded, to p', gives the law p' exactly when acceptance and residual
both use p'; its distance from p is TV = |p - p'|_1 / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import InputError
from isthmus.models.decode import draw
from isthmus.wire.message import TensorSpec, WireError


def unit(rows: Tensor) -> Tensor:
    """Rows `[..., V]` in float64, scaled to sum 1."""
    rows = rows.double()
    return rows / rows.sum(-1, keepdim=True)


def accepted(p: Tensor, s: Tensor, u: Tensor) -> int:
    """How many of g tokens stand before the first rejection.

    `p`, `s` and `u` `[g]` are the target's value, the sub-measure and a fresh chance for each
    token; it stands while u < min(1, p / s), and s = 0 marks a void one, always rejected. The
    device thins q to s by the same test: `accepted(s, q, u)`.

    >>> half, quarter = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.75, 0.25])
    >>> accepted(quarter, half, torch.tensor([0.4, 0.9, 0.6]))
    2
    """
    return runs(standing(p, s, u), [len(p)])[0]


def standing(p: Tensor, s: Tensor, u: Tensor) -> list[bool]:
    """Whether each of g tokens would stand if all before it did; see `accepted`."""
    each = zip(p.tolist(), s.tolist(), u.tolist(), strict=True)
    return [s_x > 0 and chance * s_x < p_x for p_x, s_x, chance in each]


def runs(stand: Sequence[bool], counts: Sequence[int]) -> list[int]:
    """How many tokens stand before the first that does not, of drafts of `counts` tokens each.

    >>> runs([True, False, True, True, False], [3, 1, 1])
    [1, 1, 0]
    """
    marks = iter(stand)
    return [[*islice(marks, count), False].index(False) for count in counts]


def residual(p: Tensor, s: Tensor) -> Tensor:
    """The law of a correction (`[..., V]`): max(0, p - s), normalised.

    Where nothing is left, p itself: p = s up to rounding, and a rejection all but impossible.

    >>> residual(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.75, 0.0, 0.125]))
    tensor([0.0000, 0.6667, 0.3333])
    """
    left = (p - s).clamp_min(0.0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total, p)


def acceptance(p: Tensor, s: Tensor) -> Tensor:
    """The probability beta `[...]` that a token drawn from q stands: the sum of min(p, s)."""
    return torch.minimum(p, s).sum(-1)


def correction(p: Tensor, s: Tensor, u: Tensor) -> int:
    """The token drawn after a rejection, from rows p and s `[V]` at one chance u."""
    return int(draw(residual(p, s), u))


def chosen(rows: Tensor, ids: Sequence[int] | Tensor) -> Tensor:
    """What each of the first n rows of `[g, V]` says of its token: `[n]`."""
    return rows[: len(ids)].gather(1, torch.as_tensor(ids, dtype=torch.int64)[:, None])[:, 0]


def judge(
    p: Tensor, s: Tensor, ids: Sequence[int], accept: Tensor, correct: Tensor
) -> tuple[int, int]:
    """How many of n tokens stand, and the token that follows them.

    `p` `[n + 1, V]`; `s` has n rows, or n + 1 where a void token followed; `accept` and `correct`
    `[n + 1]` are the chances at these positions.
    """
    n = accepted(chosen(p, ids), chosen(s, ids), accept[: len(ids)])
    if n < len(s):
        return n, correction(p[n], s[n], correct[n])
    return n, int(draw(p[n], correct[n]))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts as one, along their first axis; a single one as it is."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


FLOATS = {"exact": torch.float64, "fp32": torch.float32, "fp16": torch.float16}
WORDS = {torch.float32: torch.int32, torch.float16: torch.int16}
MOST_BITS = 32


@dataclass(frozen=True)
class Grid:
    """The numbers in [0, 1] that probabilities are rounded to before they cross.

    `exact` (float64), `fp32`, `fp16`, or "1" to "32": so many bits of fixed point, the multiples
    of 1 / (2^bits - 1), packed without gaps. Raises `InputError` for another name.

    >>> Grid("3").down(torch.tensor([0.5, 1.0, 0.1])) * 7
    tensor([3., 7., 0.], dtype=torch.float64)
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in FLOATS and self.name not in map(str, range(1, MOST_BITS + 1)):
            raise InputError("grid", self.name, f"{', '.join(FLOATS)}, 1 to {MOST_BITS} (bits)")

    @cached_property
    def dtype(self) -> torch.dtype:
        """The tensor type that crosses; uint8 for packed bits."""
        return FLOATS.get(self.name, torch.uint8)

    @cached_property
    def bits(self) -> int:
        """Bits of one number."""
        return 8 * self.dtype.itemsize if self.name in FLOATS else int(self.name)

    @cached_property
    def steps(self) -> int:
        """The largest code of fixed point."""
        return (1 << self.bits) - 1

    def down(self, rows: Tensor) -> Tensor:
        """The largest grid numbers (float64) that are not above `rows`: a sub-measure of them."""
        rows = rows.double()
        if self.name == "exact":
            return rows
        if self.name in FLOATS:
            near = rows.to(self.dtype)
            below = (near.view(WORDS[self.dtype]) - 1).view(self.dtype)
            return torch.where(near.double() > rows, below, near).double()
        codes = (rows * self.steps).floor()
        # The product may have been rounded up to the next code.
        return torch.where(codes / self.steps > rows, codes - 1, codes) / self.steps

    def near(self, rows: Tensor) -> Tensor:
        """`rows` `[..., V]` relative to their largest entries, rounded to nearest (float64).

        A multiple of a law: `unit` makes the rounded law of it, on either side of a link. That
        the largest entry is 1 keeps a flat row over many words from vanishing.
        """
        rows = rows.double()
        if self.name == "exact":
            return rows
        rows = rows / rows.amax(-1, keepdim=True)
        if self.name in FLOATS:
            return rows.to(self.dtype).double()
        return (rows * self.steps).round() / self.steps

    def spec(self, *shape: int | None) -> TensorSpec:
        """The declaration of a tensor of this shape on the wire; packed bits are one row."""
        return TensorSpec(self.dtype, shape if self.name in FLOATS else (None,))

    def pack(self, values: Tensor) -> Tensor:
        """Grid numbers as they cross."""
        if self.name in FLOATS:
            return values.to(self.dtype)
        codes = (values * self.steps).round().to(torch.int64).view(-1, 1).numpy()
        each = (codes >> np.arange(self.bits)) & 1
        return torch.as_tensor(np.packbits(each.astype(np.uint8), bitorder="little"))

    def unpack(self, name: str, given: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Float64 of this shape from what crossed. Raises `WireError` naming `name` for another
        size, NaN, or numbers outside [0, 1]."""
        if self.name in FLOATS:
            if tuple(given.shape) != shape:
                raise WireError(name, f"shape {list(given.shape)} is not {list(shape)}")
            values = given.double()
            if values.numel():
                low, high = values.aminmax()
                if not (low.item() >= 0 and high.item() <= 1):
                    raise WireError(name, "a number outside 0 to 1")
            return values
        count = math.prod(shape)
        if given.numel() != (count * self.bits + 7) // 8:
            raise WireError(name, f"{given.numel()} bytes for {count} numbers of {self.bits} bits")
        each = np.unpackbits(given.numpy(), bitorder="little")
        if each[count * self.bits :].any():
            raise WireError(name, "bits after the last number")
        weights = np.left_shift(1, np.arange(self.bits, dtype=np.int64))
        codes = each[: count * self.bits].reshape(count, self.bits) @ weights
        return torch.as_tensor(codes).double().view(shape) / self.steps
