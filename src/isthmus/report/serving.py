"""What serving came to: answers token by token, and what each method cost a token.

`RUN/serving/<method>/` is written by `isthmus.run.serving`. Its contents are text that models
wrote and files that anyone may have changed: what is read here is checked, and never trusted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from isthmus.errors import InputError, unknown
from isthmus.report import tables, units
from isthmus.report.tables import Table
from isthmus.wire.link import Link

ORIGINS: Mapping[str, str] = {
    "accepted": "drafted on the device, accepted by the target",
    "corrected": "drawn where a draft was rejected",
    "bonus": "drawn after a draft that stood whole",
    "target": "by the target alone",
    "device": "by the draft alone",
}
"""Who produced a token, in words."""


class Spoken(NamedTuple):
    """One token: its text, who produced it, when the device had it (seconds)."""

    text: str
    origin: str
    t: float


class Judging(NamedTuple):
    """One verdict of the target: tokens drafted, and accepted of them."""

    drafted: int
    accepted: int


@dataclass(frozen=True)
class Answer:
    """One text: whose prompt, its tokens and rounds, when it was there, what went wrong if so."""

    owner: str
    prompt: str
    tokens: list[Spoken]
    rounds: list[Judging]
    seconds: float
    problem: str


@dataclass(frozen=True)
class Served:
    """One method's answers; `lossless` where the texts follow the target's law."""

    title: str
    method: str
    lossless: bool
    about: dict[str, Any]
    answers: list[Answer]
    ledger: Table
    unfinished: bool


@dataclass(frozen=True)
class Row:
    """One line of the closing table. A token is one of the answer; bytes are honest counts."""

    title: str
    method: str
    texts: int
    tokens: int
    per_second: float
    bytes_up: float
    bytes_down: float
    judged: int
    accepted: int
    target_calls: float
    joules: float
    joules_source: str
    lossless: bool

    @property
    def acceptance(self) -> float | None:
        """The share of the judged tokens that stood; None where nothing was drafted."""
        return self.accepted / self.judged if self.judged else None


def read(folder: Path) -> tuple[Served, ...]:
    """Every method that the run in `folder` was served by, in the order in which it was served.

    Raises `InputError` naming the file that is broken.
    """
    places = [path.parent for path in (folder / "serving").glob("*/serving.json")]
    found = [(place, tables.whole(place / "serving.json") or {}) for place in sorted(places)]
    found.sort(key=lambda each: n if isinstance(n := each[1].get("number"), int) else -1)
    return tuple(_read(place, about) for place, about in found)


def _read(place: Path, about: dict[str, Any]) -> Served:
    method = about.get("method")
    ledger, ledger_cut = tables.ledger(place / "ledger.jsonl")
    rows, cut = tables.lines(place / "texts.jsonl")
    try:
        answers = [_answer(row) for row in rows]
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        allowed = "answers of tokens with text, origin and time"
        raise InputError(str(place / "texts.jsonl"), tables.first_line(error), allowed) from error
    name = " ".join(method.split()) if isinstance(method, str) else ""
    name = name or place.name
    return Served(
        title=name,
        method=name,
        lossless=about.get("lossless") is True,
        about=about,
        answers=answers,
        ledger=ledger,
        unfinished=cut or ledger_cut,
    )


def _answer(row: Mapping[str, Any]) -> Answer:
    tokens = [_spoken(token) for token in row.get("tokens", ())]
    rounds = [_judging(int(r["drafted"]), int(r["accepted"])) for r in row.get("rounds", ())]
    return Answer(
        owner=str(row.get("owner", "")),
        prompt=str(row.get("prompt", "")),
        tokens=tokens,
        rounds=rounds,
        seconds=_time(row.get("seconds", 0.0)),
        problem=str(row.get("problem", "")),
    )


def _spoken(token: Mapping[str, Any]) -> Spoken:
    origin = token["origin"]
    if origin not in ORIGINS:
        raise ValueError(str(unknown("origin", str(origin), ORIGINS)))
    return Spoken(str(token["text"]), origin, _time(token["t"]))


def _judging(drafted: int, accepted: int) -> Judging:
    if not 0 <= accepted <= drafted:
        raise ValueError(f"{accepted} accepted of {drafted} drafted tokens")
    return Judging(drafted, accepted)


def _time(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"a time of {value} seconds")
    return seconds


def link_text(link: str) -> str:
    """A link by its name or settings, with what it can do.

    >>> link_text("lte"), link_text("up=1e6,latency=0.01")
    ('lte (5 Mbit/s up, 20 Mbit/s down, 30 ms each way)',
     'up=1e6,latency=0.01 (1 Mbit/s up, no limit down, 10 ms each way)')
    >>> link_text("another")
    'another'
    """
    try:
        known = Link.parse(link)
    except InputError:
        return link
    up, down = (known.rates[way] for way in ("up", "down"))
    if not isinstance(up, int | float) or not isinstance(down, int | float):
        return link
    ways = f"{units.rate_text(up)} up, {units.rate_text(down)} down"
    return f"{link} ({ways}, {1e3 * known.latency:g} ms each way)"


def closing_table(shown: Sequence[Served]) -> list[Row]:
    """One row a method: speed, bytes and joules a token, acceptance, whose law it keeps."""
    return [_row(each) for each in shown]


def _row(one: Served) -> Row:
    tokens = sum(len(answer.tokens) for answer in one.answers)
    seconds = sum(answer.seconds for answer in one.answers)
    rounds = [judging for answer in one.answers for judging in answer.rounds]
    sent = one.ledger.where(one.ledger["what"] == "crossing")
    ways = {way: int(sent["bytes"][sent["way"] == way].sum()) for way in ("up", "down")}
    mine = one.ledger.where(on_device(one.ledger))
    sources = {str(source) or "modelled" for source in mine["source"][mine["joules"] != 0]}
    each = max(tokens, 1)
    return Row(
        title=one.title,
        method=one.method,
        texts=len(one.answers),
        tokens=tokens,
        per_second=tokens / seconds if seconds else 0.0,
        bytes_up=ways["up"] / each,
        bytes_down=ways["down"] / each,
        judged=sum(min(r.accepted + 1, r.drafted) for r in rounds),
        accepted=sum(r.accepted for r in rounds),
        target_calls=len(rounds) / each,
        joules=float(mine["joules"].sum()) / each,
        joules_source=", ".join(sorted(sources)),
        lossless=one.lossless,
    )


def on_device(ledger: Table) -> np.ndarray:
    """Which rows (bool `[n]`) devices pay for: their own work, and every crossing (its radio)."""
    return np.array(
        [way != "local" or tables.rank(party) == 0
         for way, party in zip(ledger["way"], ledger["from"], strict=True)],
        dtype=bool,
    )  # fmt: skip


def race(one: Served) -> list[tuple[float, float]]:
    """Tokens there by a time, the mean over the texts: (seconds, tokens), a step at each."""
    times = sorted(token.t for answer in one.answers for token in answer.tokens)
    counted = Counter(times)
    points, so_far = [(0.0, 0.0)], 0
    for t in sorted(counted):
        so_far += counted[t]
        points.append((t, so_far / len(one.answers)))
    return points
