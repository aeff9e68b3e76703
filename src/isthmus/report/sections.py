"""What the page shows, in order.

A section is a function from the runs to a `Section`, or None when these runs give it nothing to
say. To add one, write the function and put it into `SECTIONS`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from isthmus.report import account, figures, marks, theme, units
from isthmus.report.read import RunData

_MOST_DEVICES = 200


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, its exact value on hover, what it sorts by, a small note."""

    text: str
    exact: str = ""
    sort: str = ""
    note: str = ""
    colour: str = ""


@dataclass(frozen=True)
class PageTable:
    """A table: its caption, the column names, which columns are numbers, the rows.

    `folded` puts it behind its caption, closed or open; None shows it plainly.
    """

    caption: str
    head: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[Cell]]
    folded: bool | None = None


@dataclass(frozen=True)
class Figure:
    """A chart of the page: words for the reader, the specification for the browser."""

    slug: str
    title: str
    caption: str
    description: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Block:
    """Text shown as it is: folded behind its title, or below it."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """One part of the page, shown in this order: lead, tables, figures, blocks."""

    slug: str
    title: str
    lead: str = ""
    tables: list[PageTable] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


def _result(runs: Sequence[RunData]) -> Section:
    rows = account.closing_table(runs)
    metric = _plain(rows[0].metric).capitalize()
    colour = theme.colours("run", len(rows))
    head = ["Run", f"{metric} before", "After", "Worst device", "Up", "Down"]
    across = any(row.bytes_across for row in rows)
    head += [*(["Between devices"] if across else []), "Virtual time", "Energy"]
    lines = []
    for row, dot in zip(rows, colour, strict=True):
        note = "mean of devices" if row.scope == "mean of devices" else ""
        cells = [
            Cell(row.run, colour=dot),
            _quality(row.before),
            _quality(row.after, note),
            _quality(row.worst, row.worst_device),
            _bytes(row.bytes_up, row.values_up),
            _bytes(row.bytes_down, row.values_down),
            *([_bytes(row.bytes_across)] if across else []),
            _number(row.seconds, units.seconds_text, "virtual seconds"),
            _joules(row.joules, row.joules_source),
        ]
        lines.append(cells)
    table = PageTable(
        "Before is the model of round 0; after is that of the last round.",
        head,
        [False] + [True] * (len(head) - 1),
        lines,
    )
    return Section("result", "Result", tables=[table])


def _qualities(runs: Sequence[RunData]) -> Section | None:
    drawn = _figures(figures.qualities(runs))
    return Section("quality", "Quality", figures=drawn) if drawn else None


def _costs(runs: Sequence[RunData]) -> Section | None:
    drawn = _figures(figures.costs(runs))
    return Section("costs", "Costs", figures=drawn) if drawn else None


def _devices(runs: Sequence[RunData]) -> Section | None:
    measures = account.qualities(runs)
    tables = []
    for run, dot in zip(runs, theme.colours("run", len(runs)), strict=True):
        found = account.devices(run, measures[0]) if measures else []
        if found:
            table = _device_table(run.title, found, measures[0], dot)
            tables.append(replace(table, folded=bool(tables) if len(runs) > 1 else None))
    if not tables:
        return None
    return Section(
        "devices",
        "Devices",
        "Quality of the model that each device uses, and what it cost.",
        tables=tables,
    )


def _device_table(
    title: str, found: list[account.Device], quality: account.Quality, colour: str
) -> PageTable:
    metric = _plain(quality.metric)
    head = ["Device", f"{metric} before".capitalize(), "After", "Up", "Down", "Own work", "Energy"]
    caption = title
    if any(device.personal for device in found):
        caption += ", scored on personal models"
    if len(found) > _MOST_DEVICES:
        sign = -1 if quality.lower else 1
        caption += f", the {_MOST_DEVICES} worst of {len(found)} devices"
        found = sorted(found, key=lambda d: sign * (d.after or 0.0))[:_MOST_DEVICES]
    rows = [
        [
            Cell(device.name, colour=colour),
            _quality(device.before),
            _quality(device.after),
            _bytes(device.bytes_up),
            _bytes(device.bytes_down),
            _number(device.seconds, units.seconds_text, "virtual seconds"),
            _joules(device.joules),
        ]
        for device in found
    ]
    return PageTable(caption, head, [False] + [True] * 6, rows)


def _configuration(runs: Sequence[RunData]) -> Section:
    blocks = [Block(run.title, run.config_text.rstrip() or "(empty)", folded=True) for run in runs]
    return Section(
        "configuration",
        "Configuration",
        "As resolved by the run, with every choice made automatically.",
        blocks=blocks,
    )


def _reproduce(runs: Sequence[RunData]) -> Section:
    blocks = [Block(run.title, _command(run)) for run in runs]
    lead = "The same configuration and seed give the same bits on equal hardware."
    return Section("reproduce", "How to reproduce", lead, blocks=blocks)


def _command(run: RunData) -> str:
    """The command that the run recorded, else the one that runs its configuration again."""
    given = run.environment.get("command")
    if isinstance(given, list):
        return shlex.join(str(word) for word in given)
    return str(given) if given else f"isthmus train --config {shlex.quote(run.name)}/config.yaml"


def _environment(runs: Sequence[RunData]) -> Section | None:
    blocks = [
        Block(run.title, "\n".join(_flat(run.environment)), folded=True)
        for run in runs
        if run.environment
    ]
    return Section("environment", "Environment", blocks=blocks) if blocks else None


SECTIONS: list[Callable[[Sequence[RunData]], Section | None]] = [
    _result, _qualities, _costs, _devices, _configuration, _reproduce, _environment,
]  # fmt: skip


def _figures(charts: Mapping[str, marks.Chart]) -> list[Figure]:
    """Charts for the page: their words leave the specification, the page shows them as text."""
    drawn = []
    for slug, chart in charts.items():
        spec = chart.to_dict(validate=False)
        said = spec.pop("title")
        spec.pop("config", None)
        caption = " ".join(said["subtitle"])
        drawn.append(Figure(slug, said["text"], caption, spec.pop("description"), spec))
    return drawn


def _quality(value: float | None, note: str = "") -> Cell:
    sort = "" if value is None else repr(value)
    return Cell(units.number(value), units.exact(value), sort, note)


def _bytes(count: int, values: int = 0) -> Cell:
    exact = units.exact(count, "bytes") + (f"; values only: {values:,}" if values else "")
    return Cell(units.bytes_text(count), exact, str(count))


def _number(value: float, said: Callable[[float], str], unit: str, note: str = "") -> Cell:
    return Cell(said(value), units.exact(value, unit), repr(value), note)


def _joules(value: float, source: str = "") -> Cell:
    if not value:
        return Cell("–", "not recorded", "0")
    return _number(value, units.joules_text, f"joules {source}".strip(), source)


def _plain(metric: str) -> str:
    return metric.replace("_", " ")


def _flat(value: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as lines `a.b: value`."""
    lines: list[str] = []
    for name, item in value.items():
        if isinstance(item, dict):
            lines += _flat(item, f"{prefix}{name}.")
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list) else item
            lines.append(f"{prefix}{name}: {text}")
    return lines
