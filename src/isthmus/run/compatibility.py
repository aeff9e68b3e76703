"""Which pieces of an upload's path may stand in one run: rules as data, each with its reason.

An upload goes: finish -> clip -> local noise -> codec -> mask -> link -> decode -> guard ->
clip again (central noise) -> selectors -> reducer -> central noise -> server. `Pieces` says what
a configuration puts into these places; `check` names every pair that cannot stand together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from isthmus.errors import InputError

Codec = Literal["real", "integer-shared-scale", "sparse", "discrete", "binomial"]
"""`real`: floating numbers. `integer-shared-scale`: whole numbers on one scale for all clients.
`sparse`: each client its own support. `discrete`: codes on a scale of the client's own (signs,
integers with their scale). `binomial`: binomial noise and integer codes at once."""

Server = Literal["selector", "mean", "coordinate", "adapter-factor", "adapter-product", "stack"]
"""`coordinate`: median and the like. `adapter-factor`: a weighted mean of each adapter factor.
`adapter-product`: rules on products of factors. `stack`: keeps every upload."""

Field = Literal["delta", "values", "buffers", "scalars", "examples"]
FIELDS: tuple[Field, ...] = ("delta", "values", "buffers", "scalars", "examples")
"""What can go up; `examples` is the number of examples, which goes up when weights follow it."""


@dataclass(frozen=True)
class Pieces:
    """What one configuration puts on the path of an upload.

    codec: kinds of the codec's parts. server: selectors and reducers, in their order.
    weights: what a client's weight follows (`examples`), or `uniform`, or `fixed` at 1/(qN).
    sends, covered, public: fields that go up, that the privacy mechanism noises, and that are
    declared public. running_statistics: batch statistics are among the buffers that go up.
    individual: the method's server half reads single uploads. backbone: it changes the frozen
    weights that all clients share. server_half: its server does more than add a mean. gathers: the
    data themselves go up, once, and no upload after. cache: the schedule keeps a model per client.
    vectorise: the method can be.
    """

    codec: tuple[Codec, ...] = ("real",)
    clip: bool = False
    local_noise: bool = False
    central_noise: bool = False
    mask: bool = False
    server: tuple[Server, ...] = ("mean",)
    attack: bool = False
    schedule: Literal["sync", "async", "gossip"] = "sync"
    executor: Literal["auto", "vectorised", "sequential", "ray", "flower"] = "auto"
    weights: Literal["examples", "uniform", "fixed"] = "examples"
    sends: frozenset[Field] = frozenset({"delta"})
    covered: frozenset[Field] = frozenset()
    public: frozenset[Field] = frozenset()
    running_statistics: bool = False
    individual: bool = False
    backbone: bool = False
    server_half: bool = False
    gathers: bool = False
    cache: bool = False
    vectorise: bool = True

    def words(self) -> frozenset[str]:
        """The pieces as the words that the rules speak of; `upload` is always among them."""
        return frozenset(self._words())

    def _words(self) -> Iterator[str]:
        yield "upload"
        yield from (f"{kind} codec" for kind in self.codec)
        yield "clip" if self.clip else "no clip"
        for word, there in (
            ("local noise", self.local_noise),
            ("central noise", self.central_noise),
            ("mask", self.mask),
            ("attack", self.attack),
            ("selector", "selector" in self.server),
            ("method with individual uploads", self.individual),
            ("method that changes the backbone", self.backbone),
            ("method with a server of its own", self.server_half),
            ("method that is not vectorised", not self.vectorise),
            ("method that gathers the data", self.gathers),
            ("schedule with a cache", self.cache),
            ("several codecs", len(self.codec) > 1),
        ):
            if there:
                yield word
        reducers = [i for i, piece in enumerate(self.server) if piece != "selector"]
        yield from (f"{self.server[i]} reducer" for i in reducers)
        if not reducers:
            yield "no reducer"
        if len(reducers) > 1:
            yield "several reducers"
        if reducers and "selector" in self.server[reducers[0] :]:
            yield "selector after the reducer"
        yield f"{self.schedule} schedule"
        yield f"{self.executor} executor"
        yield f"{self.weights} weights"
        counted: frozenset[Field] = frozenset({"examples"} if self.weights == "examples" else ())
        clear = (self.sends | counted) - self.covered - self.public
        yield from (f"{name} in the clear" for name in clear)
        if self.running_statistics and "buffers" in self.sends - self.public:
            yield "running statistics"


class Rule(NamedTuple):
    """Whether `first` and `second` may stand in one run, and why."""

    first: str
    second: str
    allowed: bool
    reason: str

    @property
    def line(self) -> str:
        """The rule as one line, the way a refusal shows it."""
        return f"{self.first} with {self.second}: {self.reason}"


_SUM = "only the sum of masked uploads can be read"
_SHARED = "masks cancel only among integers on one scale that all clients share"
_FIXED = (
    "central noise is calibrated to fixed weights 1/(qN), with which one client moves at most S"
)
_LINEAR = "only of a mean is the sensitivity known: a client's bound times its weight"
_AT_ONCE = "the binomial mechanism fills the noise place and the codec place at once"

RULES: tuple[Rule, ...] = (
    # One reducer, selectors before it.
    Rule("upload", "no reducer", False, "a run has exactly one reducer"),
    Rule("upload", "several reducers", False, "a run has exactly one reducer"),
    Rule("upload", "selector after the reducer", False, "selectors go before any reducer"),
    Rule("selector", "mean reducer", True, "the reducer gets the accepted uploads"),
    Rule("selector", "coordinate reducer", True, "the reducer gets the accepted uploads"),
    Rule("selector", "adapter-factor reducer", True, "the reducer gets the accepted uploads"),
    Rule("selector", "adapter-product reducer", True, "the reducer gets the accepted uploads"),
    Rule("selector", "stack reducer", True, "the reducer gets the accepted uploads"),
    # Masks: what can be learned from a sum of integers.
    Rule("mask", "integer-shared-scale codec", True, "integers on one scale can be masked"),
    Rule("mask", "binomial codec", True, "its codes are integers on one shared scale"),
    Rule("mask", "real codec", False, _SHARED),
    Rule("mask", "discrete codec", False, _SHARED),
    Rule("mask", "sparse codec", False, "masks cancel only on a support that all clients share"),
    Rule("mask", "mean reducer", True, "a mean is a sum of w u over a sum of w"),
    Rule("mask", "adapter-factor reducer", True, "a mean of each factor is a sum"),
    Rule("mask", "coordinate reducer", False, f"it orders single uploads, and {_SUM}"),
    Rule("mask", "adapter-product reducer", False, f"a product needs both factors, and {_SUM}"),
    Rule("mask", "stack reducer", False, f"it keeps single uploads, and {_SUM}"),
    Rule("mask", "selector", False, f"it compares single uploads, and {_SUM}"),
    Rule("mask", "method with individual uploads", False, _SUM),
    Rule("mask", "examples weights", True, "the client sends (w u, w)"),
    Rule("mask", "clip", True, "the client clips before its upload is masked"),
    Rule("mask", "local noise", True, "the noise is added before the mask"),
    Rule("mask", "central noise", False, "the server cannot clip again what it cannot read"),
    Rule("mask", "async schedule", False, "masks cancel only over a cohort that starts together"),
    Rule(
        "mask", "gossip schedule", False, "each receiver weighs by its own row; masks cancel once"
    ),
    # Noise: sensitivity, coverage, weights.
    Rule("local noise", "clip", True, "the clip is the sensitivity"),
    Rule("local noise", "no clip", False, "noise is calibrated to a clip bound"),
    Rule("central noise", "clip", True, "the clip is the sensitivity"),
    Rule("central noise", "no clip", False, "noise is calibrated to a clip bound"),
    Rule("binomial codec", "clip", True, "the clip is the range of the codes"),
    Rule("binomial codec", "no clip", False, "noise is calibrated to a clip bound"),
    Rule("binomial codec", "local noise", False, _AT_ONCE),
    Rule("binomial codec", "several codecs", False, _AT_ONCE),
    *(
        Rule(noise, f"{name} in the clear", False, f"{name} without noise must be declared public")
        for noise in ("local noise", "central noise", "binomial codec")
        for name in FIELDS
    ),
    *(
        Rule(noise, "running statistics", False, "noise can make a running variance negative")
        for noise in ("local noise", "central noise", "binomial codec")
    ),
    Rule("local noise", "sparse codec", True, "coding what is noised already spends nothing"),
    Rule("local noise", "discrete codec", True, "coding what is noised already spends nothing"),
    Rule("local noise", "selector", True, "a rule on noised uploads spends nothing"),
    Rule("local noise", "coordinate reducer", True, "a rule on noised uploads spends nothing"),
    Rule("local noise", "adapter-product reducer", True, "a rule on noised uploads spends nothing"),
    Rule("local noise", "async schedule", True, "each client is protected by itself"),
    Rule("local noise", "gossip schedule", True, "each client is protected by itself"),
    Rule("central noise", "fixed weights", True, "one client moves the sum by at most S/(qN)"),
    Rule("central noise", "examples weights", False, _FIXED),
    Rule("central noise", "uniform weights", False, f"{_FIXED}; uniform ones follow the cohort"),
    Rule("central noise", "selector", False, f"{_FIXED}; a selector's follow the uploads"),
    Rule("central noise", "mean reducer", True, "one client moves the sum by at most S/(qN)"),
    Rule("central noise", "adapter-factor reducer", True, "a mean of each factor is a sum"),
    Rule("central noise", "coordinate reducer", False, _LINEAR),
    Rule("central noise", "adapter-product reducer", False, _LINEAR),
    Rule("central noise", "stack reducer", False, _LINEAR),
    Rule(
        "central noise", "method with individual uploads", False, "only the noised sum is private"
    ),
    Rule("central noise", "async schedule", False, f"{_FIXED}; staleness changes them"),
    Rule("central noise", "gossip schedule", False, "there is no server that all trust"),
    Rule("central noise", "sparse codec", True, "the server clips again after decoding"),
    Rule("central noise", "discrete codec", True, "the server clips again after decoding"),
    # Attacks skip clip and noise, and nothing else.
    Rule("attack", "clip", True, "it skips the clip of its clients"),
    Rule("attack", "local noise", True, "it skips the noise of its clients"),
    Rule("attack", "central noise", True, "the server clips again and noises the sum"),
    Rule("attack", "mask", True, "what it sends is coded and masked like any upload"),
    Rule("attack", "sparse codec", True, "what it sends is coded like any upload"),
    Rule("attack", "selector", True, "a defence meets the attack here"),
    Rule("attack", "coordinate reducer", True, "a defence meets the attack here"),
    # Schedules.
    Rule(
        "async schedule",
        "method that changes the backbone",
        False,
        "visits under way would stand on another backbone than they were sent",
    ),
    Rule(
        "schedule with a cache",
        "method with a server of its own",
        False,
        "what is kept of a client is its model alone",
    ),
    Rule("gossip schedule", "method with a server of its own", False, "there is no server"),
    Rule("gossip schedule", "stack reducer", False, "there is no server to keep uploads"),
    Rule("gossip schedule", "coordinate reducer", True, "each receiver runs it on what it got"),
    Rule(
        "async schedule",
        "stack reducer",
        False,
        "what is kept is measured from the model that a client would be sent now",
    ),
    # All data in one place: nothing is private, and there are no uploads.
    *(
        Rule(
            "method that gathers the data", piece, False, "the data themselves cross, in the clear"
        )
        for piece in ("local noise", "central noise", "binomial codec", "mask")
    ),
    *(
        Rule("method that gathers the data", piece, False, "there are no uploads of clients")
        for piece in (
            *("attack", "selector", "coordinate reducer"),
            *("async schedule", "gossip schedule", "flower executor"),
        )
    ),
    # How visits are executed.
    Rule("vectorised executor", "method that is not vectorised", False, "the method says why"),
    Rule("auto executor", "method that is not vectorised", True, "visits run one after another"),
    Rule("sequential executor", "method that is not vectorised", True, "this is the reference"),
)


def broken(pieces: Pieces) -> list[Rule]:
    """The rules that refuse a pair among the pieces, in their order."""
    words = pieces.words()
    return [r for r in RULES if not r.allowed and r.first in words and r.second in words]


def check(pieces: Pieces) -> list[str]:
    """Why the pieces cannot stand in one run, one line per forbidden pair; empty when they can.

    >>> check(Pieces(local_noise=True, covered=frozenset({"delta"}), weights="uniform"))
    ['local noise with no clip: noise is calibrated to a clip bound']
    """
    return [rule.line for rule in broken(pieces)]


def refuse(pieces: Pieces) -> None:
    """Raise `InputError` with the first reason, if there is one."""
    for rule in broken(pieces):
        raise InputError(rule.first, f"with {rule.second}", f"one of the two ({rule.reason})")
