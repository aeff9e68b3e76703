"""The device's half of one text, without time and messages: what it drafts, offers, and makes of
verdicts, and the draft's memory, which holds no more than what stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from isthmus.inference.chance import Role, chances
from isthmus.inference.engine import Engine, Pending, Proposal
from isthmus.inference.method import Costs, Draft, Kept, Method, Origin, Seen, Settled, Told
from isthmus.inference.work import drafting
from isthmus.models.decode import Law
from isthmus.wire.clock import Work
from isthmus.wire.message import Message

PLAIN, FREE = Law(), Costs()
Ended = Literal["", "stop", "length"]


class Drawn(NamedTuple):
    """A token that the text went on with, and who produced it."""

    id: int
    origin: Origin


class Drafting:
    """One text on the device: `ids` so far, the prompt first.

    It ends at a token of `stop` or when it has `total` tokens. `costs` are what a method adapts
    to; `session` is what its work is entered under. `eager`: drafts are computed when they are
    begun, and not when they are wanted, by which several devices of one process draft together.
    """

    def __init__(
        self,
        method: Method,
        engine: Engine | None,
        prompt: Sequence[int],
        *,
        law: Law,
        key: int,
        total: int,
        stop: Iterable[int] = (),
        costs: Costs = FREE,
        session: int = 0,
        eager: bool = False,
    ) -> None:
        self.method, self.engine, self.law, self.key = method, engine, law, key
        self.ids, self.total, self.stop = list(prompt), total, frozenset(stop)
        self.costs, self.session, self.eager = costs, session, eager
        self.seen = Seen()
        self.rounds = 0
        self.drafted: list[int] = []  # of the offer that waits for its verdict
        self.ended: Ended = ""
        self._kept = Kept(torch.empty(0, dtype=torch.int64), self._none().rows)
        self._held = 0  # tokens in memory: of the text first, then drafted ones
        self._slot: int | None = None
        self._pending: Pending[Proposal] | None = None
        self._chances: dict[Role, Tensor] = {}

    def round(self) -> list[Work]:
        """Begin to draft; what that takes, nothing where nothing is to be drafted."""
        count = self.begin()
        return self._works(count, "draft") if count else []

    def begin(self) -> int:
        """Begin to draft; how many tokens."""
        count = self.method.length(self.seen, self.costs) if self.method.drafts else 0
        count = max(min(count, self.total - len(self.ids) - 1), 0)
        if count:
            self._begin(count, _drafting_law(self.method, self.law), "draft")
        return count

    def offer(self) -> Message:
        """The offer of what was drafted since the last one."""
        return self.keep(*self.method.offer(*self.draft()))

    def draft(self) -> Draft:
        """What was drafted since the last offer."""
        at, proposal = len(self.ids), self._proposal()
        u = self.chance("void", at, len(proposal.ids))
        return Draft(at, self.ids[-1], *proposal, u)

    def keep(self, offer: Message, kept: Kept) -> Message:
        """Keep what an offer needs until its verdict; the offer."""
        self._kept, self.drafted = kept, kept.ids.tolist()
        return offer

    @property
    def standing(self) -> list[int]:
        """The drafted ids that can be accepted: without a void one."""
        return self.drafted[:-1] if self._kept.void else self.drafted

    def settle(self, verdict: Message) -> tuple[int, list[Drawn]]:
        """How many drafted tokens stand by a verdict, and what the text went on with: these and
        one more, up to the first that ends it. Raises `WireError` for what no edge sends."""
        return self.go_on(self._settled(verdict))

    def told(self, verdict: Message) -> Told:
        """What is to be settled by a verdict."""
        correct = self.chance("correct", len(self.ids), len(self.drafted) + 1)
        return Told(self._kept, verdict, correct)

    def go_on(self, settled: Settled) -> tuple[int, list[Drawn]]:
        """`settle` by what a verdict means."""
        at, n = len(self.ids), len(self.drafted)
        accepted, token, origin = settled
        if n:
            rounds, judged, stood = self.seen
            self.seen = Seen(rounds + 1, judged + min(accepted + 1, n), stood + accepted)
        self.rounds += 1
        self._crop(at + accepted)
        stand = [Drawn(id, "accepted") for id in self.drafted[:accepted]]
        return accepted, self._add([*stand, Drawn(token, origin)])

    def alone(self) -> list[Work]:
        """Begin to draw the next token by the draft alone, by the numbers of plain decoding."""
        self._begin(1, self.law, "correct")
        return self._works(1, "decode")

    def decoded(self) -> list[Drawn]:
        """The token drawn alone."""
        return self._add([Drawn(id, "device") for id in self._proposal().ids.tolist()])

    def give_up(self) -> None:
        """Forget what was drafted and not judged. The last token is fed again: what follows it
        is wanted."""
        self._proposal()
        self._crop(len(self.ids) - 1)

    def close(self) -> None:
        """Free the memory."""
        if self.engine is not None and self._slot is not None:
            self.engine.close(self._slot)
            self._slot = self._pending = None

    def chance(self, role: Role, at: int, count: int) -> Tensor:
        """The numbers of a role at so many positions (float64 `[count]`)."""
        if role not in self._chances:
            self._chances[role] = chances(self.key, role, 0, self.total + 1)
        return self._chances[role][at : at + count]

    # what the texts of a rehearsal do otherwise

    def _settled(self, verdict: Message) -> Settled:
        return self.method.settle(*self.told(verdict))

    def _begin(self, count: int, law: Callable[[Tensor], Tensor], role: Role) -> None:
        assert self.engine is not None  # sessions ask for a draft where one is needed
        if self._slot is None:
            self._slot = self.engine.open()
        u = self.chance(role, len(self.ids), count)
        fed = self.ids[self._held :]
        self._pending = self.engine.propose(self._slot, fed, count, law, u)
        if self.eager:
            self._pending.get()

    # the memory

    def _works(self, count: int, kind: str) -> list[Work]:
        """What it takes to draw so many tokens from here."""
        assert self.engine is not None  # sessions ask for a draft where one is needed
        fed = len(self.ids) - self._held
        return drafting(self.engine, kind, self._held, fed, count, self.session, self.rounds)

    def _proposal(self) -> Proposal:
        if self._pending is None:
            return self._none()
        proposal, self._pending = self._pending.get(), None
        self._held = len(self.ids) + len(proposal.ids) - 1
        return proposal

    def _crop(self, length: int) -> None:
        if self.engine is not None and self._slot is not None and self._held > length:
            self.engine.crop(self._slot, length)
            self._held = length

    def _none(self) -> Proposal:
        rows = torch.empty(0, self.method.vocab, dtype=torch.float64)
        return Proposal(torch.empty(0, dtype=torch.int64), rows)

    def _add(self, drawn: list[Drawn]) -> list[Drawn]:
        for i, (id, _) in enumerate(drawn, 1):
            self.ids.append(id)
            if id in self.stop or len(self.ids) == self.total:
                self.ended = "stop" if id in self.stop else "length"
                return drawn[:i]
        return drawn


@lru_cache(maxsize=64)
def _drafting_law(method: Method, law: Law) -> Callable[[Tensor], Tensor]:
    """One object for all texts of a method and a law, whose rows are then drawn together."""
    return method.drafting(law)
