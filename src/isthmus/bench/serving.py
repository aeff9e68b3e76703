"""Split inference measured on the virtual clock: one device alone with an edge, text after text.

What a link costs a session that waits for each answer can be told without running it again. With
B bytes up and m messages up until the last token (each answered, or followed by a stream),

    T(rate, latency) = T(rate0, latency0) + 8 B (1 / rate - 1 / rate0) + 2 m (latency - latency0)

as long as the method does not adapt to the link. So tables over rates, and the uplink rate at
which two methods break even, are in closed form from one run of each; the downlink stays.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from isthmus.inference.engine import Engine
from isthmus.inference.together import Reply, decode
from isthmus.inference.work import judging_seconds
from isthmus.models import language
from isthmus.models.decode import Law
from isthmus.models.embedded import corpus
from isthmus.models.language import Language
from isthmus.wire.device import Device
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link
from isthmus.wire.tally import direction

PARTS = ("draft", "verify", "up", "down", "waiting")
"""What a session's time is spent on. Where two happen at once the first named counts."""


class Place(NamedTuple):
    """Who computes: the device that drafts and the edge that judges."""

    device: Device
    edge: Device


@cache
def pair() -> tuple[Language, Language]:
    """The embedded target and its draft."""
    return language.load("embedded:target"), language.load("embedded:draft")


@cache
def prompts(count: int, length: int = 32) -> list[Tensor]:
    """The first `length` tokens of `count` held-out documents, spread over all of them."""
    target, _ = pair()
    end = target.tokenizer.eos_token_id
    found = [target.encode(text[: 12 * length])[:length] for text in corpus.load().heldout]
    long = [ids for ids in found if len(ids) == length and end not in ids[1:].tolist()]
    return [long[i * len(long) // count] for i in range(count)]


def as_embedded() -> Place:
    """A phone, and an edge server."""
    return Place(Device.named("phone"), Device.named("edge-server"))


def as_large(draft: float = 68e6, target: float = 7e9) -> Place:
    """The same two as if the models had so many parameters, in float16: see `timed`."""
    place = as_embedded()
    seconds = [
        float(device.spend(2 * size, "float16", "decode", bytes=2 * size).seconds)
        for device, size in zip(place, (draft, target), strict=True)
    ]
    return timed(*seconds)


def timed(draft: float, verify: float) -> Place:
    """A phone slowed until it drafts a token in `draft` seconds, and an edge server slowed until
    it judges one in `verify`: the embedded models then stand in for larger ones, but for their
    vocabulary."""
    found: list[Device] = []
    for device, model, wanted in zip(as_embedded(), reversed(pair()), (draft, verify), strict=True):
        factor = wanted / judging_seconds(Engine(model.model), device, 0, 64)
        own = device.profile
        slow = replace(
            own,
            name=f"{own.name} / {factor:.0f}",
            flops={name: rate / factor for name, rate in own.flops.items()},
            tiers={
                name: tier._replace(bandwidth=tier.bandwidth / factor)
                for name, tier in own.tiers.items()
            },
        )
        found.append(Device(slow))
    return Place(*found)


@dataclass(frozen=True)
class Served:
    """What a method came to over several texts, each alone on its link.

    `up`, `down` and their paper-style counts are bytes without the opening and the closing;
    `sent` and `messages` are those up until the last token, opening included. `parts`: seconds
    by what they were spent on, in sum `seconds`.
    """

    replies: list[Reply]
    link: Link
    up: int
    down: int
    up_values: int
    down_values: int
    sent: int
    messages: int
    parts: dict[str, float]

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(reply.tokens) for reply in self.replies)

    @property
    def seconds(self) -> float:
        """Virtual seconds of all texts, openings included."""
        return sum(reply.seconds for reply in self.replies)

    @property
    def acceptance(self) -> float:
        """Of the drafted tokens that were judged, the part that stood; nan without any."""
        rounds = [each for reply in self.replies for each in reply.rounds]
        judged = sum(min(each.accepted + 1, each.drafted) for each in rounds)
        return sum(each.accepted for each in rounds) / judged if judged else math.nan

    @property
    def length(self) -> float:
        """Drafted tokens that stand in a round that drafts; nan without any."""
        rounds = [each for reply in self.replies for each in reply.rounds if each.drafted]
        return sum(each.accepted for each in rounds) / len(rounds) if rounds else math.nan

    def standing(self, position: int) -> float:
        """Acceptance at a position of the round (0 is the first), all before it accepted."""
        rounds = [each for reply in self.replies for each in reply.rounds]
        reached = [each for each in rounds if each.drafted > position and each.accepted >= position]
        return sum(each.accepted > position for each in reached) / max(len(reached), 1)

    def at(self, rate: float, latency: float | None = None) -> float:
        """Virtual seconds over another uplink rate (bits/s) and latency, in closed form."""
        ours = self.link.rates["up"]
        assert isinstance(ours, int | float)  # a rate that changes has no closed form
        later = 0.0 if latency is None else latency - self.link.latency
        return self.seconds + 8 * self.sent * (1 / rate - 1 / ours) + 2 * self.messages * later

    def speed(self, rate: float, latency: float | None = None) -> float:
        """Tokens per virtual second, as `at`."""
        return self.tokens / self.at(rate, latency)


def serve(
    method: str,
    link: Link,
    texts: Sequence[Tensor],
    place: Place,
    settings: Mapping[str, Any] | None = None,
    new: int = 64,
    law: Law | None = None,
    seed: int = 0,
) -> Served:
    """Let a method answer texts one after another with exactly `new` tokens each."""
    target, draft = pair()
    replies: list[Reply] = []
    sums, parts = Counter[str](), dict[str, float]()
    for i, text in enumerate(texts):
        ledger = Ledger()
        (reply,) = decode(
            target, draft, [text], method=method, settings=settings,
            law=law or Law(), stop=(),
            max_new_tokens=new, seed=1000 * seed + i, link=link, device=place.device,
            edge=place.edge, ledger=ledger,
        )  # fmt: skip
        replies.append(reply)
        rows = list(ledger.rows())
        for row in rows:
            way = direction(row["from"], row["to"])
            if row["kind"] in ("offer", "verdict"):
                sums[way] += row["bytes"]
                sums[f"{way} values"] += row["values"]
            if way == "up" and row["kind"] != "close":
                sums["sent"] += row["bytes"]
                sums["messages"] += 1
        for part, seconds in spent(rows, link, reply.seconds).items():
            parts[part] = parts.get(part, 0.0) + seconds
    return Served(
        replies, link, sums["up"], sums["down"], sums["up values"], sums["down values"],
        sums["sent"], sums["messages"], parts,
    )  # fmt: skip


def spent(rows: Sequence[Mapping[str, Any]], link: Link, until: float) -> dict[str, float]:
    """The seconds of one session up to `until` by `PARTS`, from its ledger rows: computing on
    the device and at the edge, bits on the air either way, and waiting for anything else."""
    spans: dict[str, list[tuple[float, float]]] = {part: [] for part in PARTS}
    for row in rows:
        end = row["t"] + row["seconds"]
        if row["what"] == "work":
            spans["verify" if row["from"] == "edge" else "draft"].append((row["t"], end))
        elif row["what"] == "crossing":
            way = direction(row["from"], row["to"])
            rate = link.rates[way]  # type: ignore[index]  # nothing goes across here
            assert isinstance(rate, int | float)
            sent = end - link.latency
            spans[way].append((sent - 8 * row["bytes"] / rate, sent))
    edges = np.array(sorted({0.0, until, *(t for part in spans.values() for s in part for t in s)}))
    edges = edges[(edges >= 0) & (edges <= until)]
    middle, length = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    free = np.ones(len(middle), bool)
    found: dict[str, float] = {}
    for part in PARTS[:-1]:
        busy = np.zeros(len(middle), bool)
        for begin, end in spans[part]:
            busy |= (begin <= middle) & (middle < end)
        found[part] = float(length[free & busy].sum())
        free &= ~busy
    return {**found, PARTS[-1]: float(length[free].sum())}


def break_even(method: Served, other: Served) -> float:
    """The uplink rate (bits/s) from which a method is faster than another on the same link, in
    closed form; infinite if at no rate, 0 if at every rate.

    Both take A + 8 B / rate seconds; equal at 8 (B1 - B2) / (A2 - A1).
    """
    bits = 8 * (method.sent - other.sent)
    gain = other.at(math.inf) - method.at(math.inf)
    if gain <= 0:
        return math.inf
    return max(bits / gain, 0.0)
