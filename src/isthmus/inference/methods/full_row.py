"""Speculative decoding with full rows: the device drafts, the edge judges.

Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding", ICML 2023,
arXiv:2211.17192, algorithm 1; Chen et al., "Accelerating large language model decoding with
speculative sampling", arXiv:2302.01318, algorithm 2. Claim: 2 to 3 times faster, the same law.
Here the two models are apart, and the draft's rows have to cross: the baseline that the methods
which send less are measured against.

    device:  x_j ~ q_j,  j = 1..g;  s_j = q_j rounded toward zero;  x_j void unless u < s_j / q_j
       up:   x_1..x_g and the rows s_1..s_g
    edge:    one forward gives p_1..p_{g+1};  x_j stands iff u < min(1, p_j(x_j) / s_j(x_j))
             first rejection: x ~ max(0, p_j - s_j);  none: x ~ p_{g+1}
     down:   how many stand, and x

On paper a round costs g (2 V + id) bytes up with 16-bit probabilities, position and id down.
Schemas 32 (offer) and 33 (verdict).
"""

from __future__ import annotations

from torch import Tensor

from isthmus import catalogue
from isthmus.inference.draft import (
    MOST,
    POSITION_BITS,
    ByRows,
    GridName,
    RowName,
    checked,
    keep,
)
from isthmus.inference.method import Drafted, Kept, Knobs
from isthmus.inference.verify import unit
from isthmus.wire.message import Field, Message, Schema


class Settings(Knobs):
    """gamma: tokens drafted in a round. grid: what the draft's rows are rounded to (`exact`,
    `fp32`, `fp16`, or 1 to 32 bits of fixed point). row: what the target's rows are rounded to
    before they judge; drafted tokens then follow the law of the rounded rows."""

    grid: GridName = "fp16"
    row: RowName = "exact"


@catalogue.register("full-row", place="serving", status="verified")
class FullRow(ByRows):
    """Every row goes up."""

    Settings = Settings

    def __init__(self, vocab: int, knobs: Knobs | None = None) -> None:
        super().__init__(vocab, knobs)
        rows = self.grid.spec(None, vocab)
        most = 64 + MOST * (self.ids.width + (vocab * self.grid.bits + 7) // 8)
        tensors = {"ids": self.ids.spec(None), "rows": rows}
        self.up = Schema("offer", 32, {"at": Field("u32")}, tensors, most)
        self.down = self.verdict(33)

    # device

    def offer(self, at: int, last: int, ids: Tensor, q: Tensor, u: Tensor) -> tuple[Message, Kept]:
        q = unit(q)
        kept = keep(ids, q, self.grid.down(q), u)
        tensors = {"ids": self.ids.pack(kept), "rows": self.grid.pack(kept.s)}
        return Message("offer", {"at": at}, tensors), kept

    # edge

    def drafted(self, offer: Message) -> Drafted:
        ids, void = self.ids.read("ids", offer.tensors["ids"])
        checked("rows", self.rows(offer), ids)
        return Drafted(None, ids, void)

    def rows(self, offer: Message) -> Tensor:
        shape = (len(offer.tensors["ids"]), self.vocab)
        return self.grid.unpack("rows", offer.tensors["rows"], shape)

    def values(self, message: Message) -> int:
        if message.kind == "offer":
            g = len(message.tensors["ids"])
            return (g * (self.vocab * self.grid.bits + self.ids.bits) + 7) // 8
        return (POSITION_BITS + self.ids.bits + 7) // 8
