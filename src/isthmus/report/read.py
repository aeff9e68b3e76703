"""A run folder as columns: read-only, and readable while the run is still writing.

The two tables of a run are lines of JSON. A line that is cut off at the end of a file is
a line being written: it is left out and the run is marked `unfinished`. A line that is
broken anywhere else is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
METRICS: Mapping[str, type] = {
    "round": int, "t": float, "scope": str, "split": str, "metric": str, "value": float,
}  # fmt: skip

_ABSENT: dict[type, Any] = {int: 0, float: 0.0, str: ""}
_DTYPE: dict[type, Any] = {int: np.int64, float: np.float64, str: object}
_RANK = {"edge": 1, "server": 2, "cloud": 2}


def way(sender: str, receiver: str) -> Way:
    """Where a crossing goes: up towards the servers, down, or across between equals.

    >>> [way("client/3", "server"), way("server", "client/3"), way("client/3", "client/4")]
    ['up', 'down', 'across']
    >>> way("client/3", "client/3")
    'local'
    """
    if sender == receiver:
        return "local"
    low, high = (_RANK.get(party.partition("/")[0], 0) for party in (sender, receiver))
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


@dataclass(frozen=True)
class RunData:
    """What one run folder says: names, settings, and its two tables.

    `ledger` has the columns of `LEDGER` and `way`; `metrics` is tidy, one value a row, with
    the columns of `METRICS`. `privacy` is the accountant's result, if the run has one.
    """

    folder: Path
    name: str
    method: str
    title: str
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    privacy: dict[str, Any] | None
    metrics: Table
    ledger: Table
    unfinished: bool

    @classmethod
    def read(cls, folder: Path | str) -> RunData:
        """Read `folder`; InputError if it is not a run folder or one of its files is broken."""
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise InputError("run", folder, "a run folder (one that holds config.yaml)")
        text, config = _settings(folder / "config.yaml")
        metrics, metrics_cut = _lines(folder / "metrics.jsonl", _tidy, METRICS)
        ledger, ledger_cut = _lines(folder / "ledger.jsonl", lambda row: [row], LEDGER)
        ways = [way(a, b) for a, b in zip(ledger["from"], ledger["to"], strict=True)]
        ledger.columns["way"] = np.array(ways, dtype=object)
        name = folder.resolve().name
        method = _method(config)
        title = config.get("title")
        title = " ".join(title.split()) if isinstance(title, str) else ""
        return cls(
            folder=folder,
            name=name,
            method=method,
            title=title or method or name,
            config=config,
            config_text=text,
            environment=_object(folder / "environment.json") or {},
            privacy=_object(folder / "privacy.json"),
            metrics=metrics,
            ledger=ledger,
            unfinished=metrics_cut or ledger_cut,
        )


def read_all(folders: Sequence[Path | str]) -> list[RunData]:
    """Read several runs and make their titles distinct, so that a title names one run."""
    if not folders:
        raise InputError("runs", "none", "one or more run folders")
    runs = [RunData.read(folder) for folder in folders]
    shared = Counter(run.title for run in runs)
    taken: set[str] = set()
    for index, run in enumerate(runs):
        base = title = run.title if shared[run.title] == 1 else f"{run.title} ({run.name})"
        number = 1
        while title in taken:
            number += 1
            title = f"{base} {number}"
        taken.add(title)
        runs[index] = replace(run, title=title)
    return runs


def _settings(path: Path) -> tuple[str, dict[str, Any]]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(str(path), _first_line(error), "YAML of plain values") from error
    if config is not None and not isinstance(config, dict):
        raise InputError(str(path), type(config).__name__, "a mapping of settings")
    return text, config or {}


def _method(config: Mapping[str, Any]) -> str:
    """The method's name, written either as a word or as a mapping with `name`."""
    method = config.get("method")
    if isinstance(method, dict):
        method = method.get("name")
    return method if isinstance(method, str) else ""


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(path), _first_line(error), "one JSON object") from error
    if not isinstance(value, dict):
        raise InputError(str(path), type(value).__name__, "one JSON object")
    return cast(dict[str, Any], value)


def _lines(
    path: Path,
    rows_of: Callable[[dict[str, Any]], list[dict[str, Any]]],
    schema: Mapping[str, type],
) -> tuple[Table, bool]:
    """The table of a file of JSON lines, and whether its last line was cut off."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    rows: list[dict[str, Any]] = []
    cut = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                cut = True
                break
            raise InputError(f"{path} line {number}", _first_line(error), "JSON") from error
        if not isinstance(value, dict):
            raise InputError(f"{path} line {number}", type(value).__name__, "a JSON object")
        rows.extend(rows_of(value))
    try:
        return Table.of(rows, schema), cut
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(str(path), _first_line(error), "numbers where numbers belong") from error


def _tidy(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One line of metrics -> one row for each metric on it."""
    place = {name: row.get(name) for name in ("round", "t", "scope", "split")}
    return [
        {**place, "metric": name, "value": math.nan if value is None else value}
        for name, value in row.items()
        if name not in place and (value is None or isinstance(value, int | float))
    ]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
