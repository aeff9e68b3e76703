"""A run folder as columns: read-only, and readable while the run is still writing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isthmus.errors import InputError
from isthmus.report import serving, tables
from isthmus.report.serving import Served
from isthmus.report.tables import Table, first_line

METRICS: Mapping[str, type] = {
    "round": int, "t": float, "scope": str, "split": str, "metric": str, "value": float,
}  # fmt: skip


@dataclass(frozen=True)
class RunData:
    """What one run folder says: names, settings, its two tables, and what serving came to.

    `ledger` has the columns of `tables.LEDGER` and `way`; `metrics` is tidy, one value a row,
    with the columns of `METRICS`. `privacy` is the accountant's result, if the run has one.
    A last line that is being written is left out, and the run is `unfinished`.
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
    serving: tuple[Served, ...]

    @classmethod
    def read(cls, folder: Path | str) -> RunData:
        """Read `folder`; InputError if it is not a run folder or one of its files is broken."""
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise InputError("run", folder, "a run folder (one that holds config.yaml)")
        text, config = _settings(folder / "config.yaml")
        metrics, metrics_cut = tables.columns(folder / "metrics.jsonl", _tidy, METRICS)
        ledger, ledger_cut = tables.ledger(folder / "ledger.jsonl")
        served = serving.read(folder)
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
            environment=tables.whole(folder / "environment.json") or {},
            privacy=tables.whole(folder / "privacy.json"),
            metrics=metrics,
            ledger=ledger,
            unfinished=metrics_cut or ledger_cut or any(each.unfinished for each in served),
            serving=served,
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


def served(runs: Sequence[RunData]) -> list[Served]:
    """What these runs have to show of serving, by titles that differ.

    A method goes by its name, and by its run's as well where several runs were served by it.
    """
    shown = [(run.title, each) for run in runs for each in run.serving if each.answers]
    names = Counter(each.method for _, each in shown)
    return [
        each if names[each.method] == 1 else replace(each, title=f"{each.method}, {title}")
        for title, each in shown
    ]


def _settings(path: Path) -> tuple[str, dict[str, Any]]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(str(path), first_line(error), "YAML of plain values") from error
    if config is not None and not isinstance(config, dict):
        raise InputError(str(path), type(config).__name__, "a mapping of settings")
    return text, config or {}


def _method(config: Mapping[str, Any]) -> str:
    """The method's name, written either as a word or as a mapping with `name`."""
    method = config.get("method")
    if isinstance(method, dict):
        method = method.get("name")
    return method if isinstance(method, str) else ""


def _tidy(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One line of metrics -> one row for each metric on it."""
    place = {name: row.get(name) for name in ("round", "t", "scope", "split")}
    return [
        {**place, "metric": name, "value": math.nan if value is None else value}
        for name, value in row.items()
        if name not in place and (value is None or isinstance(value, int | float))
    ]
