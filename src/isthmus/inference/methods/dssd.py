"""DSSD: verification itself is split; scalars go up, one row comes down.

"Distributed split speculative decoding", arXiv:2507.12000. Claim: the uplink of many vocabulary
rows becomes the downlink of one, which lowers latency at unchanged quality.

    device:  x_j ~ q_j;  s_j = q_j rounded toward zero;  x_j void unless u < s_j / q_j
       up:   x_1..x_g, the scalars s_j(x_j), and the text's last token
    edge:    one forward gives p_1..p_{g+1};  x_j stands iff u < min(1, p_j(x_j) / s_j(x_j))
     down:   first rejection j:  j and the row p_j;   none:  x ~ p_{g+1}
    device:  after a rejection draws x ~ max(0, p_j - s_j)

    T = g T_draft + up(g (2 + id)) + T_target + (1 - alpha^g) down(2 V) + alpha^g down(id) + RTT

The edge does not learn the corrected token until the next offer brings it as `last`
(reconstructed). The row comes down in fp16, relative to its largest entry; the edge accepts by
that same rounded row, so where tokens are judged the text has the law of the rounded row, 1e-4
or so from p. The scalar that goes up is the one that the device subtracts: exact at any width of
it (reconstructed; `isthmus.inference.verify`).
`adapt` drafts the g of 1 to 64 that maximises tokens per time, by a scan (reconstructed).

On paper a round costs g (2 + id) + id bytes up, and down position + 2 V after a rejection, else
position + id. Schemas 36 (offer) and 37 (verdict).
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus import catalogue
from isthmus.inference.draft import (
    MOST,
    POSITION,
    POSITION_BITS,
    GridName,
    Ids,
    RowName,
    settled,
    stands,
)
from isthmus.inference.length import estimate, scan
from isthmus.inference.method import Costs, Drafted, Judged, Kept, Knobs, Method, Seen, Settled
from isthmus.inference.verify import Grid, accepted, chosen, correction, unit
from isthmus.models.decode import draw
from isthmus.wire.message import Field, Message, Schema, WireError


class Settings(Knobs):
    """gamma: tokens drafted in a round (4 in the paper); with `adapt`, in the first. grid: what
    the scalars are rounded to (`exact`, `fp32`, `fp16`, or 1 to 32 bits of fixed point). row:
    what the row that comes down is rounded to."""

    adapt: bool = False
    grid: GridName = "fp16"
    row: RowName = "fp16"


@catalogue.register("dssd", place="serving", status="miniature")
class Dssd(Method):
    """Scalars go up; the row of a rejection comes down."""

    Settings = Settings

    def __init__(self, vocab: int, knobs: Knobs | None = None) -> None:
        super().__init__(vocab, knobs)
        self.ids, self.grid, self.row = Ids(vocab), Grid(self.knobs.grid), Grid(self.knobs.row)
        offer = {"at": Field("u32"), "last": self.ids.field()}
        scalars = {"ids": self.ids.spec(None), "s": self.grid.spec(None)}
        most = 64 + MOST * (self.ids.width + (self.grid.bits + 7) // 8)
        self.up = Schema("offer", 36, offer, scalars, most)
        verdict = {"at": Field("u32"), "accepted": POSITION, "token": self.ids.field()}
        most = 64 + vocab * self.row.bits // 8
        self.down = Schema("verdict", 37, verdict, {"row": self.row.spec(None)}, most)

    # device

    def length(self, seen: Seen, costs: Costs) -> int:
        if not self.knobs.adapt or not seen.rounds:
            return self.knobs.gamma
        load = costs.draft + (self.ids.width + self.grid.bits / 8) * costs.up
        base = costs.verify + costs.round + (1 + self.ids.width) * costs.down
        row = self.vocab * self.row.bits / 8 * costs.down
        return scan(estimate(seen.judged, seen.accepted), load, base, row, MOST)

    def offer(self, at: int, last: int, ids: Tensor, q: Tensor, u: Tensor) -> tuple[Message, Kept]:
        q_x = chosen(q, ids.tolist()) / q.sum(-1)
        s_x = self.grid.down(q_x)
        n = accepted(s_x, q_x, u)
        kept = Kept(ids[: n + 1], q[: n + 1], void=n < len(ids))  # of s one row is needed at most
        scalars = s_x[: n + 1]
        if kept.void:
            scalars[-1] = 0.0
        tensors = {"ids": self.ids.pack(kept), "s": self.grid.pack(scalars)}
        return Message("offer", {"at": at, "last": last}, tensors), kept

    def settle(self, kept: Kept, verdict: Message, correct: Tensor) -> Settled:
        token, row = verdict.fields["token"], verdict.tensors["row"]
        n = stands(kept, verdict.fields["accepted"])
        if token != self.ids.void:
            if n < len(kept.ids) or len(row):
                raise WireError("token", "a token where a row decides")
            return settled(kept, n, self.ids.one("token", token))
        if n == len(kept.ids):
            raise WireError("row", "a row where no token was rejected")
        p = self.row.unpack("row", row, (self.vocab,))
        if not bool((p > 0).any()):
            raise WireError("row", "a row without mass")
        s = self.grid.down(unit(kept.s[n]))
        return settled(kept, n, correction(unit(p), s, correct[n]))

    # edge

    def drafted(self, offer: Message) -> Drafted:
        ids, void = self.ids.read("ids", offer.tensors["ids"])
        s = self.grid.unpack("s", offer.tensors["s"], (len(ids) + void,))
        if (s > 0).tolist() != [True] * len(ids) + [False] * void:
            raise WireError("s", "a drafted token of probability 0, or a void one of more")
        return Drafted(self.ids.one("last", offer.fields["last"]), ids, void)

    def judge(self, p: Tensor, offer: Message, accept: Tensor, correct: Tensor) -> Judged:
        ids, void = self.ids.read("ids", offer.tensors["ids"])
        g = len(ids) + void
        s = self.grid.unpack("s", offer.tensors["s"], (g,))
        rows = self.row.near(p[:g])
        n = accepted(chosen(unit(rows), ids), s[: len(ids)], accept[: len(ids)])
        if n < g:
            fields = {"at": 0, "accepted": n, "token": self.ids.void}
            return Judged(n, None, Message("verdict", fields, {"row": self.row.pack(rows[n])}))
        token = int(draw(p[n], correct[n]))
        fields = {"at": 0, "accepted": n, "token": token}
        none = self.row.pack(torch.empty(0, dtype=torch.float64))
        return Judged(n, token, Message("verdict", fields, {"row": none}))

    # what it costs on paper

    def values(self, message: Message) -> int:
        if message.kind == "offer":
            g = len(message.tensors["ids"])
            return (g * (self.grid.bits + self.ids.bits) + self.ids.bits + 7) // 8
        row = len(message.tensors["row"])
        return (POSITION_BITS + (row * self.row.bits or self.ids.bits) + 7) // 8
