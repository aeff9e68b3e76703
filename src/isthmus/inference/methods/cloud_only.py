"""Cloud only: the target decodes alone at the edge, and its tokens stream down.

The baseline without a draft. The device asks once, and the edge sends one verdict a token, drawn
from p by the same numbers as plain decoding: the text is that of
`isthmus.models.decode.generate` with the target under the same key.

On paper a token costs its id down, and nothing goes up. Schemas 38 (offer) and 39 (verdict).
"""

from __future__ import annotations

import torch
from pydantic import Field as Knob
from torch import Tensor

from isthmus import catalogue
from isthmus.inference.draft import Ids, settled
from isthmus.inference.method import Drafted, Judged, Kept, Knobs, Method, Settled
from isthmus.models.decode import draw
from isthmus.wire.message import Field, Message, Schema


class Settings(Knobs):
    """gamma: 0, as nothing is drafted."""

    gamma: int = Knob(0, ge=0, le=0)


@catalogue.register("cloud-only", place="serving", status="verified")
class CloudOnly(Method):
    """An offer says where to go on; verdicts follow until the text ends."""

    Settings = Settings
    drafts = False
    streams = True

    def __init__(self, vocab: int, knobs: Knobs | None = None) -> None:
        super().__init__(vocab, knobs)
        self.ids = Ids(vocab)
        self.up = Schema("offer", 38, {"at": Field("u32")}, max_bytes=64)
        verdict = {"at": Field("u32"), "token": self.ids.field()}
        self.down = Schema("verdict", 39, verdict, max_bytes=64)

    def offer(self, at: int, last: int, ids: Tensor, q: Tensor, u: Tensor) -> tuple[Message, Kept]:
        none = torch.empty(0, self.vocab, dtype=torch.float64)
        return Message("offer", {"at": at}, {}), Kept(torch.empty(0, dtype=torch.int64), none)

    def drafted(self, offer: Message) -> Drafted:
        return Drafted(None, [], False)

    def judge(self, p: Tensor, offer: Message, accept: Tensor, correct: Tensor) -> Judged:
        token = int(draw(p[0], correct[0]))
        return Judged(0, token, Message("verdict", {"at": 0, "token": token}, {}))

    def settle(self, kept: Kept, verdict: Message, correct: Tensor) -> Settled:
        return settled(kept, 0, self.ids.one("token", verdict.fields["token"]))

    def values(self, message: Message) -> int:
        return (self.ids.bits + 7) // 8 if message.kind == "verdict" else 0
