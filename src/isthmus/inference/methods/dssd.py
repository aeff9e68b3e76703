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

from collections.abc import Sequence

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
from isthmus.inference.method import (
    Case,
    Costs,
    Draft,
    Drafted,
    Judged,
    Kept,
    Knobs,
    Method,
    Seen,
    Settled,
    Told,
)
from isthmus.inference.verify import Grid, chosen, joined, residual, runs, standing, unit
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
        self.none = self.row.pack(torch.empty(0, dtype=torch.float64))
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
        return Dssd.offers(self, [Draft(at, last, ids, q, u)])[0]

    def offers(self, drafts: Sequence[Draft]) -> list[tuple[Message, Kept]]:
        _, _, ids, q, u = zip(*drafts, strict=True)
        counts = [len(each) for each in ids]
        drawn, rows = joined(ids), joined(q)
        q_x = chosen(rows, drawn) / rows.sum(-1)
        s_x = self.grid.down(q_x)
        stand = standing(s_x, q_x, joined(u))
        ends = runs(stand, counts)
        if ends != counts:
            kept = torch.tensor(stand)
            drawn, s_x = drawn.where(kept, self.ids.void), s_x.where(kept, 0.0)
        words, scalars = drawn.to(self.ids.dtype).split(counts), s_x.split(counts)
        found: list[tuple[Message, Kept]] = []
        for draft, n, word, scalar in zip(drafts, ends, words, scalars, strict=True):
            cut = slice(n + 1)
            kept = Kept(draft.ids[cut], draft.q[cut], void=n < len(draft.ids))  # q: see `settles`
            tensors = {"ids": word[cut], "s": self.grid.pack(scalar[cut])}
            found.append((Message("offer", {"at": draft.at, "last": draft.last}, tensors), kept))
        return found

    def settle(self, kept: Kept, verdict: Message, correct: Tensor) -> Settled:
        return Dssd.settles(self, [Told(kept, verdict, correct)])[0]

    def settles(self, told: Sequence[Told]) -> list[Settled]:
        counts = [stands(each.kept, each.verdict.fields["accepted"]) for each in told]
        tokens = [self._token(n, *each) for n, each in zip(counts, told, strict=True)]
        all = list(zip(told, counts, tokens, strict=True))
        rejected = [
            (each.verdict.tensors["row"], each.kept.s[n], each.correct[n])
            for each, n, token in all
            if token is None
        ]
        drawn = iter(self._corrections(rejected))
        return [
            settled(each.kept, n, next(drawn) if token is None else token) for each, n, token in all
        ]

    def _corrections(self, rejected: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[int]:
        """The token drawn after each rejection, from its rows p and q `[V]` at its number."""
        if not rejected:
            return []
        p, q, u = map(torch.stack, zip(*rejected, strict=True))
        return draw(residual(unit(p), self.grid.down(unit(q))), u).tolist()

    def _token(self, n: int, kept: Kept, verdict: Message, correct: Tensor) -> int | None:
        """The token that a verdict says; None where it says the row, checked, to draw it from."""
        token, row = verdict.fields["token"], verdict.tensors["row"]
        if token != self.ids.void:
            if n < len(kept.ids) or len(row):
                raise WireError("token", "a token where a row decides")
            return self.ids.one("token", token)
        if n == len(kept.ids):
            raise WireError("row", "a row where no token was rejected")
        if not self.row.unpack("row", row, (self.vocab,)).amax().item() > 0:
            raise WireError("row", "a row without mass")
        return None

    # edge

    def drafted(self, offer: Message) -> Drafted:
        ids, void = self.ids.read("ids", offer.tensors["ids"])
        s = self.grid.unpack("s", offer.tensors["s"], (len(ids) + void,))
        if [each > 0 for each in s.tolist()] != [True] * len(ids) + [False] * void:
            raise WireError("s", "a drafted token of probability 0, or a void one of more")
        return Drafted(self.ids.one("last", offer.fields["last"]), ids, void)

    def judge(self, p: Tensor, offer: Message, accept: Tensor, correct: Tensor) -> Judged:
        return Dssd.judges(self, [Case(p, offer, accept, correct)])[0]

    def judges(self, cases: Sequence[Case]) -> list[Judged]:
        counts = [len(case.offer.tensors["ids"]) for case in cases]
        sized = list(zip(cases, counts, strict=True))
        rows = self.row.near(joined([case.p[:g] for case, g in sized]))
        ids = joined([case.offer.tensors["ids"] for case in cases]).long()
        # A void token's s is 0: it never stands, whatever its row says of another word.
        p_x = chosen(rows, ids.clamp_max(self.vocab - 1)) / rows.sum(-1)
        s = joined([self.grid.unpack("s", case.offer.tensors["s"], (g,)) for case, g in sized])
        accept = joined([case.accept[:g] for case, g in sized])
        accepted = runs(standing(p_x, s, accept), counts)
        ended = list(zip(rows.split(counts), cases, accepted, counts, strict=True))
        rejected = [own[n] for own, _, n, g in ended if n < g]
        told = iter(self.row.pack(torch.stack(rejected)) if rejected else ())
        through = [(case.p[n], case.correct[n]) for _, case, n, g in ended if n == g]
        tokens = iter(_drawn(through))
        found: list[Judged] = []
        for n, g in zip(accepted, counts, strict=True):
            token, row = (next(tokens), self.none) if n == g else (None, next(told))
            said = self.ids.void if token is None else token
            fields = {"at": 0, "accepted": n, "token": said}
            found.append(Judged(n, token, Message("verdict", fields, {"row": row})))
        return found

    # what it costs on paper

    def values(self, message: Message) -> int:
        if message.kind == "offer":
            g = len(message.tensors["ids"])
            return (g * (self.grid.bits + self.ids.bits) + self.ids.bits + 7) // 8
        row = len(message.tensors["row"])
        return (POSITION_BITS + (row * self.row.bits or self.ids.bits) + 7) // 8


def _drawn(through: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """The token of each row p `[V]` at its number."""
    if not through:
        return []
    return draw(*map(torch.stack, zip(*through, strict=True))).tolist()
