"""`isthmus check`: the promises that every method and task keeps, looked at on your own."""

from __future__ import annotations

import sys
from typing import Annotated

from tyro.conf import Positional, arg

from isthmus.run.conformance import Line, check


def command(name: Annotated[Positional[str], arg(metavar="PATH.py:NAME")]) -> int:
    """Run the contract tests on a method or a task of your own.

    A method is played for two rounds on a few digits, a task is looked at in its smallest size.
    The exit status is 0 when every promise is kept and 1 when one is not.

    Args:
        name: A Method, a Task or a function that returns one in your file; or a name of ours.
    """
    lines = check(name)
    if sys.stdout.isatty():
        _table(lines)
    else:
        for line in lines:
            print(f"{'ok    ' if line.ok else 'BROKEN'}  {line.name}: {line.detail}")
    broken = sum(not line.ok for line in lines)
    print(f"{name}: {len(lines) - broken} of {len(lines)} promises kept")
    return int(broken > 0)


def _table(lines: list[Line]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for line in lines:
        mark = "[green]ok[/]" if line.ok else "[red]broken[/]"
        table.add_row(mark, f"[bold]{escape(line.name)}[/]", escape(line.detail))
    Console(highlight=False).print(table)
