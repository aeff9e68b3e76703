"""TK-SLT: top-K sparse logits go up, and the draft length follows the link.

"Top-K sparse logits transmission" for speculative decoding between a device and a base station,
arXiv:2509.04576. Claim: the same quality at a fraction of the bandwidth, with an optimal draft
length in closed form.

    device:  q_j = softmax over the K largest logits of step j;  x_j ~ q_j
       up:   x_1..x_g, and of each row the K ids and their probabilities s_j = q_j, rounded
    edge:    x_j stands iff u < min(1, p_j(x_j) / s_j(x_j)); the first rejection draws from
             max(0, p_j - s_j), which is all of p_j outside the top K
     down:   how many stand, and the next token

    S(g) = (1 - alpha^(g+1)) / ((1 - alpha)(1 + g L)),   L = b + c                  (theorem 2)
    b, c: seconds to send a row, to draft a token, per seconds of one verification

`adapt` is algorithms 1 and 2: draft the g of the largest S, and none where S(g) is no gain.
Exact because x_j is drawn from the truncated row that is sent, and because rounding goes toward
zero: what it takes off makes a token void by chance (`isthmus.inference.verify`).

(reconstructed): that rule in place of renormalising the rounded row; what a round costs beside
the drafted tokens counts as well (latencies, the verdict), so that drafting none is compared as
a round without a draft; b and c are declared costs, not running means; the prior of alpha
(`length.estimate`). Rounds without a draft teach nothing about alpha: a text that has gone over
to the target stays with it. `form="raw"` draws from the whole row q instead and sends its K
largest probabilities as they are: a token outside of them is void.

On paper a round costs g (K (2 + id) + id) bytes up, position and id down; the paper itself leaves
out the ids (`probabilities`). Schemas 34 (offer) and 35 (verdict).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field as Knob
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
from isthmus.inference.length import best, estimate, speed
from isthmus.inference.method import Costs, Drafted, Kept, Knobs, Seen
from isthmus.inference.verify import unit
from isthmus.models.decode import Law
from isthmus.wire.message import Field, Message, Schema, WireError


class Settings(Knobs):
    """K: probabilities sent of each row (at most the vocabulary; the paper's sweep is 3 to all).
    form: `renormalised` (draw from the K largest) or `raw` (draw from all). gamma: tokens drafted
    in a round; with `adapt`, in the first. grid: what the draft's probabilities are rounded to
    (`exact`, `fp32`, `fp16` as in the paper, or 1 to 32 bits of fixed point). row: what the
    target's rows are rounded to before they judge."""

    K: int = Knob(32, ge=1)
    form: Literal["renormalised", "raw"] = "renormalised"
    adapt: bool = True
    grid: GridName = "fp16"
    row: RowName = "exact"


@dataclass(frozen=True)
class Truncated:
    """The law of a device that samples from the k largest probabilities only (`[..., V]`)."""

    law: Law
    k: int

    def __call__(self, logits: Tensor) -> Tensor:
        rows = self.law(logits)
        values, ids = rows.topk(self.k, dim=-1)
        return torch.zeros_like(rows).scatter(-1, ids, values / values.sum(-1, keepdim=True))


@catalogue.register("tk-slt", place="serving", status="miniature")
class TkSlt(ByRows):
    """K entries of each row go up."""

    Settings = Settings

    def __init__(self, vocab: int, knobs: Knobs | None = None) -> None:
        super().__init__(vocab, knobs)
        self.k = k = min(self.knobs.K, vocab)
        tensors = {
            "ids": self.ids.spec(None),
            "top": self.ids.spec(None, k),
            "s": self.grid.spec(None, k),
        }
        most = 64 + MOST * (self.ids.width * (k + 1) + (k * self.grid.bits + 7) // 8)
        self.up = Schema("offer", 34, {"at": Field("u32")}, tensors, most)
        self.down = self.verdict(35)

    # device

    def length(self, seen: Seen, costs: Costs) -> int:
        if not self.knobs.adapt or not seen.rounds:
            return self.knobs.gamma
        alpha = estimate(seen.judged, seen.accepted)
        sent = (self.k + 1) * self.ids.width + self.k * self.grid.bits / 8
        load = costs.draft + sent * costs.up
        base = costs.verify + costs.round + (1 + self.ids.width) * costs.down
        g = best(alpha, load, base, MOST)
        return g if speed(alpha, g, load, base) > speed(alpha, 0, load, base) else 0

    def drafting(self, law: Law) -> Callable[[Tensor], Tensor]:
        whole = self.k == self.vocab or self.knobs.form == "raw"
        return law if whole else Truncated(law, self.k)

    def offer(self, at: int, last: int, ids: Tensor, q: Tensor, u: Tensor) -> tuple[Message, Kept]:
        q = unit(q)
        top = q.topk(self.k, dim=-1).indices.sort(dim=-1).values
        s = torch.zeros_like(q).scatter(-1, top, self.grid.down(q.gather(-1, top)))
        kept = keep(ids, q, s, u)
        top = top[: len(kept.ids)]
        tensors = {
            "ids": self.ids.pack(kept),
            "top": top.to(self.ids.dtype),
            "s": self.grid.pack(kept.s.gather(-1, top)),
        }
        return Message("offer", {"at": at}, tensors), kept

    # edge

    def drafted(self, offer: Message) -> Drafted:
        ids, void = self.ids.read("ids", offer.tensors["ids"])
        top = offer.tensors["top"].long()
        if len(top) != len(ids) + void:
            raise WireError("top", f"{len(top)} rows for {len(ids) + void} drafted tokens")
        if bool((top >= self.vocab).any()) or bool((top.diff(dim=-1) <= 0).any()):
            raise WireError("top", f"ids that do not rise within {self.vocab} words")
        checked("s", self.rows(offer), ids)
        return Drafted(None, ids, void)

    def rows(self, offer: Message) -> Tensor:
        top = offer.tensors["top"].long()
        values = self.grid.unpack("s", offer.tensors["s"], tuple(top.shape))
        return torch.zeros(len(top), self.vocab, dtype=torch.float64).scatter(-1, top, values)

    # what it costs on paper

    def values(self, message: Message) -> int:
        if message.kind == "offer":
            g = len(message.tensors["ids"])
            return (g * (self.k * (self.grid.bits + self.ids.bits) + self.ids.bits) + 7) // 8
        return (POSITION_BITS + self.ids.bits + 7) // 8

    def probabilities(self, offer: Message) -> int:
        """The paper's own count of an offer, in bytes: the probabilities, no id."""
        return (len(offer.tensors["ids"]) * self.k * self.grid.bits + 7) // 8
