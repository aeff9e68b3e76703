"""Training in Python: `isthmus.train(task="digits", method="fedavg", clients=100) -> Run`."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from isthmus.errors import InputError
from isthmus.federated.round import Federation, Report
from isthmus.federated.score import model_of, personal, recalibrated, score
from isthmus.models.bind import write
from isthmus.run import checkpoint, saved
from isthmus.run.build import Built, build, environment
from isthmus.run.config import Config
from isthmus.run.folder import CLIENTS, METRICS, Folder
from isthmus.tasks.contract import Task
from isthmus.wire.ledger import Ledger

Watch = Callable[[Report, list[dict[str, Any]]], None]
"""Called after every round with its report and the metrics that were scored."""

TUNE: dict[str, Any] = {
    "task": "text",
    "method": "fedmomentum",
    "clients": 8,
    "rounds": 5,
    "steps": 10,
    "batch": 4,
    "lr": 1e-2,
    "evaluate": 1,
}
"""Where `tune` differs from `train`."""


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Run:
    """A finished run: its metrics, its ledger, its model, and where it lies on disk."""

    config: Config
    folder: Path | None
    metrics: list[dict[str, Any]]
    ledger: Ledger
    epsilon: dict[str, float]
    model: nn.Module
    task: Task

    @property
    def final(self) -> dict[str, float]:
        """The last global scores on the test items."""
        rows = [row for row in self.metrics if row["scope"] == "global"]
        return {k: v for k, v in rows[-1].items() if k not in ("round", "t", "scope", "split")}

    @property
    def accuracy(self) -> float:
        """Test accuracy at the end."""
        return self.final["accuracy"]

    @property
    def bytes_up(self) -> int:
        """Bytes that clients really sent."""
        return int(self.ledger.total("bytes", direction="up"))

    @property
    def bytes_down(self) -> int:
        """Bytes that were really sent to clients."""
        return int(self.ledger.total("bytes", direction="down"))

    @property
    def seconds(self) -> float:
        """Virtual seconds from the first to the last round."""
        return self.metrics[-1]["t"] if self.metrics else 0.0

    def __str__(self) -> str:
        primary = self.task.metric.primary
        value = self.final[primary]
        private = ""
        if self.epsilon:
            worst = max(self.epsilon.values())
            private = f", epsilon {worst:.3g} at delta {self.config.delta:g}"
        return (
            f"{self.config.method} on {self.config.task}: {primary} {value:.4g} after "
            f"{self.config.rounds} rounds, {self.bytes_up:,} bytes up, {self.bytes_down:,} down, "
            f"{self.seconds:.4g} virtual seconds{private}"
        )


def train(
    task: str | Task = "digits",
    method: str = "fedavg",
    *,
    out: Path | str | None = None,
    watch: Watch | None = None,
    **keys: Any,
) -> Run:
    """Train over many clients; `keys` are those of `Config` (clients, rounds, codec, ...).

    `task` is a name or a `Task` of your own; `out` a new folder that keeps everything, also
    what `resume` needs. Raises `InputError` with one line for any bad value.
    """
    own = task if isinstance(task, Task) else None
    name = task.card.name if isinstance(task, Task) else task
    config = Config.make({"task": name, "method": method, **keys})
    return start(config, Path(out) if out is not None else None, watch, own)


def tune(model: str = "embedded", method: str = "fedmomentum", **keys: Any) -> Run:
    """Tune a language model's adapter over many clients: `train` with the defaults `TUNE`."""
    given = {**TUNE, **keys, "model": model, "method": method}
    return train(given.pop("task"), given.pop("method"), **given)


def start(
    config: Config,
    out: Path | None = None,
    watch: Watch | None = None,
    task: Task | None = None,
    command: Sequence[str] = (),
) -> Run:
    """Run a configuration from the beginning; `command` is what the report says started it."""
    if out is None:
        built = build(config, Ledger(), task=task)
        return _play(built, None, watch, [])
    folder = Folder.new(out)
    ledger = folder.ledger()
    try:
        built = build(config, ledger, out / CLIENTS, task)
    except InputError:
        ledger.close()
        folder.discard()
        raise
    folder.begin(built.config, environment(command))
    return _play(built, folder, watch, [])


def resume(out: Path | str, watch: Watch | None = None, task: Task | None = None) -> Run:
    """Continue the run in `out` where its last checkpoint stands."""
    out = Path(out)
    folder = Folder(out)
    config = folder.config()
    with ExitStack() as undo:  # what was opened is closed where the rest does not fit
        undo.callback(folder.close)
        if folder.again():
            about, tensors, ledger, store = None, {}, folder.ledger(), out / CLIENTS
        else:
            about, tensors, ledger, store = folder.resume()
        undo.callback(ledger.close)
        built = build(config, ledger, store, task)
        undo.callback(built.federation.store.close)
        if about is not None:
            checkpoint.restore(built.federation, about, tensors)
        undo.pop_all()
    with open(folder.path / METRICS) as file:
        rows = [json.loads(line) for line in file]
    return _play(built, folder, watch, rows)


def _play(
    built: Built, folder: Folder | None, watch: Watch | None, rows: list[dict[str, Any]]
) -> Run:
    """Play the rounds that are left; a full disk is one line that says how to go on."""
    try:
        return _rounds(built, folder, watch, rows)
    except OSError as error:
        if folder is None or error.errno not in _FULL:
            raise
        allowed = "a disk with room; the run can be resumed from its last checkpoint"
        raise InputError("out", f"{folder.path}: {error.strerror}", allowed) from error
    finally:
        if folder is not None:
            folder.close()
            built.federation.store.close()
            with suppress(OSError):  # what could not be written has been said above
                built.federation.ledger.close()


def _rounds(
    built: Built, folder: Folder | None, watch: Watch | None, rows: list[dict[str, Any]]
) -> Run:
    config, fed = built.config, built.federation

    def scored() -> list[dict[str, Any]]:
        items, tests = built.clients.scored, built.clients.tests
        new = list(score(fed, built.task, items, tests, config.split, config.score))
        rows.extend(new)
        if folder is not None:
            folder.write_metrics(new)
        return new

    if fed.round == 0 and not rows:
        begun = scored()
        if folder is not None:
            folder.save(fed)
        if watch is not None:
            watch(Report(0, fed.now, float("nan"), {}, [], [], {}), begun)
    while fed.round < config.rounds:
        report = fed.step()
        last = fed.round == config.rounds
        due = bool(config.evaluate) and fed.round % config.evaluate == 0
        new = scored() if due or last else []
        if folder is not None and (
            last or (config.checkpoint and fed.round % config.checkpoint == 0)
        ):
            folder.save(fed)
        if watch is not None:
            watch(report, new)
    fed.ledger.flush()
    spent = _spent(fed, config)
    model = finished(fed, built.task)
    if folder is not None:
        if spent:
            folder.write_privacy(config.delta, spent, fed.round)
        saved.save(folder.path, built, model)
    return Run(
        config,
        folder.path if folder is not None else None,
        rows,
        fed.ledger,
        spent,
        model,
        built.task,
    )


def _spent(fed: Federation, config: Config) -> dict[str, float]:
    """Epsilon of every party that noised something, composed by the accountant."""
    if config.privacy == "none":
        return {}
    from isthmus.privacy.accountant import spent

    costs = spent(fed.ledger.rows(), config.delta)
    return {party: cost for (party, _, _), cost in costs.items()}


def finished(fed: Federation, task: Task) -> nn.Module:
    """The module with the server's tensors written into it, ready to predict."""
    shared = {**fed.method.base(fed.state), **fed.method.served(fed.state)}
    if not personal(fed):
        everyone = range(len(fed.ground.owned))
        tensors = recalibrated(fed, task, model_of(fed, {}), everyone)
        shared |= {name: tensors[name] for name in fed.method.names.recalibrate}
    return write(fed.ground.module, shared).eval()


def load(folder: Path | str, task: Task | None = None) -> nn.Module:
    """The model of a finished run, ready to predict; `task` as it was given to `train`, if so."""
    return saved.load(Path(folder), task=task)
