"""What goes on, while it goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any, Self


class Bar:
    """A bar of `total` steps (None: unknown) with a title before it and a line behind it."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total = title, total
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[line]}", style="dim"),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, line="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, line: str, plain: str) -> None:
        """`done` steps and a line on the bar; without a bar print `plain`, if there is anything."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, line=line)
        elif plain:
            print(plain, flush=True)
