"""Texts decoded ahead of their clock, all in step, so that one process drafts and judges them in
full batches.

On the clock devices drift apart, and what one of them asks of a model is rarely asked by others
at that very time. But what a text says does not depend on times: only on models, seed and
settings. So its rounds are rehearsed, the next of every text in one batch, a few ahead at most.
The parties then play them on the clock with real messages, and what arrives is compared with what
was rehearsed, so that it is still the decoded message that counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from isthmus.inference.chance import Role
from isthmus.inference.drafting import Drafting
from isthmus.inference.engine import Engine, Pending
from isthmus.inference.judging import Judging, Text, Who, placed, probabilities
from isthmus.inference.messages import same
from isthmus.inference.method import Case, Judged, Kept, Method, Settled, Told
from isthmus.wire.clock import Work
from isthmus.wire.message import Message

AHEAD = 4
"""Rounds of one text that may be rehearsed and not yet played."""


class Scene(NamedTuple):
    """One round: the offer with the drafted ids, the edge's answer, what the device made of it."""

    offer: Message
    drafted: list[int]
    judged: Judged
    settled: Settled


class Rehearsal(Judging):
    """The rounds of several texts of one method; as the edge's `Judging`, it answers with what was
    rehearsed."""

    def __init__(self, target: Engine, method: Method) -> None:
        super().__init__(target)
        self.method = method
        self.parts: dict[Who, Part] = {}

    def scene(self, who: Who) -> Scene:
        """The round that a text is to play now."""
        part = self.parts[who]
        while not part.scenes:
            self._rehearse()
        return part.scenes[0]

    def _rehearse(self) -> None:
        """One more round of every text that is not far ahead."""
        parts = [part for part in self.parts.values() if part.goes_on]
        for part in parts:
            part.text.begin()
        method = self.method
        offers = method.offers([part.text.draft() for part in parts])
        asked = [part.ask(*offer) for part, offer in zip(parts, offers, strict=True)]
        laws = [part.text.law for part in parts]
        rows = probabilities(laws, [pending.get() for pending in asked])
        judged = method.judges([part.case(p) for part, p in zip(parts, rows, strict=True)])
        told = [part.told(each) for part, each in zip(parts, judged, strict=True)]
        for part, settled in zip(parts, method.settles(told), strict=True):
            part.go_on(settled)

    # the edge's side

    def open(self, text: Text) -> None:
        """A text has no memory here but that of its rehearsal."""

    def close(self, text: Text) -> None:
        """See `open`."""

    def read(self, batch: Sequence[tuple[Text, list[int]]]) -> None:
        """Prompts are read when they are rehearsed."""

    def judge(self, texts: Sequence[Text]) -> list[Judged]:
        """What was rehearsed for these offers."""
        return [self._judged_before(text) for text in texts]

    def _judged_before(self, text: Text) -> Judged:
        scene = self.scene(text.who)
        assert text.offer is not None  # only what waits is judged
        _compare(text.offer, scene.offer)
        return scene.judged


class Part:
    """The rehearsal of one text: both halves, and the rounds that are to be played."""

    def __init__(self, text: Drafting, target: Engine) -> None:
        self.text, self.target, self.slot = text, target, target.open()
        self.scenes = deque[Scene]()
        self._held = 0  # tokens of the text in the target's memory
        self._offer = Message("", {}, {})  # and what it was judged by, until it is settled
        self._judged = Judged(0, None, self._offer)

    @property
    def goes_on(self) -> bool:
        """Whether to rehearse another round now."""
        return not self.text.ended and len(self.scenes) < AHEAD

    def ask(self, offer: Message, kept: Kept) -> Pending[Tensor]:
        """Take up an offer; the target's rows that judge it."""
        self._offer = self.text.keep(offer, kept)
        drafted = self.text.standing
        fed = self.text.ids[self._held :] + drafted
        return self.target.rows(self.slot, fed, len(drafted) + 1)

    def case(self, p: Tensor) -> Case:
        """The offer, to be judged by rows p."""
        at = len(self.text.ids)
        accept, correct = (self.text.chance(role, at, len(p)) for role in ("accept", "correct"))
        return Case(p, self._offer, accept, correct)

    def told(self, judged: Judged) -> Told:
        """Take up the answer, to be settled."""
        at = len(self.text.ids)
        self._judged = placed(judged, at)
        self._held = at + judged.accepted
        self.target.crop(self.slot, self._held)
        return self.text.told(self._judged.verdict)

    def go_on(self, settled: Settled) -> None:
        """Go on from what the answer means: the round has been rehearsed."""
        self.scenes.append(Scene(self._offer, self.text.drafted, self._judged, settled))
        self.text.go_on(settled)

    def close(self) -> None:
        """Free both memories."""
        self.text.close()
        self.target.close(self.slot)


class Played(Drafting):
    """The device's half of a text that is rehearsed; alone, it drafts as any other."""

    def __init__(
        self, method: Method, *args: Any, rehearsal: Rehearsal, who: Who, **options: Any
    ) -> None:
        super().__init__(method, *args, **options)
        self._rehearsal, self._who = rehearsal, who
        self._count = 0
        self._really_held = 0

    def round(self) -> list[Work]:
        """Begin to draft: what that takes."""
        if self._who not in self._rehearsal.parts:
            text = Drafting(
                self.method, self.engine, self.ids, law=self.law, key=self.key, total=self.total,
                stop=self.stop, costs=self.costs,
            )  # fmt: skip
            self._rehearsal.parts[self._who] = Part(text, self._rehearsal.target)
        self._count = 0
        return super().round()

    def offer(self) -> Message:
        """The offer that was rehearsed."""
        scene = self._rehearsal.scene(self._who)
        self.drafted = scene.drafted
        if self._count:
            self._held = len(self.ids) + self._count - 1
        return scene.offer

    def close(self) -> None:
        """Free the memory, of the rehearsal as well."""
        super().close()
        part = self._rehearsal.parts.pop(self._who, None)
        if part is not None:
            part.close()

    def _settled(self, verdict: Message) -> Settled:
        scene = self._rehearsal.parts[self._who].scenes.popleft()
        _compare(verdict, scene.judged.verdict)
        return scene.settled

    def _begin(self, count: int, law: Callable[[Tensor], Tensor], role: Role) -> None:
        self._count = count
        if role != "draft":
            held, self._held = self._held, self._really_held
            super()._begin(count, law, role)
            self._held, self._really_held = held, len(self.ids)

    def _crop(self, length: int) -> None:
        self._held = min(self._held, length)


def _compare(played: Message, rehearsed: Message) -> None:
    if not same(played, rehearsed):
        raise RuntimeError(f"{played.kind} at {played.fields['at']} is not what was rehearsed")
