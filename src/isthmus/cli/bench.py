"""`isthmus bench`: measured figures, each beside the goal it is held to."""

from __future__ import annotations

import importlib
import json as codec
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from isthmus import bench
from isthmus.errors import unknown

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
        names: Which tables: wire, federated, ...
        json: Write {name, value, unit, goal, holds} of each to this file; `-` prints.
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
        text = codec.dumps([figure._asdict() for figure in found], indent=2)
        if str(json) == "-":
            print(text)
            return 0
        json.write_text(text + "\n", encoding="utf-8")
    for figure in found:
        print(line(figure))
    return 0


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
