"""A run's folder: what it holds, and continuing one that was cut short."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import InputError
from isthmus.federated.round import Federation
from isthmus.run import checkpoint
from isthmus.run.config import Config
from isthmus.wire.ledger import Ledger

CONFIG, LEDGER, METRICS, CLIENTS = "config.yaml", "ledger.jsonl", "metrics.jsonl", "clients.bin"
ENVIRONMENT, PRIVACY = "environment.json", "privacy.json"


class Folder:
    """The files of one run; `path` must be new, empty, or a run to resume."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: Any = None

    @classmethod
    def new(cls, path: Path) -> Folder:
        """An empty folder, made if needed. Raises `InputError` when something is in it."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError("out", path, "a new or empty folder (--resume continues a run)")
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    def discard(self) -> None:
        """Take back a folder in which nothing has begun."""
        for name in (LEDGER, CLIENTS):
            (self.path / name).unlink(missing_ok=True)
        self.path.rmdir()

    def begin(self, config: Config, environment: Mapping[str, Any]) -> None:
        """Write the resolved configuration and what the run runs on."""
        checkpoint.replace_file(self.path / CONFIG, config.dump().encode())
        text = json.dumps(environment, indent=1) + "\n"
        checkpoint.replace_file(self.path / ENVIRONMENT, text.encode())
        self._metrics = open(self.path / METRICS, "ab")  # noqa: SIM115

    def config(self) -> Config:
        """The resolved configuration that the folder was begun with.

        What a kill left half-written beside its file is taken away.
        """
        for half in self.path.glob(f"*{checkpoint.BESIDE}"):
            half.unlink()
        if not (self.path / CONFIG).exists():
            raise InputError("run", self.path, f"a run folder with {CONFIG}")
        return Config.make(Config.read(self.path / CONFIG))

    def ledger(self) -> Ledger:
        """A new ledger in this folder."""
        return Ledger(self.path / LEDGER)

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Append rows of metrics, readable at once."""
        self._metrics.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._metrics.flush()

    def write_privacy(self, delta: float, spent: Mapping[str, float], round: int) -> None:
        """Write what the accountant composed: epsilon of each party at `delta`."""
        rows = [{"round": round, "party": party, "epsilon": cost} for party, cost in spent.items()]
        text = json.dumps({"delta": delta, "epsilon": rows}, indent=1) + "\n"
        checkpoint.replace_file(self.path / PRIVACY, text.encode())

    def save(self, fed: Federation) -> None:
        """Make everything so far survive, then write the checkpoint that says so."""
        fed.ledger.flush()
        _sync(self.path / LEDGER)
        os.fsync(self._metrics.fileno())
        if fed.store.path is not None and fed.store.worth_compacting:
            self._compact(fed)
        fed.store.sync()
        lengths = {
            LEDGER: fed.ledger.length(),
            METRICS: (self.path / METRICS).stat().st_size,
        }
        if fed.store.path is not None:
            lengths[fed.store.path.name] = fed.store.length
        checkpoint.write(self.path, fed, lengths)
        for old in self.path.glob("clients*.bin"):
            if old.name not in lengths:
                old.unlink()

    def _compact(self, fed: Federation) -> None:
        """Rewrite the clients' states without the dead rows; the checkpoint makes it count."""
        fresh = self.path / f"clients-{fed.round}.bin"
        fresh.unlink(missing_ok=True)
        old = fed.store
        fed.store = old.compacted(fresh)
        old.close()

    def again(self) -> bool:
        """Empty a folder that was left before its first checkpoint; False when it has one."""
        if (self.path / checkpoint.NAME).exists():
            return False
        for path in (self.path / LEDGER, self.path / METRICS, *self.path.glob("clients*.bin")):
            path.unlink(missing_ok=True)
        self._metrics = open(self.path / METRICS, "ab")  # noqa: SIM115
        return True

    def resume(self) -> tuple[dict[str, Any], Any, Ledger, Path]:
        """Cut every file to the checkpoint's length: what it says, its tensors, ledger, store."""
        about, tensors = checkpoint.read(self.path)
        lengths: dict[str, int] = about["lengths"]
        for name, length in lengths.items():
            path = self.path / name
            size = path.stat().st_size if path.exists() else 0
            if size < length:
                raise InputError("resume", f"{name} with {size} bytes", f"{length} bytes or more")
            if name != LEDGER:
                os.truncate(path, length)
        stores = [name for name in lengths if name.startswith("clients")]
        ledger = Ledger.resume(self.path / LEDGER, lengths[LEDGER])
        self._metrics = open(self.path / METRICS, "ab")  # noqa: SIM115
        return about, tensors, ledger, self.path / (stores[0] if stores else CLIENTS)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
