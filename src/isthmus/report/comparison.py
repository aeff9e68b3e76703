"""A comparison of methods: as a table on the terminal, as a page, and as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from isthmus.report import marks, units
from isthmus.report.page import page
from isthmus.report.parts import Cell, PageTable, Section, figures_of
from isthmus.run.compare import Comparison, Line

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = (
    "title", "lr", "score", "seeds", "worst", "clients", "rounds", "bytes", "seconds",
    "total_bytes", "total_seconds", "joules",
)  # fmt: skip
"""The columns of the CSV: the fields of a line that are one number."""


class Shown(NamedTuple):
    """A column of the table: its heading, and a line's cell in words."""

    head: str
    cells: list[str]


def table(found: Comparison) -> list[Shown]:
    """The columns that the terminal and the page show."""
    lines = found.lines
    shown = [
        Shown("method", [line.title for line in lines]),
        Shown(found.metric.replace("_", " "), [score(line) for line in lines]),
    ]
    if any(line.worst is not None for line in lines):
        shown += [
            Shown("worst tenth", [_fixed(line.worst) for line in lines]),
            Shown("over clients", [_fixed(line.clients) for line in lines]),
        ]
    shown += [
        Shown("rounds to target", [_or_dash(line.rounds, units.number) for line in lines]),
        Shown("bytes to target", [_or_dash(line.bytes, units.bytes_text) for line in lines]),
        Shown("time to target", [_or_dash(line.seconds, units.seconds_text) for line in lines]),
        Shown("virtual time", [units.seconds_text(line.total_seconds) for line in lines]),
        Shown("energy", [units.joules_text(line.joules) for line in lines]),
        Shown("lr", [f"{line.lr:g}" for line in lines]),
    ]
    return shown


def score(line: Line) -> str:
    """`0.951 +- 0.004`."""
    return _fixed(line.score) + ("" if math.isnan(line.seeds) else f" ± {line.seeds:.3f}")


def notes(found: Comparison) -> list[str]:
    """What stands under the table."""
    return [f"Target: {found.metric} {found.target:.4g}.", *found.notes,
            "Energy is modelled; time is virtual, from the device and link profiles."]  # fmt: skip


def terminal(found: Comparison, console: Console) -> None:
    """The table; one plain line a method where nobody watches."""
    columns = table(found)
    if not console.is_terminal:
        for row in zip(*(column.cells for column in columns), strict=True):
            rest = ", ".join(f"{c.head} {x}" for c, x in zip(columns[1:], row[1:], strict=True))
            console.print(f"{row[0]}: {rest}", markup=False, highlight=False, soft_wrap=True)
    else:
        from rich import box
        from rich.table import Table

        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
        for i, column in enumerate(columns):
            shown.add_column(column.head, justify="right" if i else "left", overflow="fold")
        for row in zip(*(column.cells for column in columns), strict=True):
            shown.add_row(*row)
        console.print(shown)
    for note in notes(found):
        console.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)


def write_csv(found: Comparison, path: Path) -> Path:
    """One row a method; what does not apply is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["metric", *COLUMNS])
        for line in found.lines:
            cells = [getattr(line, name) for name in COLUMNS]
            out.writerow([found.metric, *("" if x is None else x for x in cells)])
    return path


def write_page(found: Comparison, path: Path, title: str) -> Path:
    """The table and two charts as one page that opens offline."""
    best = max if found.higher else min
    leader = best((x for x in found.lines if math.isfinite(x.score)), key=lambda x: x.score)
    summary = f"{leader.title} ends best: {found.metric.replace('_', ' ')} {score(leader)}."
    columns = table(found)
    rows = [
        [Cell(text, sort=_sort(found.lines[i], c)) for c, text in enumerate(row)]
        for i, row in enumerate(zip(*(column.cells for column in columns), strict=True))
    ]
    heads = [column.head for column in columns]
    shown = PageTable("Means over seeds", heads, [c > 0 for c in range(len(heads))], rows)
    sections = [
        Section("table", "The table", tables=[shown]),
        Section("curves", "On the way", figures=figures_of(_charts(found))),
        Section("rates", "Learning rates that were tried", tables=[_tried(found)]),
    ]
    path.write_text(page(title, summary, notes(found), sections), encoding="utf-8")
    return path


def _sort(line: Line, column: int) -> str:
    """The number by which a cell sorts; the text itself in the first column."""
    keys = [line.title, line.score]
    if line.worst is not None:
        keys += [line.worst, line.clients]
    keys += [line.rounds, line.bytes, line.seconds, line.total_seconds, line.joules, line.lr]
    value = keys[column]
    return "" if value is None else str(value)


def _tried(found: Comparison) -> PageTable:
    """The validation score of every rate, by method."""
    rates = sorted({rate for line in found.lines for rate in line.rates})
    heads = ["method", *(f"{rate:g}" for rate in rates)]
    rows = [
        [Cell(line.title), *(Cell(_fixed(line.rates.get(rate))) for rate in rates)]
        for line in found.lines
    ]
    caption = f"{found.metric} on validation items, first seed"
    return PageTable(caption, heads, [False, *[True] * len(rates)], rows)


def _charts(found: Comparison) -> dict[str, marks.Chart]:
    from isthmus.errors import need

    alt = need("altair", "report")
    metric = found.metric.replace("_", " ")
    points = {
        line.title: [(float(r), v) for r, v in line.curve if math.isfinite(v)]
        for line in found.lines
    }
    axis = alt.Axis(tickMinStep=1, format="d", title="round")
    chart = marks.lines(points, _named(found.lines), metric, axis)
    if chart is None:
        return {}
    words = "; ".join(f"{name} ends at {line[-1][1]:.4g}" for name, line in points.items() if line)
    caption = "Mean over seeds on validation items, each method at its own learning rate."
    return {"curve": marks.titled(chart, f"{metric.capitalize()} over rounds", caption, words)}


class _Title(NamedTuple):
    title: str


def _named(lines: Sequence[Line]) -> list[_Title]:
    return [_Title(line.title) for line in lines]


def _fixed(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else units.number(value)


def _or_dash(value: float | None, said: object) -> str:
    return "–" if value is None else said(value)  # type: ignore[operator]
