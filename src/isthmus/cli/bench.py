"""`isthmus bench`: measured figures, each beside the goal it is held to."""

from __future__ import annotations

import importlib
import json as codec
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from isthmus import bench
from isthmus.errors import unknown
from isthmus.report import units

if TYPE_CHECKING:
    from isthmus.bench.figure import Figure


def tables() -> list[str]:
    """The tables that exist: modules of `isthmus.bench` that have `figures`."""
    folder = Path(next(iter(bench.__path__)))
    return sorted(
        path.stem for path in folder.glob("*.py") if "\ndef figures(" in path.read_text("utf-8")
    )


def command(
    names: Annotated[Positional[tuple[str, ...]], arg(metavar="TABLE ...")] = (),
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None,
) -> int:
    """Measure; all tables without names. Figures are ratios within one run where they can be.

    Args:
        names: Which tables: decode, directions, executors, federated, flower, rivals, wire.
        json: Write {name, value, unit, goal, holds, note} of each to this file; `-` prints.
        threads: Threads of arithmetic, for what does not set its own.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    found: list[Figure] = []
    for name in names or tables():
        if name not in tables():
            raise unknown("table", name, tables())
        if str(json) != "-":
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
        found += importlib.import_module(f"isthmus.bench.{name}").figures()
    if json is not None:
        text = codec.dumps([_row(figure) for figure in found], indent=2)
        if str(json) == "-":
            print(text)
            return 0
        json.write_text(text + "\n", encoding="utf-8")
    _show([figure for figure in found if figure.cell])
    for figure in found:
        if figure.goal is not None or not figure.cell:
            print(line(figure))
    return 0


def _row(figure: Figure) -> dict[str, Any]:
    """A figure as JSON, which has no infinity."""
    row = figure._asdict()
    del row["cell"]
    return {**row, "value": figure.value if math.isfinite(figure.value) else None}


def _show(found: Sequence[Figure]) -> None:
    """Figures that have a cell, as tables; a mark in a cell stands for a note below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    for title in dict.fromkeys(figure.cell[0] for figure in found if figure.cell):
        cells = {f.cell[1:]: f for f in found if f.cell and f.cell[0] == title}
        marks, columns = _marks(cells.values()), dict.fromkeys(column for _, column in cells)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for column in columns:
            unit = next(f.unit for (_, at), f in cells.items() if at == column)
            table.add_column(f"{column}\n{unit}", justify="right")
        for row in dict.fromkeys(row for row, _ in cells):
            table.add_row(row, *(_cell(cells.get((row, column)), marks) for column in columns))
        console.print(title, style="bold", soft_wrap=True)
        console.print(table)
        if marks:
            notes = "   ".join(f"{mark} {note}" for note, mark in marks.items())
            console.print(notes + "\n", soft_wrap=True)


def _marks(figures: Iterable[Figure]) -> dict[str, str]:
    """A mark for each note."""
    notes = dict.fromkeys(figure.note for figure in figures if figure.note)
    return dict(zip(notes, "*+#%@", strict=False))


def _cell(figure: Figure | None, marks: Mapping[str, str]) -> str:
    if figure is None:
        return ""
    value = units.number(figure.value) if math.isfinite(figure.value) else "–"
    return f"{value} {marks[figure.note]}" if figure.note in marks else value


def line(figure: Figure) -> str:
    """One figure in words.

    >>> from isthmus.bench.figure import Figure
    >>> line(Figure("copy", 1.25, "x", "at most 2 x", True))
    'copy: 1.25 x (at most 2 x: holds)'
    """
    verdict = ""
    if figure.goal is not None:
        verdict = f" ({figure.goal}: {'holds' if figure.holds else 'MISSED'})"
    digits = 3 if math.isfinite(figure.value) else 0
    return f"{figure.name}: {figure.value:.{digits}g} {figure.unit}{verdict}"
