"""Reports of runs: one page that opens offline, files for papers, a table for the terminal.

Reading, sums and the terminal's table need nothing beyond the core; page and charts need the
extra `report`, asked for when they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isthmus.report.account import Row, closing_table
from isthmus.report.read import RunData, read_all
from isthmus.report.terminal import terminal, terminal_serving

__all__ = [
    "Row",
    "RunData",
    "closing_table",
    "export",
    "read_all",
    "terminal",
    "terminal_serving",
    "write",
]


def write(folders: Sequence[Path | str], out: Path | str, title: str | None = None) -> Path:
    """Write one self-contained page about the runs in `folders` to `out`; return its path.

    InputError for a folder that is not a run; MissingExtra without the extra `report`.
    """
    from isthmus.report import page

    return page.write(folders, out, title)


def export(
    folders: Sequence[Path | str],
    out_dir: Path | str,
    formats: Sequence[str] = ("png", "svg", "csv"),
) -> list[Path]:
    """Write the charts as files and the numbers as tidy CSV into `out_dir`; return the paths.

    InputError for a folder that is not a run or an unknown format; MissingExtra without the
    extra `report` where a chart is asked for.
    """
    from isthmus.report.files import export

    return export(folders, out_dir, formats)
