"""`isthmus report`: one page about finished or running runs, and files for papers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from isthmus import report


def command(
    runs: Positional[list[Path]],
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
    title: str | None = None,
    export: Annotated[Path | None, arg(metavar="DIR")] = None,
    formats: tuple[str, ...] = ("png", "svg", "csv"),
) -> int:
    """Write one self-contained page about one or more runs.

    Args:
        runs: The run folders, side by side in the order given.
        out: The page; by default `report.html` in the run folder, or here for several runs.
        title: The heading of the page; by default the names of the runs.
        export: Also write every chart as a file, and all numbers as tidy CSV, into this folder.
        formats: What to export: png, svg, csv.
    """
    from rich.console import Console

    read = report.read_all(runs)
    if out is None:
        out = (runs[0] if len(runs) == 1 else Path()) / "report.html"
    report.terminal(read, Console(file=sys.stdout))
    print(report.write(runs, out, title))
    if export is not None:
        for path in report.export(runs, export, formats):
            print(path)
    return 0
