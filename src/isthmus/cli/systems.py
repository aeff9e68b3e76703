"""`isthmus systems`: the catalogue, with every system's status."""

from __future__ import annotations

import json as codec
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from isthmus import catalogue
from isthmus.catalogue import System
from isthmus.errors import unknown

COLOURS = {
    "verified": "green",
    "miniature": "cyan",
    "reconstructed": "yellow",
    "not-reproduced": "red",
    "planned": "dim",
}


def command(
    all: bool = False,
    family: Annotated[str | None, arg(metavar="NAME")] = None,
    json: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> int:
    """Every system of the catalogue, with its status.

    Args:
        all: Also list baselines, and parts such as codecs and tasks.
        family: Only one of federation, llm, inference, compression, trust, workloads.
        json: Write {name, title, family, kind, status, paper} of each to this file; `-` prints.
    """
    if family is not None and family not in catalogue.FAMILIES:
        raise unknown("family", family, catalogue.FAMILIES)
    listing = [s for s in catalogue.systems(all=all) if family in (None, s.family)]
    if json is not None:
        text = codec.dumps([_row(system) for system in listing], indent=2, ensure_ascii=False)
        if str(json) == "-":
            print(text)
        else:
            json.write_text(text + "\n", encoding="utf-8")
            print(f"{len(listing)} entries written to {json}")
    elif sys.stdout.isatty():
        _table(listing)
    else:
        _lines(listing)
    return 0


def summary(listing: list[System]) -> str:
    """How many there are of each kind and status.

    >>> summary([System("a", "", "llm", "system", "", "", "planned")])
    '1 system: 1 planned'
    """
    kinds = Counter(system.kind for system in listing)
    statuses = Counter(system.status for system in listing)
    order = (*reversed(catalogue.STATUSES), "planned")
    head = ", ".join(f"{n} {kind}{'s' if n != 1 else ''}" for kind, n in kinds.items())
    return f"{head}: " + ", ".join(f"{statuses[s]} {s}" for s in order if statuses[s])


def _row(system: System) -> dict[str, str]:
    fields = ("name", "title", "family", "kind", "status", "paper")
    return {field: getattr(system, field) for field in fields}


def _lines(listing: list[System]) -> None:
    for system in listing:
        print(f"{system.name:<20} {system.family:<12} {system.status:<15} {system.title}")
    print(summary(listing))


def _table(listing: list[System]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for family in dict.fromkeys(system.family for system in listing):
        table = Table(title=family, title_justify="left", box=None, pad_edge=False, expand=True)
        table.add_column("name", no_wrap=True, style="bold")
        table.add_column("status", no_wrap=True)
        table.add_column("what it is", ratio=3)
        table.add_column("paper", ratio=2, style="dim")
        for system in (s for s in listing if s.family == family):
            colour = COLOURS[system.status]
            status = f"[{colour}]{system.status}[/{colour}]"
            table.add_row(system.name, status, system.title, system.paper)
        console.print(table)
        console.print()
    console.print(summary(listing))
