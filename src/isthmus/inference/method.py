"""The contract of a serving method: how a round of drafting and judging crosses the link.

A round continues a text of `at` tokens. The device proposes tokens x_1..x_g, drawn one after
another from rows q_1..q_g, and offers them; the edge computes the target's rows p_1..p_{g+1},
judges and answers; the device settles what the text goes on with. Everything is a placement of
one mathematics (`isthmus.inference.verify`): where the rows go, who draws the correction, what
is rounded. Sessions, edges, links, memories and faults are the business of other files.

    device: length -> drafting -> [engine] -> offer  ~~up~~>  edge: drafted -> [engine] -> judge
    device: settle                                  <~~down~~
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from isthmus import catalogue
from isthmus.errors import InputError, unknown
from isthmus.models.decode import Law
from isthmus.wire.message import Message, Schema

Origin = Literal["accepted", "corrected", "bonus", "target", "device"]
"""Who produced a token: drafted and accepted; drawn at a rejection; drawn after full acceptance;
the target alone; the device alone."""


class Knobs(BaseModel):
    """Settings of a serving method. `gamma`: tokens drafted in a round (0 to 64)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gamma: int = Field(default=4, ge=0, le=64)


class Costs(NamedTuple):
    """What a session declares: seconds to draft one token, for one judging forward, to move one
    byte up and down, and of a round without bytes (both latencies, framing)."""

    draft: float = 0.0
    verify: float = 1.0
    up: float = 0.0
    down: float = 0.0
    round: float = 0.0


class Seen(NamedTuple):
    """What a session has observed in its speculative rounds: tokens judged and accepted."""

    rounds: int = 0
    judged: int = 0
    accepted: int = 0


class Kept(NamedTuple):
    """What the device keeps of an offer until its verdict: the ids that were drawn (int64 `[g]`,
    a void one last if any), the sub-measures s (float64 `[g, V]`) that the edge judges by or the
    rows that a method takes them from when one is needed, and whether the last id is `void`."""

    ids: Tensor
    s: Tensor
    void: bool = False


class Draft(NamedTuple):
    """What an offer is made of: ids (int64 `[g]`) drawn from rows q (float64 `[g, V]`) after a text
    of `at` tokens that ends with `last`, and the chances `u` `[g]` that decide what is void."""

    at: int
    last: int
    ids: Tensor
    q: Tensor
    u: Tensor


class Drafted(NamedTuple):
    """An offer as the edge reads it: the text's last token where the method says it, the drafted
    ids that can be fed (a void mark is none), and whether a void mark follows them."""

    last: int | None
    ids: list[int]
    void: bool


class Case(NamedTuple):
    """What is to be judged: the target's rows p (float64 `[n + 1, V]` for n ids that were fed), the
    offer, and the chances `accept` and `correct` (float64 `[n + 1]`) at its positions."""

    p: Tensor
    offer: Message
    accept: Tensor
    correct: Tensor


class Judged(NamedTuple):
    """The edge's answer: how many drafted tokens stand, the token that follows where the edge
    knows it, and the verdict to send (its field `at` is filled in by the edge)."""

    accepted: int
    token: int | None
    verdict: Message


class Told(NamedTuple):
    """What is to be settled: what was kept of an offer, the verdict on it, and the chances
    `correct` at its positions."""

    kept: Kept
    verdict: Message
    correct: Tensor


class Settled(NamedTuple):
    """What the text goes on with: how many drafted tokens stand, and one token after them."""

    accepted: int
    token: int
    origin: Origin


class Method:
    """The hooks of a serving method, for a vocabulary of `vocab` tokens.

    `drafts`: the device has a model of its own; `edge`: there is another party; `streams`: the
    edge goes on by itself, one verdict a token, until the text ends. `lossless`: the text
    follows the target's law exactly. `up` and `down` are the compact schemas of offer and
    verdict; both declare a field `at` (u32).

    What many texts want at once is asked of `offers`, `judges` and `settles`, which a method may
    override to compute it in one piece. Where a class has its own `offer`, `judge` or `settle` and
    not these, they ask for one after the other.
    """

    Settings: ClassVar[type[Knobs]] = Knobs
    drafts: ClassVar[bool] = True
    edge: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    lossless: ClassVar[bool] = True
    catalogue_name: ClassVar[str]

    knobs: Any
    up: Schema
    down: Schema

    def __init_subclass__(cls) -> None:
        for one, many in (("offer", "offers"), ("judge", "judges"), ("settle", "settles")):
            if one in vars(cls) and many not in vars(cls):
                setattr(cls, many, getattr(Method, many))  # not one that passes its own by

    def __init__(self, vocab: int, knobs: Knobs | None = None) -> None:
        self.vocab = vocab
        self.knobs = self.Settings() if knobs is None else knobs

    def length(self, seen: Seen, costs: Costs) -> int:
        """How many tokens to draft next; 0 asks for the target's own token."""
        return self.knobs.gamma

    def drafting(self, law: Law) -> Callable[[Tensor], Tensor]:
        """The law that the device really samples from: logits `[..., V]` to probabilities."""
        return law

    def offer(self, at: int, last: int, ids: Tensor, q: Tensor, u: Tensor) -> tuple[Message, Kept]:
        """The offer of a `Draft`, and what to keep."""
        raise NotImplementedError

    def offers(self, drafts: Sequence[Draft]) -> list[tuple[Message, Kept]]:
        """The offer of each draft."""
        return [self.offer(*draft) for draft in drafts]

    def drafted(self, offer: Message) -> Drafted:
        """What the edge reads in an offer. Raises `WireError` for contents no device sends."""
        raise NotImplementedError

    def judge(self, p: Tensor, offer: Message, accept: Tensor, correct: Tensor) -> Judged:
        """The answer to a `Case`, whose offer `drafted` has read."""
        raise NotImplementedError

    def judges(self, cases: Sequence[Case]) -> list[Judged]:
        """The answer to each case."""
        return [self.judge(*case) for case in cases]

    def settle(self, kept: Kept, verdict: Message, correct: Tensor) -> Settled:
        """What a verdict means, of a `Told`. Raises `WireError` for contents no edge sends."""
        raise NotImplementedError

    def settles(self, told: Sequence[Told]) -> list[Settled]:
        """What each verdict means."""
        return [self.settle(*each) for each in told]

    def values(self, message: Message) -> int:
        """The paper-style count of an offer or a verdict, in bytes: probabilities and ids of
        ceil(log2 V) bits, rounded up once; no framing, no field `at`."""
        raise NotImplementedError


def names() -> list[str]:
    """The methods that can be asked for by name."""
    return catalogue.names("serving")


def method_of(
    method: Method | type[Method] | str, vocab: int, settings: Mapping[str, Any] | None = None
) -> Method:
    """A method by name, class or as it is, for a vocabulary of `vocab` tokens.

    Raises `InputError` for an unknown name and, naming the field, for settings it does not have.
    """
    if isinstance(method, Method):
        if settings:
            raise InputError("settings", dict(settings), "none beside a method that has its own")
        if method.vocab != vocab:
            raise InputError("method", f"a vocabulary of {method.vocab}", f"one of {vocab} tokens")
        return method
    if isinstance(method, str) and catalogue.key(method) not in map(catalogue.key, names()):
        raise unknown("method", method, names())
    kind = catalogue.find("serving", method) if isinstance(method, str) else method
    given = dict(settings or {})
    try:
        knobs = kind.Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise unknown("settings", name, kind.Settings.model_fields) from None
        raise InputError(f"settings.{name}", first["input"], first["msg"]) from None
    return kind(vocab, knobs)
