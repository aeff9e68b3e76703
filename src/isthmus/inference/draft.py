"""A draft as it crosses: token ids, a void mark that can only come last, and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from torch import Tensor

from isthmus.errors import InputError
from isthmus.inference.method import Judged, Kept, Knobs, Method, Settled
from isthmus.inference.verify import Grid, accepted, chosen, judge, unit
from isthmus.wire.message import Field, Message, Schema, TensorSpec, WireError

MOST = 64
"""Tokens in a draft, at most."""
MOST_WORDS = 1 << 31
POSITION = Field("u8", high=MOST)
"""How many drafted tokens stand."""
POSITION_BITS = 8


def _grid(given: object) -> str:
    try:
        return Grid(str(given)).name
    except InputError as error:
        raise PydanticCustomError("grid", "{allowed}", {"allowed": error.allowed}) from None


GridName = Annotated[str, BeforeValidator(_grid)]
"""A setting that names any `Grid`."""
RowName = Literal["exact", "fp32", "fp16"]
"""A setting that names a `Grid` so fine that rounding to it does not show in a text."""


@dataclass(frozen=True)
class Ids:
    """Token ids of a vocabulary: two bytes each below 65536 words, else four.

    The largest number of that width is no word and marks a void token. Raises `InputError` for
    a vocabulary of no word or of more than 2^31.

    >>> Ids(65535).width, Ids(65536).width, Ids(32000).bits
    (2, 4, 15)
    """

    vocab: int

    def __post_init__(self) -> None:
        if not 1 <= self.vocab <= MOST_WORDS:
            raise InputError("vocab", self.vocab, "1 to 2^31 words")

    @cached_property
    def width(self) -> int:
        """Bytes of one id on the wire."""
        return 2 if self.vocab < 1 << 16 else 4

    @cached_property
    def void(self) -> int:
        """The id that is no word."""
        return (1 << 8 * self.width) - 1

    @cached_property
    def bits(self) -> int:
        """ceil(log2 V): what an id costs on paper."""
        return (self.vocab - 1).bit_length()

    @cached_property
    def dtype(self) -> torch.dtype:
        """The tensor type of ids on the wire."""
        return torch.uint16 if self.width == 2 else torch.uint32

    def field(self) -> Field:
        """The declaration of one id."""
        return Field("u16" if self.width == 2 else "u32")

    def spec(self, *shape: int | None) -> TensorSpec:
        """The declaration of a tensor of ids."""
        return TensorSpec(self.dtype, shape)

    def one(self, name: str, given: object) -> int:
        """An id that was received; raises `WireError` when it is no word."""
        if not isinstance(given, int) or not 0 <= given < self.vocab:
            raise WireError(name, f"{given} is none of {self.vocab} words")
        return given

    def pack(self, kept: Kept) -> Tensor:
        """The ids of an offer, the void mark in place of a void one."""
        ids = kept.ids.tolist()
        if kept.void:
            ids[-1] = self.void
        return torch.tensor(ids, dtype=torch.int64).to(self.dtype)

    def read(self, name: str, given: Tensor) -> tuple[list[int], bool]:
        """The ids of an offer that can be fed, and whether a void mark follows them.

        Raises `WireError` for more than 64, and for what is no word anywhere but a last mark.
        """
        ids: list[int] = given.tolist()
        if len(ids) > MOST:
            raise WireError(name, f"{len(ids)} drafted tokens, at most {MOST}")
        void = bool(ids) and ids[-1] == self.void
        if void:
            ids.pop()
        for token in ids:
            self.one(name, token)
        return ids, void


def keep(ids: Tensor, q: Tensor, s: Tensor, u: Tensor) -> Kept:
    """Thin ids (int64 `[g]`) drawn from rows q to the sub-measures s (`[g, V]`) by chances u
    `[g]`, and cut the draft after its first void token: what follows one cannot stand."""
    drawn = ids.tolist()
    n = accepted(chosen(s, drawn), chosen(q, drawn), u)
    return Kept(ids[: n + 1], s[: n + 1], void=n < len(ids))


def checked(name: str, s: Tensor, ids: list[int]) -> None:
    """Raises `WireError` naming `name` for sub-measures `[g, V]` that no device has drawn these
    ids from (a void one is not among them)."""
    if bool((s.sum(-1) > 1 + 1e-6).any()):
        raise WireError(name, "a row with a sum above 1")
    if not bool((chosen(s, ids) > 0).all()):
        raise WireError(name, "a drafted token of probability 0")


def stands(kept: Kept, count: object) -> int:
    """A verdict's count of standing tokens; raises `WireError` when more stand than can."""
    most = len(kept.ids) - kept.void
    if not isinstance(count, int) or not 0 <= count <= most:
        raise WireError("accepted", f"{count} of {most} drafted tokens")
    return count


def settled(kept: Kept, count: object, token: int) -> Settled:
    """What the text goes on with after a verdict of `count` standing tokens and one more.

    Raises `WireError` when more stand than can.
    """
    n = stands(kept, count)
    if not len(kept.ids):
        return Settled(n, token, "target")
    return Settled(n, token, "bonus" if n == len(kept.ids) else "corrected")


class ByRows(Method):
    """What the methods share whose edge has the sub-measures and draws the correction itself.

    Their own is how an offer says them: `up`, `offer`, `drafted` and `rows`.
    """

    def __init__(self, vocab: int, knobs: Knobs | None = None) -> None:
        super().__init__(vocab, knobs)
        self.ids, self.grid, self.row = Ids(vocab), Grid(self.knobs.grid), Grid(self.knobs.row)

    def verdict(self, number: int) -> Schema:
        """The schema of their verdicts: how many tokens stand, and the one that follows."""
        fields = {"at": Field("u32"), "accepted": POSITION, "token": self.ids.field()}
        return Schema("verdict", number, fields, max_bytes=64)

    def rows(self, offer: Message) -> Tensor:
        """The sub-measures `[g, V]` of an offer. Raises `WireError`."""
        raise NotImplementedError

    def judge(self, p: Tensor, offer: Message, accept: Tensor, correct: Tensor) -> Judged:
        ids, _ = self.ids.read("ids", offer.tensors["ids"])
        s = self.rows(offer)
        p = torch.cat([unit(self.row.near(p[: len(s)])), p[len(s) :]])
        n, token = judge(p, s, ids, accept, correct)
        return Judged(n, token, Message("verdict", {"at": 0, "accepted": n, "token": token}, {}))

    def settle(self, kept: Kept, verdict: Message, correct: Tensor) -> Settled:
        token = self.ids.one("token", verdict.fields["token"])
        return settled(kept, verdict.fields["accepted"], token)
