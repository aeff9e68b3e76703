"""Several methods on one task, each at its own best learning rate, over several seeds.

Everything that chooses is done on validation items: the learning rate (largest final score on the
first seed) and the rounds to a target. The test items are looked at once, after the last round of
each final run. Every run is one file of the comparison's folder, so a comparison that was cut short
goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from isthmus.errors import InputError
from isthmus.federated.score import personal
from isthmus.run.api import start
from isthmus.run.build import build
from isthmus.run.checkpoint import replace_file
from isthmus.run.config import Config, assign
from isthmus.wire.errors import WireError
from isthmus.wire.ledger import Ledger

RATES = (0.01, 0.03, 0.1, 0.3)
"""Learning rates tried for SGD; others are tried around the task's own (`rates`)."""

SPREAD = (0.1, 0.3, 1.0, 3.0)
TUNED = "fedavg-ft"
"""Stands in every comparison of personal models: it beats many of them."""

DEFAULTS: dict[str, Any] = {
    "clients": 20,
    "rounds": 20,
    "partition": "dirichlet:0.3,minimum=12",
    "holdout": 0.25,
    "score": "mixed",
}
"""Where a comparison differs from `train`: clients are unlike, and tested on their own items."""

Said = Callable[[str, int, int], None]
"""Told what has been run, how many runs are done, and how many there are."""


class Entry(NamedTuple):
    """One line of the table: a method, its settings, and the schedule it runs on."""

    title: str
    keys: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One method: means over seeds, and the spread of each.

    `score` and `seeds` are the test metric's mean and standard deviation over seeds; `worst` is the
    mean of the worst tenth of the clients, `clients` the deviation over clients (None where clients
    have no test items of their own). `rounds`, `bytes` and `seconds` are to the target, on
    validation items, of the mean curve (None: not reached). `total_*` are a whole run's.
    """

    title: str
    lr: float
    rates: dict[float, float]
    score: float
    seeds: float
    each: tuple[float, ...]
    worst: float | None
    clients: float | None
    rounds: float | None
    bytes: float | None
    seconds: float | None
    total_bytes: float
    total_seconds: float
    joules: float
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Comparison:
    """The lines in the order asked for, the metric, the target, and what was recorded."""

    metric: str
    higher: bool
    target: float
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def entry(text: str) -> Entry:
    """`fedprox`, `fedprox:mu=0.1`, `dbe+fedavg`, `fedavg@fedbuff:k=5`, `path.py:Mine`.

    >>> entry("fedprox:mu=0.1@fedasync")
    Entry(title='fedprox:mu=0.1@fedasync', keys={'method': 'fedprox', 'settings': {'mu': 0.1}, \
'schedule': 'fedasync'})
    """
    method, _, schedule = text.partition("@")
    keys: dict[str, Any] = {}
    if ".py:" not in method:
        method, _, words = method.partition(":")
        pairs = [f"settings.{pair}" for pair in words.split(",") if pair]
        keys = assign({}, pairs)
    return Entry(text, {"method": method, **keys, **({"schedule": schedule} if schedule else {})})


def compare(
    methods: Sequence[str],
    *,
    seeds: int = 3,
    rates: Sequence[float] = (),
    target: float | None = None,
    out: Path | str | None = None,
    jobs: int | None = None,
    said: Said = lambda what, done, of: None,
    **keys: Any,
) -> Comparison:
    """Run the grid and return the table; `keys` are those of `Config`, over `DEFAULTS`.

    `target` is a validation score; without it, the one with which the first method ends. `out` is
    a folder that keeps every run and lets a comparison go on. `jobs` runs are played at a time, one
    thread each (the number of cores without it). Raises `InputError` before anything is run.
    """
    if not methods:
        raise InputError("methods", "none", "one or more")
    if seeds < 1:
        raise InputError("seeds", seeds, "1 or more")
    common = {**DEFAULTS, **keys, "threads": 1, "checkpoint": 0}
    if str(common["partition"]).startswith("natural"):
        common.setdefault("holdout", None)
    entries = [entry(text) for text in methods]
    built = [build(Config.make({**common, **e.keys}), Ledger()) for e in entries]
    if any(personal(b.federation, b.config.score) for b in built):
        names = [e.keys["method"] for e in entries]
        if TUNED not in names:
            entries.append(entry(TUNED))
            built.append(build(Config.make({**common, **entries[-1].keys}), Ledger()))
    metric = built[0].task.metric
    tried = [_rates(rates, keys, b.config) for b in built]
    grid = Grid(Path(out) if out is not None else None, jobs or os.cpu_count() or 1, said)

    def job(e: Entry, seed: int, lr: float, split: str) -> dict[str, Any]:
        rounds = 1 if split == "val" else 0
        return {**common, **e.keys, "seed": seed, "lr": lr, "split": split, "evaluate": rounds}

    search = [[job(e, 0, lr, "val") for lr in own] for e, own in zip(entries, tried, strict=True)]
    left = sum(2 * seeds - 1 for _ in entries)
    found = grid.play([j for jobs_ in search for j in jobs_], left)
    best: list[float] = []
    for own, jobs_ in zip(tried, search, strict=True):
        scores = [_ended(found[_slug(j)], metric.higher_is_better) for j in jobs_]
        best.append(own[int(np.argmax(scores))])
    final = [
        job(e, seed, lr, split)
        for e, lr in zip(entries, best, strict=True)
        for seed in range(seeds)
        for split in ("val", "test")
    ]
    found |= grid.play(final, 0)
    lines = []
    reach = target
    for e, lr, own, jobs_ in zip(entries, best, tried, search, strict=True):
        value = {r: _end(found[_slug(j)]) for r, j in zip(own, jobs_, strict=True)}
        val = [found[_slug(job(e, seed, lr, "val"))] for seed in range(seeds)]
        test = [found[_slug(job(e, seed, lr, "test"))] for seed in range(seeds)]
        if reach is None:
            reach = float(np.mean([_end(run) for run in val]))
        lines.append(_line(e.title, lr, value, val, test, reach, metric.higher_is_better))
    assert reach is not None  # there is at least one line
    return Comparison(
        metric.primary,
        metric.higher_is_better,
        reach,
        tuple(lines),
        (
            *_notes(built[0].config, seeds, methods[0] if target is None else None),
            *_at_the_edge(lines),
        ),
    )


def _rates(given: Sequence[float], keys: Mapping[str, Any], config: Config) -> list[float]:
    """The learning rates to try: as given, or around the one that the run would take."""
    if given:
        return sorted(set(given))
    if keys.get("lr") is not None:
        return [float(keys["lr"])]
    if config.optimiser == "sgd":
        return list(RATES)
    assert config.lr is not None  # a built configuration has one
    return [config.lr * factor for factor in SPREAD]


def _notes(config: Config, seeds: int, first: str | None) -> tuple[str, ...]:
    """What is recorded under every table."""
    moment = {"mixed": "just after mixing", "trained": "just after local training"}
    own = config.holdout
    items = f"{own:.0%} of each client's own items" if own else "the task's test items"
    goal = f"; the target is what {first} ends with there" if first else ""
    return (
        f"Scored on {items}, {moment[config.score]}, after the last round, never the best.",
        "Learning rates are chosen on validation items with the first seed; rounds, bytes and time "
        f"to the target are counted on validation items too{goal}. Test items are looked at once.",
        f"{seeds} seeds: +- is the standard deviation over them.",
    )


def _at_the_edge(lines: Sequence[Line]) -> tuple[str, ...]:
    """Says of which methods the best rate may lie beyond those that were tried."""
    out = []
    for which, word in ((max, "largest"), (min, "smallest")):
        names = [x.title for x in lines if len(x.rates) > 1 and x.lr == which(x.rates)]
        if names:
            out.append(f"The best rate is the {word} that was tried: {', '.join(names)}.")
    return tuple(out)


@dataclass
class Grid:
    """Runs jobs side by side, and remembers each in a file of its own."""

    out: Path | None
    jobs: int
    said: Said
    done: int = 0
    planned: int = 0
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def play(self, jobs: Iterable[Mapping[str, Any]], later: int) -> dict[str, dict[str, Any]]:
        """What each job came to, by its slug; `later` more jobs are known to come."""
        wanted = {_slug(job): dict(job) for job in jobs}
        found = {slug: self._known(slug) for slug in wanted}
        missing = [slug for slug, known in found.items() if known is None]
        self.done += len(wanted) - len(missing)
        self.planned = self.done + len(missing) + later
        if len(missing) <= 1 or self.jobs == 1:
            for slug in missing:
                found[slug] = self._keep(slug, wanted[slug], play(wanted[slug]))
        else:
            self._side_by_side(missing, wanted, found)
        return {slug: known for slug, known in found.items() if known is not None}

    def _side_by_side(
        self, missing: Sequence[str], wanted: Mapping[str, Any], found: dict[str, Any]
    ) -> None:
        many = min(self.jobs, len(missing))
        with ProcessPoolExecutor(many, get_context("spawn")) as pool:
            asked: dict[Future[Any], str] = {pool.submit(play, wanted[s]): s for s in missing}
            try:
                for future in as_completed(asked):
                    slug = asked[future]
                    found[slug] = self._keep(slug, wanted[slug], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _known(self, slug: str) -> dict[str, Any] | None:
        path = self.out / f"{slug}.json" if self.out is not None else None
        if slug not in self.found and path is not None and path.exists():
            try:
                self.found[slug] = json.loads(path.read_text())
            except json.JSONDecodeError:
                return None
        return self.found.get(slug)

    def _keep(self, slug: str, job: Mapping[str, Any], came: dict[str, Any]) -> dict[str, Any]:
        self.done += 1
        self.found[slug] = came
        on = f"@{job['schedule']}" if "schedule" in job else ""
        what = f"{job['method']}{on}, lr {job['lr']:g}, seed {job['seed']}, {job['split']}"
        self.said(what, self.done, self.planned)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            replace_file(self.out / f"{slug}.json", json.dumps({**came, "job": job}).encode())
        return came


def _slug(job: Mapping[str, Any]) -> str:
    """A file name that says what a job is, and differs for every other job."""
    code = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()[:10]
    name = "".join(c if c.isalnum() else "-" for c in str(job["method"]).rpartition("/")[2])
    return f"{name}-{job['split']}-{job['seed']}-{code}"


def play(job: Mapping[str, Any]) -> dict[str, Any]:
    """One run: its curve (round, bytes, virtual seconds, score), its clients, what it cost.

    A run that diverges has an empty curve.
    """
    try:
        run = start(Config.make(job))
    except WireError:  # NaN in an upload
        return {"curve": [], "clients": [], "bytes": 0, "seconds": 0.0, "joules": 0.0}
    primary, last = run.task.metric.primary, run.metrics[-1]["round"]
    moved = _bytes_by_round(run.ledger)
    curve = [
        (row["round"], int(moved[: row["round"] + 1].sum()), row["t"], row[primary])
        for row in run.metrics
        if row["scope"] == "global"
    ]
    ends = [row for row in run.metrics if row["round"] == last and row["scope"] != "global"]
    return {
        "curve": curve,
        "clients": [row[primary] for row in ends],
        "bytes": int(moved.sum()),
        "seconds": run.seconds,
        "joules": float(run.ledger.total("joules")),
    }


def _bytes_by_round(ledger: Ledger) -> np.ndarray:
    table = ledger.table()
    rounds = np.maximum(table["round"].astype(np.int64), 0)
    return np.bincount(rounds, weights=table["bytes"].astype(float), minlength=1)


def _ended(run: Mapping[str, Any], higher: bool) -> float:
    """How good a run ended, larger being better; a diverged one is worse than any other."""
    end = _end(run)
    if not math.isfinite(end):
        return -math.inf
    return end if higher else -end


def _end(run: Mapping[str, Any]) -> float:
    """The last score; NaN for a run that diverged."""
    return run["curve"][-1][3] if run["curve"] else math.nan


def _line(
    title: str,
    lr: float,
    rates: dict[float, float],
    val: Sequence[Mapping[str, Any]],
    test: Sequence[Mapping[str, Any]],
    target: float,
    higher: bool,
) -> Line:
    ends = [_end(run) for run in test]
    shortest = min(len(run["curve"]) for run in val)
    mean = np.mean([run["curve"][:shortest] for run in val], axis=0).tolist()
    goal = _first(mean, target, higher)
    worst = [_worst(run["clients"], higher) for run in test if run["clients"]]
    over = [float(np.std(run["clients"])) for run in test if run["clients"]]
    return Line(
        title=title,
        lr=lr,
        rates=rates,
        score=float(np.mean(ends)),
        seeds=float(np.std(ends, ddof=1)) if len(ends) > 1 else math.nan,
        each=tuple(ends),
        worst=float(np.mean(worst)) if worst else None,
        clients=float(np.mean(over)) if over else None,
        rounds=None if goal is None else goal[0],
        bytes=None if goal is None else goal[1],
        seconds=None if goal is None else goal[2],
        total_bytes=float(np.mean([run["bytes"] for run in test])),
        total_seconds=float(np.mean([run["seconds"] for run in test])),
        joules=float(np.mean([run["joules"] for run in test])),
        curve=tuple((int(row[0]), row[3]) for row in mean),
    )


def _first(
    curve: Sequence[Sequence[float]], target: float, higher: bool
) -> tuple[float, float, float] | None:
    """Round, bytes and seconds when the score first reaches the target."""
    for round, moved, t, value in curve:
        if value >= target if higher else value <= target:
            return round, moved, t
    return None


def _worst(clients: Sequence[float], higher: bool) -> float:
    """The mean of the worst tenth, at least one client."""
    order = sorted(clients, reverse=not higher)
    return float(np.mean(order[: max(1, round(len(order) / 10))]))
