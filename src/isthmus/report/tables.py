"""The files of a run as plain values and columns, readable while they are being written.

A table is lines of JSON. A line that is cut off at the end of a file is a line being written:
it is left out, and the caller is told. A line that is broken anywhere else is an error that
names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from isthmus.errors import InputError

Way = Literal["up", "down", "across", "local"]

LEDGER: Mapping[str, type] = {
    "id": int, "t": float, "what": str, "from": str, "to": str, "kind": str, "round": int,
    "bytes": int, "values": int, "seconds": float, "joules": float, "money": float,
    "flops": float, "session": str, "sequence": int, "note": str, "source": str,
}  # fmt: skip

_ABSENT: dict[type, Any] = {int: 0, float: 0.0, str: ""}
_DTYPE: dict[type, Any] = {int: np.int64, float: np.float64, str: object}
_RANK = {"edge": 1, "server": 2, "cloud": 2}


def rank(party: str) -> int:
    """How far from the devices a party stands: 0 on a device, 1 at the edge, 2 behind it."""
    return _RANK.get(party.partition("/")[0], 0)


def way(sender: str, receiver: str) -> Way:
    """Where a crossing goes: up towards the servers, down, or across between equals.

    >>> [way("client/3", "server"), way("server", "client/3"), way("client/3", "client/4")]
    ['up', 'down', 'across']
    >>> way("client/3", "client/3")
    'local'
    """
    if sender == receiver:
        return "local"
    low, high = rank(sender), rank(receiver)
    return "up" if high > low else "down" if high < low else "across"


@dataclass(frozen=True)
class Table:
    """Columns of equal length: int64 (absent: 0; `round`: -1), float64 (0.0), words ('')."""

    columns: dict[str, np.ndarray]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], schema: Mapping[str, type]) -> Table:
        """Rows to columns; a field that is absent or null takes the empty value of its type."""
        columns = {}
        for name, kind in schema.items():
            absent = -1 if name == "round" else _ABSENT[kind]
            values = (row.get(name) for row in rows)
            cells = [absent if value is None else kind(value) for value in values]
            columns[name] = np.array(cells, dtype=_DTYPE[kind])
        return cls(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def where(self, mask: np.ndarray) -> Table:
        """The rows for which `mask` (bool `[n]`) holds."""
        return Table({name: column[mask] for name, column in self.columns.items()})

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The rows as tuples of plain Python values, in the order of the columns."""
        return zip(*(column.tolist() for column in self.columns.values()), strict=True)


def ledger(path: Path) -> tuple[Table, bool]:
    """A ledger with the columns of `LEDGER` and `way`, and whether its last line was cut off."""
    table, cut = columns(path, lambda row: [row], LEDGER)
    ways = [way(a, b) for a, b in zip(table["from"], table["to"], strict=True)]
    table.columns["way"] = np.array(ways, dtype=object)
    return table, cut


def columns(
    path: Path,
    rows_of: Callable[[dict[str, Any]], list[dict[str, Any]]],
    schema: Mapping[str, type],
) -> tuple[Table, bool]:
    """The table of a file of JSON lines, and whether its last line was cut off."""
    found, cut = lines(path)
    rows = [row for line in found for row in rows_of(line)]
    try:
        return Table.of(rows, schema), cut
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(str(path), first_line(error), "numbers where numbers belong") from error


def lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a file of JSON lines (none: no file), and whether the last was cut off."""
    found: list[dict[str, Any]] = []
    texts = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(texts, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(texts):
                return found, True
            raise InputError(f"{path} line {number}", first_line(error), "JSON") from error
        if not isinstance(value, dict):
            raise InputError(f"{path} line {number}", type(value).__name__, "a JSON object")
        found.append(cast(dict[str, Any], value))
    return found, False


def whole(path: Path) -> dict[str, Any] | None:
    """The one JSON object of a file; None where there is no file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(path), first_line(error), "one JSON object") from error
    if not isinstance(value, dict):
        raise InputError(str(path), type(value).__name__, "one JSON object")
    return cast(dict[str, Any], value)


def first_line(error: Exception) -> str:
    """The first line of what went wrong."""
    return str(error).partition("\n")[0]
