"""The closing tables on a terminal: of training, and of serving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from isthmus.report import serving, units
from isthmus.report.account import Row, closing_table, sources
from isthmus.report.read import RunData, served

if TYPE_CHECKING:
    from rich.console import Console


def terminal(runs: Sequence[RunData], console: Console) -> None:
    """Print the closing tables: tables on a terminal, one plain line a run or method elsewhere."""
    rows = closing_table(runs)
    measure = rows[0].metric.replace("_", " ") if rows else ""
    energy = ", ".join(sources(runs))
    across = any(row.bytes_across for row in rows)
    heads = ["run", measure, "worst device", "up", "down", *(["across"] if across else [])]
    heads += ["virtual time", f"energy ({energy})" if energy else "energy"]
    cells = [
        [
            _printable(row.run), _change(row), _worst(row), *_bytes(row, across),
            units.seconds_text(row.seconds), units.joules_text(row.joules) if row.joules else "–",
        ]
        for row in rows
    ]  # fmt: skip
    _print(console, heads, cells, [_line(row) for row in rows])
    terminal_serving(runs, console)


def terminal_serving(runs: Sequence[RunData], console: Console) -> None:
    """Print the closing table of serving, if these runs were served."""
    rows = serving.closing_table(served(runs))
    if not rows:
        return
    energy = ", ".join(sorted({row.joules_source for row in rows if row.joules_source}))
    heads = ["method", "tokens/s", "up", "down", "accepted", "calls", "energy", "law kept"]
    note = (
        f"A token's bytes, calls of the target, energy of the device{f' ({energy})' * bool(energy)}"
        "; whether the texts keep the target's law."
    )
    cells = [
        [
            _printable(row.title), units.number(row.per_second), units.bytes_text(row.bytes_up),
            units.bytes_text(row.bytes_down), _accepted(row), f"{row.target_calls:.2f}",
            units.joules_text(row.joules), "yes" if row.lossless else "no",
        ]
        for row in rows
    ]  # fmt: skip
    _print(console, heads, cells, [_served_line(row) for row in rows], note)


def _print(
    console: Console,
    heads: Sequence[str],
    cells: Sequence[Sequence[str]],
    lines: Sequence[str],
    note: str = "",
) -> None:
    """A table on a terminal, with a note below it; the same rows as lines elsewhere."""
    if not console.is_terminal:
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim")
    table.add_column(heads[0], overflow="fold")
    for head in heads[1:]:
        table.add_column(head, justify="right")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    if note:
        console.print(note, style="dim")


def _served_line(row: serving.Row) -> str:
    """One method as one line of words."""
    accepted = f"{_accepted(row)} accepted, " if row.judged else ""
    return (
        f"{_printable(row.title)}: {units.number(row.per_second)} tokens/s; a token: "
        f"{units.bytes_text(row.bytes_up)} up, {units.bytes_text(row.bytes_down)} down, "
        f"{row.target_calls:.2f} target calls, {units.joules_text(row.joules)} "
        f"{row.joules_source}".rstrip()
        + f"; {accepted}the target's law {'kept' if row.lossless else 'not kept'}"
    )


def _accepted(row: serving.Row) -> str:
    return "–" if row.acceptance is None else f"{row.acceptance:.0%}"


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
