"""What the page shows, in order.

A section is a function from the runs to a `Section`, or None when these runs give it nothing to
say. To add one, write the function and put it into `SECTIONS`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from isthmus.report import account, chapter, figures, theme, units
from isthmus.report.parts import (
    Block,
    Cell,
    PageTable,
    Section,
    bytes_cell,
    figures_of,
    joules_cell,
    number_cell,
    quality_cell,
)
from isthmus.report.read import RunData

_MOST_DEVICES = 200


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
            quality_cell(row.before),
            quality_cell(row.after, note),
            quality_cell(row.worst, row.worst_device),
            bytes_cell(row.bytes_up, row.values_up),
            bytes_cell(row.bytes_down, row.values_down),
            *([bytes_cell(row.bytes_across)] if across else []),
            number_cell(row.seconds, units.seconds_text, "virtual seconds"),
            joules_cell(row.joules, row.joules_source),
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
    drawn = figures_of(figures.qualities(runs))
    return Section("quality", "Quality", figures=drawn) if drawn else None


def _costs(runs: Sequence[RunData]) -> Section | None:
    drawn = figures_of(figures.costs(runs))
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
            quality_cell(device.before),
            quality_cell(device.after),
            bytes_cell(device.bytes_up),
            bytes_cell(device.bytes_down),
            number_cell(device.seconds, units.seconds_text, "virtual seconds"),
            joules_cell(device.joules),
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
    _result, _qualities, _costs, _devices, chapter.section, _configuration, _reproduce,
    _environment,
]  # fmt: skip


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
