"""Files for papers: each chart as PNG and SVG on white, all numbers as tidy CSV."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from isthmus.errors import InputError, need, unknown
from isthmus.report import account, serving
from isthmus.report.read import RunData, read_all, served
from isthmus.report.tables import Table

FORMATS = ("png", "svg", "csv")
_WIDTH = 560


def export(
    folders: Sequence[Path | str], out_dir: Path | str, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write charts and tables of the runs in `folders` into `out_dir`; return the paths.

    The tables are `closing.csv` (one row a run), `devices.csv`, `metrics.csv` (one value a row)
    and `ledger.csv` (one entry a row), each with the run as first column; of what was served
    `serving.csv` (one row a method), `tokens.csv` and `serving-ledger.csv`.
    """
    for name in formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    runs = read_all(folders)
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise InputError("export", out, "a folder")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    if "csv" in formats:
        for name, rows in tables(runs).items():
            written.append(_csv(out / f"{name}.csv", rows))
    if {"png", "svg"} & set(formats):
        written += _charts(runs, out, formats)
    return written


def tables(runs: Sequence[RunData]) -> dict[str, list[dict[str, Any]]]:
    """The tidy tables by name: each variable a column, each observation a row."""
    measures = account.qualities(runs)
    devices = [
        {"run": run.title, "metric": measures[0].metric, **dataclasses.asdict(device)}
        for run in runs
        for device in (account.devices(run, measures[0]) if measures else [])
    ]
    made = {
        "closing": [dataclasses.asdict(row) for row in account.closing_table(runs)],
        "devices": devices,
        "metrics": [row for run in runs for row in _labelled(run.title, run.method, run.metrics)],
        "ledger": [row for run in runs for row in _labelled(run.title, run.method, run.ledger)],
    }
    shown = served(runs)
    if shown:
        made["serving"] = [dataclasses.asdict(row) for row in serving.closing_table(shown)]
        made["tokens"] = [row for one in shown for row in _tokens(one)]
        made["serving-ledger"] = [
            row for one in shown for row in _labelled(one.title, one.method, one.ledger)
        ]
    return made


def _labelled(title: str, method: str, table: Table) -> Iterable[dict[str, Any]]:
    for row in table.rows():
        yield {"run": title, "method": method, **dict(zip(table.columns, row, strict=True))}


def _tokens(one: serving.Served) -> Iterable[dict[str, Any]]:
    for number, answer in enumerate(one.answers):
        for place, token in enumerate(answer.tokens):
            cells = {"answer": number, "owner": answer.owner, "place": place, **token._asdict()}
            yield {"run": one.title, "method": one.method, **cells}


def _csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if rows:
            writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
    return path


def _charts(runs: Sequence[RunData], out: Path, formats: Sequence[str]) -> list[Path]:
    need("altair", "report")
    convert = need("vl_convert", "report")
    from isthmus.report import figures, race, theme

    written = []
    config = {**theme.resolve(theme.CONFIG, "light"), "background": theme.TOKENS["paper"][0]}
    for name, chart in {**figures.every(runs), **race.charts(served(runs))}.items():
        spec = theme.resolve({**chart.to_dict(validate=False), "width": _WIDTH}, "light")
        svg = convert.vegalite_to_svg(spec, config=config)
        if "svg" in formats:
            (out / f"{name}.svg").write_text(svg, encoding="utf-8")
            written.append(out / f"{name}.svg")
        if "png" in formats:
            (out / f"{name}.png").write_bytes(convert.svg_to_png(svg, scale=2))
            written.append(out / f"{name}.png")
    return written
