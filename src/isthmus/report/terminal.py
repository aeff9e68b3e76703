"""The closing table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from isthmus.report import units
from isthmus.report.account import Row, closing_table, sources
from isthmus.report.read import RunData

if TYPE_CHECKING:
    from rich.console import Console


def terminal(runs: Sequence[RunData], console: Console) -> None:
    """Print the closing table: a table on a terminal, one plain line a run elsewhere."""
    rows = closing_table(runs)
    if not console.is_terminal:
        for row in rows:
            console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column("run", overflow="fold")
    measure = rows[0].metric.replace("_", " ") if rows else ""
    energy = ", ".join(sources(runs))
    across = any(row.bytes_across for row in rows)
    heads = [measure, "worst device", "up", "down", *(["across"] if across else []), "virtual time"]
    for head in [*heads, f"energy ({energy})" if energy else "energy"]:
        table.add_column(head, justify="right")
    for row in rows:
        cells = [_printable(row.run), _change(row), _worst(row), *_bytes(row, across)]
        cells += [
            units.seconds_text(row.seconds),
            units.joules_text(row.joules) if row.joules else "–",
        ]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def _line(row: Row) -> str:
    """One run as one line of words."""
    energy = (
        f"{units.joules_text(row.joules)} {row.joules_source}"
        if row.joules
        else "energy not recorded"
    )
    across = f", {units.bytes_text(row.bytes_across)} across" if row.bytes_across else ""
    return (
        f"{_printable(row.run)}: {row.metric.replace('_', ' ')} {_change(row)}, "
        f"worst {_worst(row)}, "
        f"{units.bytes_text(row.bytes_up)} up, {units.bytes_text(row.bytes_down)} down{across}, "
        f"{units.seconds_text(row.seconds)} virtual, {energy}"
    )


def _change(row: Row) -> str:
    return f"{units.number(row.before)} -> {units.number(row.after)}"


def _worst(row: Row) -> str:
    return f"{units.number(row.worst)} {_printable(row.worst_device)}".strip()


def _bytes(row: Row, across: bool) -> list[str]:
    counts = [row.bytes_up, row.bytes_down, *([row.bytes_across] if across else [])]
    return [units.bytes_text(count) for count in counts]


def _printable(text: str) -> str:
    """Text from a file, without the characters that would steer a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
