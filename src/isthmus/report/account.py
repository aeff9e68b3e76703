"""What the runs cost and what they reached: pure sums over their tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from isthmus.report.read import RunData
from isthmus.report.tables import Table

_PREFERRED = ("perplexity", "accuracy")
_LOWER = (
    "loss",
    "perplexity",
    "error",
    "nll",
    "mae",
    "mse",
    "distance",
    "divergence",
    "regret",
    "bits",
)
_SPLITS = ("test", "val", "train")


class Quality(NamedTuple):
    """One measure of quality: metric, split, and which way is better."""

    metric: str
    split: str

    @property
    def lower(self) -> bool:
        return any(word in self.metric for word in _LOWER)

    @property
    def better(self) -> str:
        return "lower" if self.lower else "higher"

    def worst(self, values: Iterable[float]) -> int:
        """The index of the worst value; one that is not finite is worse than any other."""
        sign = 1.0 if self.lower else -1.0
        return int(np.argmax([sign * v if np.isfinite(v) else np.inf for v in values]))


class Point(NamedTuple):
    """One value of a curve."""

    round: int
    t: float
    value: float


class Curve(NamedTuple):
    """A run's quality over rounds; `scope` says whose quality it is."""

    points: list[Point]
    scope: str


@dataclass(frozen=True)
class Device:
    """One device: quality of the model that it uses, before and after, and its costs."""

    name: str
    before: float | None
    after: float | None
    personal: bool
    bytes_up: int
    bytes_down: int
    seconds: float
    joules: float


@dataclass(frozen=True)
class Totals:
    """Sums over a ledger. Bytes are honest (framing included); `values` are values only."""

    bytes_up: int
    bytes_down: int
    bytes_across: int
    values_up: int
    values_down: int
    crossings: int
    joules: float
    joules_source: str
    money: float


@dataclass(frozen=True)
class Row:
    """One line of the closing table."""

    run: str
    method: str
    metric: str
    scope: str
    before: float | None
    after: float | None
    worst_device: str
    worst: float | None
    bytes_up: int
    bytes_down: int
    bytes_across: int
    values_up: int
    values_down: int
    seconds: float
    joules: float
    joules_source: str


def qualities(runs: Sequence[RunData]) -> list[Quality]:
    """Every metric of the runs on its best split, the one that most runs share first.

    Perplexity, then accuracy, then the rest by name; a plain loss comes last.
    """
    seen: Counter[str] = Counter()
    splits: dict[str, set[str]] = {}
    for run in runs:
        pairs = set(zip(run.metrics["metric"], run.metrics["split"], strict=True))
        seen.update({metric for metric, _ in pairs})
        for metric, split in pairs:
            splits.setdefault(metric, set()).add(split)

    def order(metric: str) -> tuple[int, int, str]:
        place = _PREFERRED.index(metric) if metric in _PREFERRED else 9 if metric == "loss" else 5
        return -seen[metric], place, metric

    def best(options: set[str]) -> str:
        return next((split for split in _SPLITS if split in options), min(options))

    return [Quality(metric, best(splits[metric])) for metric in sorted(seen, key=order)]


def curve(run: RunData, quality: Quality) -> Curve:
    """Quality over rounds: of the global model, else the plain mean over the devices."""
    table = _of(run, quality)
    whole = table.where(table["scope"] == "global")
    if len(whole):
        last = {r: Point(r, t, v) for r, t, v in _points(whole)}
        return Curve([last[r] for r in sorted(last)], "global model")
    rounds: dict[int, list[Point]] = {}
    for points, _ in _series(table).values():
        for r, point in points.items():
            rounds.setdefault(r, []).append(point)
    means = [
        Point(r, max(p.t for p in at), float(np.mean([p.value for p in at])))
        for r, at in sorted(rounds.items())
    ]
    return Curve(means, "mean of devices")


def devices(run: RunData, quality: Quality) -> list[Device]:
    """Every device that was scored or that sent, received or worked, in natural order."""
    series = _series(_of(run, quality))
    costs = _by_party(run.ledger)
    parties = (name for name in costs if name.startswith("client/"))
    found = []
    for name in sorted({*series, *parties}, key=_natural):
        points, personal = series.get(name, ({}, False))
        first, final = points.get(0), points.get(max(points, default=0))
        up, down, seconds, joules = costs.get(name, (0, 0, 0.0, 0.0))
        found.append(
            Device(
                name=device_name(name),
                before=first.value if first else None,
                after=final.value if final and final.round > 0 else None,
                personal=personal,
                bytes_up=up,
                bytes_down=down,
                seconds=seconds,
                joules=joules,
            )
        )
    return found


def device_name(party: str) -> str:
    """A party as a person would say it.

    >>> device_name("client/17"), device_name("client/anna")
    ('client 17', 'anna')
    """
    name = party.removeprefix("client/")
    return f"client {name}" if name.isdigit() else name


def totals(run: RunData) -> Totals:
    """Bytes by direction, joules with their sources, money: each a plain sum of the ledger."""
    ledger = run.ledger
    sent = crossings(run)
    ways = {way: sent.where(sent["way"] == way) for way in ("up", "down", "across")}
    return Totals(
        bytes_up=int(ways["up"]["bytes"].sum()),
        bytes_down=int(ways["down"]["bytes"].sum()),
        bytes_across=int(ways["across"]["bytes"].sum()),
        values_up=int(ways["up"]["values"].sum()),
        values_down=int(ways["down"]["values"].sum()),
        crossings=len(sent),
        joules=float(ledger["joules"].sum()),
        joules_source=", ".join(sources([run])),
        money=float(ledger["money"].sum()),
    )


def sources(runs: Sequence[RunData]) -> list[str]:
    """Where the joules of these runs come from: `modelled`, or the meters that their rows name."""
    found: set[str] = set()
    for run in runs:
        named = run.ledger["source"][run.ledger["joules"] != 0]
        found |= {str(source) or "modelled" for source in named}
    return sorted(found)


def crossings(run: RunData) -> Table:
    """The rows of the ledger that left a party."""
    return run.ledger.where(run.ledger["what"] == "crossing")


def moved(run: RunData, points: Sequence[Point]) -> list[int]:
    """Bytes moved either way until the end of each point's round (by time, where rounds lack)."""
    table = crossings(run)
    counts, times, rounds = table["bytes"], table["t"], table["round"]
    dated = rounds >= 0
    sums = []
    for point in points:
        done = np.where(dated, rounds <= point.round, times <= point.t)
        sums.append(int(counts[done].sum()))
    return sums


def virtual_seconds(run: RunData) -> float:
    """The virtual clock at the last entry of the run."""
    clocks = np.concatenate([run.ledger["t"], run.metrics["t"]])
    return float(clocks.max(initial=0.0))


def closing_table(runs: Sequence[RunData]) -> list[Row]:
    """One row a run: quality before and after, worst device, bytes, virtual seconds, joules."""
    shared = qualities(runs)
    return [_row(run, shared[0] if shared else Quality("quality", "test")) for run in runs]


def _row(run: RunData, quality: Quality) -> Row:
    line = curve(run, quality)
    cost = totals(run)
    scored = [(d.name, d.after) for d in devices(run, quality) if d.after is not None]
    worst = scored[quality.worst(v for _, v in scored)] if scored else ("", None)
    first = line.points[0] if line.points else None
    last = line.points[-1] if line.points else None
    return Row(
        run=run.title,
        method=run.method,
        metric=quality.metric,
        scope=line.scope if line.points else "",
        before=first.value if first and first.round == 0 else None,
        after=last.value if last and last.round > 0 else None,
        worst_device=worst[0],
        worst=worst[1],
        bytes_up=cost.bytes_up,
        bytes_down=cost.bytes_down,
        bytes_across=cost.bytes_across,
        values_up=cost.values_up,
        values_down=cost.values_down,
        seconds=virtual_seconds(run),
        joules=cost.joules,
        joules_source=cost.joules_source,
    )


def _of(run: RunData, quality: Quality) -> Table:
    table = run.metrics
    return table.where((table["metric"] == quality.metric) & (table["split"] == quality.split))


def _points(table: Table) -> Iterable[tuple[int, float, float]]:
    columns = (table[name].tolist() for name in ("round", "t", "value"))
    return zip(*columns, strict=True)


def _series(table: Table) -> dict[str, tuple[dict[int, Point], bool]]:
    """Device -> (round -> value of the model that it uses, whether that model is personal).

    A device with a personal model uses that one; before the first round there may be none
    yet, and then its plain score counts.
    """
    plain: dict[str, dict[int, Point]] = {}
    personal: dict[str, dict[int, Point]] = {}
    for scope, (r, t, v) in zip(table["scope"], _points(table), strict=True):
        owner = scope.removesuffix("/personal")
        if owner.startswith("client/"):
            series = plain if owner == scope else personal
            series.setdefault(owner, {})[r] = Point(r, t, v)
    mine = {name: points for name, points in plain.items() if name not in personal}
    for name, points in personal.items():
        start = {0: plain[name][0]} if 0 in plain.get(name, {}) else {}
        mine[name] = {**start, **points}
    return {name: (points, name in personal) for name, points in mine.items()}


def _by_party(ledger: Table) -> dict[str, tuple[int, int, float, float]]:
    """Party -> bytes sent, bytes received, seconds of its own work, joules of its own rows."""
    names = list(dict.fromkeys([*ledger["from"], *ledger["to"]]))
    code = {name: i for i, name in enumerate(names)}
    sender = np.array([code[name] for name in ledger["from"]], dtype=np.int64)
    receiver = np.array([code[name] for name in ledger["to"]], dtype=np.int64)
    crossing, work = ledger["what"] == "crossing", ledger["way"] == "local"

    def total(who: np.ndarray, column: str, mask: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(names), dtype=ledger[column].dtype)
        np.add.at(sums, who[mask], ledger[column][mask])
        return sums

    # A crossing's joules are charged to the party at the device's end of it.
    owner = np.where(ledger["way"] == "down", receiver, sender)
    columns = (
        total(sender, "bytes", crossing),
        total(receiver, "bytes", crossing),
        total(sender, "seconds", work),
        total(owner, "joules", np.ones(len(ledger), dtype=bool)),
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return dict(zip(names, rows, strict=True))


def _natural(party: str) -> tuple[int, int, str]:
    name = party.removeprefix("client/")
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)
