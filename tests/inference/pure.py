"""The two halves of a method around Markov rows: no engine, no session, but real bytes.

The device half drafts from one table of rows, the edge half judges by another; every offer and
verdict is encoded in the compact layout and decoded again. Numbers come from a function of
(role, position), as in a session.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor

from isthmus.inference.chance import chances
from isthmus.inference.method import Drafted, Judged, Kept, Method, Origin, Settled
from isthmus.models.decode import Law
from isthmus.wire.message import Message, decode, encode

PLAIN = Law()
Chance = Callable[[str, int, int], Tensor]


def tables(vocab: int, seed: int, spread: float = 1.3) -> tuple[Tensor, Tensor]:
    """Logits `[V, V]` after each last token, of a draft and a target that agree in part."""
    rng = np.random.default_rng(seed)
    target = rng.normal(0.0, spread, (vocab, vocab))
    draft = 0.7 * target + rng.normal(0.0, 0.6 * spread, (vocab, vocab))
    return torch.tensor(draft), torch.tensor(target)


def shared(key: int) -> Chance:
    """The numbers of a session with this key."""
    return lambda role, at, count: chances(key, role, at, count)  # type: ignore[arg-type]


@dataclass
class Round:
    """What one round did, with the messages as they crossed."""

    at: int
    drafted: int
    settled: Settled
    ids: list[int]
    void: bool
    up: bytes
    down: bytes
    offer: Message
    verdict: Message


class Pair:
    """A draft and a target that know the last token only, at the two ends of a method.

    `drawn` and `claimed` replace the rows that the device samples from and those that it says it
    did; a right implementation has no such difference.
    """

    def __init__(
        self,
        method: Method,
        draft: Tensor,
        target: Tensor,
        law: Law = PLAIN,
        drawn: Tensor | None = None,
        claimed: Tensor | None = None,
    ) -> None:
        self.method = method
        self.q = method.drafting(law)(draft) if claimed is None else claimed
        self.p = law(target)
        self._heights = (self.q if drawn is None else drawn).cumsum(-1).tolist()
        self._heard: dict[bytes, tuple[Message, Drafted]] = {}

    def propose(self, last: int, u: Tensor) -> list[int]:
        """Tokens drawn one after another, by inversion at u."""
        ids = []
        for chance in u.tolist():
            heights = self._heights[last]
            last = bisect_right(heights, chance * heights[-1])
            ids.append(last)
        return ids

    def hear(self, up: bytes) -> tuple[Message, Drafted]:
        """An offer as the edge reads it; the same bytes are read once."""
        if up not in self._heard:
            heard = decode(up, self.method.up)
            self._heard[up] = heard, self.method.drafted(heard)
        return self._heard[up]

    def rows(self, context: list[int]) -> Tensor:
        """The target's rows after each token of a context."""
        return self.p[context]

    def round(self, text: list[int], gamma: int, chance: Chance) -> Round:
        """One round after `text`, which is not changed."""
        method, at = self.method, len(text)
        ids = self.propose(text[-1], chance("draft", at, gamma))
        q, drawn = self.q[[text[-1], *ids][:gamma]], torch.tensor(ids, dtype=torch.int64)
        offer, kept = method.offer(at, text[-1], drawn, q, chance("void", at, gamma))
        up = encode(offer, method.up, "compact", session=1, sequence=at)

        heard, drafted = self.hear(up)
        n = len(drafted.ids)
        assert heard.fields["at"] == at and drafted.last in (None, text[-1])
        accept, correct = chance("accept", at, n + 1), chance("correct", at, n + 1)
        judged = method.judge(self.rows([text[-1], *drafted.ids]), heard, accept, correct)
        verdict = replace(judged.verdict, fields={**judged.verdict.fields, "at": at})
        down = encode(verdict, method.down, "compact", session=1, sequence=at)

        back = decode(down, method.down)
        told = method.settle(kept, back, chance("correct", at, len(kept.ids) + 1))
        agree(kept, judged, told, n)
        return Round(
            at, len(kept.ids), told, ids[: told.accepted], kept.void, up, down, heard, back
        )

    def text(
        self, length: int, gamma: int, chance: Chance, start: int = 0
    ) -> tuple[list[int], list[Origin], list[Round]]:
        """`length` tokens or a few more after `start`, who made them, and the rounds."""
        text, origins, rounds = [start], [], []
        while len(text) <= length:
            done = self.round(text, gamma, chance)
            text += [*done.ids, done.settled.token]
            origins += [*["accepted"] * done.settled.accepted, done.settled.origin]
            rounds.append(done)
        return text[1:], origins, rounds

    def pairs(
        self, n: int, seed: int, gammas: tuple[int, ...] = (2, 1), alike: bool = False
    ) -> Counter[tuple[int, int]]:
        """The first two tokens of n texts, counted. Drafts are of 2 and of 1 tokens by turns, so
        that either token may be accepted or corrected, and the second a bonus. `alike`: one
        acceptance chance a round."""
        numbers = torch.Generator().manual_seed(seed)
        role = {"draft": 0, "void": 1, "accept": 2, "correct": 3}
        counts: Counter[tuple[int, int]] = Counter()
        for i, mine in enumerate(torch.rand(n, 4, 4, dtype=torch.float64, generator=numbers)):

            def chance(name: str, at: int, count: int, mine: Tensor = mine) -> Tensor:
                row = mine[role[name], at - 1 : at - 1 + count]
                return row[:1].expand(count) if alike and name == "accept" else row

            most = gammas[i % len(gammas)] if self.method.drafts else 0
            text = [0]
            while len(text) < 3:
                done = self.round(text, min(most, 3 - len(text)), chance)
                text += [*done.ids, done.settled.token]
            counts[text[1], text[2]] += 1
        return counts

    def law_of_one_step(self, last: int, *stand: int) -> Tensor:
        """The exact law `[V]` of the token after `last` and some accepted ones, in a round that
        drafts one more: the measure of the chances that lead to each token, found by halving."""
        q = self.q[[last, *stand]]
        q = q / q.sum(-1, keepdim=True)
        middles = q.cumsum(-1) - q / 2
        first = [float(middles[i, x]) for i, x in enumerate(stand)]

        def outcome(x: int, void: float = 0.0, accept: float = 0.0, correct: float = 0.0) -> Round:
            here = {"draft": float(middles[-1, x]), "void": void, "accept": accept}
            before = {"draft": first}

            def chance(role: str, at: int, count: int) -> Tensor:
                row = [*before.get(role, [0.0] * len(stand)), here.get(role, correct), correct]
                return torch.tensor(row[:count], dtype=torch.float64)

            done = self.round([last], 1 + len(stand), chance)
            assert done.ids[: len(stand)] == [*stand]
            return done

        law = torch.zeros(q.shape[-1], dtype=torch.float64)
        corrects: Callable[..., Round] | None = None
        for x in q[-1].nonzero()[:, 0].tolist():
            kept = measure(lambda u, x=x: not outcome(x, void=u).void)
            corrects = partial(outcome, x, void=ALMOST) if kept < 1 else corrects
            if kept:
                stands = measure(lambda u, x=x: len(outcome(x, accept=u).ids) > len(stand))
                corrects = partial(outcome, x, accept=ALMOST) if stands < 1 else corrects
                law[x] = q[-1, x] * kept * stands
        if corrects is None:
            return law
        corrected = corrects
        below = [
            measure(lambda u, y=y: corrected(correct=u).settled.token <= y) for y in range(len(law))
        ]
        below = torch.tensor([0.0, *below], dtype=torch.float64)
        return law + (1 - law.sum()) * below.diff()


ALMOST = 1 - 2.0**-53


def measure(holds: Callable[[float], bool], halvings: int = 46) -> float:
    """How much of [0, 1) a condition holds for that holds below some point."""
    if holds(ALMOST):
        return 1.0
    if not holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def agree(kept: Kept, judged: Judged, told: Settled, fed: int) -> None:
    """Both ends understand the round alike."""
    assert told.accepted == judged.accepted <= fed == len(kept.ids) - kept.void
    assert judged.token in (None, told.token)
    last = "bonus" if told.accepted == len(kept.ids) else "corrected"
    assert told.origin == (last if len(kept.ids) else "target")


def chi_square(counts: Counter[tuple[int, int]], law: Tensor) -> float:
    """The p-value of first two tokens after 0 under the Markov law `[V, V]`; cells with an
    expectation below 5 are pooled."""
    want = (law[0][:, None] * law).numpy() * counts.total()
    seen = np.zeros_like(want)
    for pair, count in counts.items():
        seen[pair] = count
    small = want < 5
    seen, want = (np.append(x[~small], x[small].sum()) for x in (seen, want))
    assert want[-1] >= 5
    return float(chi2.sf(((seen - want) ** 2 / want).sum(), len(want) - 1))
