"""Your own task: from a plain module and two data sets, from a file, or by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from isthmus import catalogue, seeds
from isthmus.errors import InputError, unknown
from isthmus.tasks import losses, metrics
from isthmus.tasks.contract import PLAIN_ROLES, Card, Metric, Role, Size, Stage, Task
from isthmus.tasks.items import Batch, Items, Splits, weighted_mean

__all__ = ["OwnTask", "Task", "find", "of"]

Model = nn.Module | Callable[..., nn.Module]
LossPerItem = Callable[[Tensor, Any], Tensor]

LOSSES: dict[str, LossPerItem] = {
    "cross-entropy": losses.cross_entropy,
    "squared-error": losses.squared_error,
}
METRICS: dict[str, Callable[[str], Metric]] = {
    "accuracy": metrics.Accuracy,
    "perplexity": metrics.Perplexity,
    "regression": metrics.Regression,
}
_USUAL = {"cross-entropy": "accuracy", "squared-error": "regression"}


class OwnTask(Task):
    """What `of` makes; its arguments are those of `of`, resolved."""

    def __init__(
        self,
        name: str,
        model: Model,
        splits: tuple[Items, Items | None, Items],
        targets: tuple[str, ...],
        loss: LossPerItem,
        metric: Metric,
        stage: Mapping[str, Any],
    ) -> None:
        train, val, test = splits
        self.card = Card(name, problem=type(metric).__name__.lower(), source="your own data")
        self.input_names = tuple(name for name in train.columns if name not in targets)
        self.target_names = targets
        self.metric = metric
        self._model, self._loss, self._stage = model, loss, dict(stage)
        self._train, self._val, self._test = train, val, test

    def synthesise(self, seed: int = 0, size: Size = "small") -> Splits:
        """The given data; without validation items a tenth of the training items, by `seed`."""
        if self._val is not None:
            return Splits(self._train, self._val, self._test)
        order = seeds.rng(seed, "own", "val").permutation(len(self._train))
        held = max(1, len(order) // 10)
        train, val = np.sort(order[held:]), np.sort(order[:held])
        return Splits(self._train.take(train), self._train.take(val), self._test)

    def build(self, size: Size = "small", seed: int = 0) -> nn.Module:
        """A copy of the given module, or what the factory makes from `seed`.

        A factory without a `seed` argument runs under a global generator that is seeded and
        then put back.
        """
        if isinstance(self._model, nn.Module):
            return copy.deepcopy(self._model)
        if "seed" in inspect.signature(self._model).parameters:
            return self._model(seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.key(seed, "own", "init"))
            return self._model()

    def stages(self) -> list[Stage]:
        """One stage: the loss per entry, averaged with the weights of the batch."""
        return [Stage("train", self._objective, **self._stage)]

    def probe(self, size: Size = "small") -> dict[str, Tensor]:
        return self.inputs(self._train.take([0]).columns)

    def per_entry(self, outputs: Any, targets: Mapping[str, Tensor]) -> Tensor:
        """The loss of each entry; a single target goes to the loss function as a tensor."""
        only = targets[self.target_names[0]] if len(self.target_names) == 1 else targets
        return self._loss(outputs, only)

    def _objective(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = self.predict(model, self.inputs(batch.columns))
        values = self.per_entry(outputs, self.targets(batch.columns))
        target = batch.columns[self.target_names[0]]
        if values.shape != target.shape:
            return weighted_mean(values, batch.weight), {}
        counted = losses.counts(batch.weight, target)
        return weighted_mean(values.reshape(-1), counted.reshape(-1)), {}


def of(
    model: Model,
    train: Any,
    test: Any,
    *,
    val: Any = None,
    loss: str | LossPerItem = "cross-entropy",
    metric: str | Metric | None = None,
    owner: str | Sequence[Any] | None = None,
    roles: Sequence[tuple[str, Role]] = (),
    targets: Sequence[str] = ("y",),
    name: str = "own",
    optimiser: str = "sgd",
    lr: float = 0.1,
    batch_size: int = 32,
    epochs: int = 1,
) -> OwnTask:
    """A task from your own model and data.

    Args:
        model: a module (every run starts from its weights), or a function that makes one from
            `seed` (or from nothing).
        train: a tuple of tensors or arrays (the last is the target `y`), a `TensorDataset`, any
            map-style data set of tuples or dicts, a dict of tensors, or `Items`.
        test: like `train`.
        val: like `train`; without it, a tenth of `train` is held out by the run's seed.
        loss: `cross-entropy`, `squared-error`, or a function `(outputs, y) -> [b, ...]` with one
            value per item (several targets come as a dict).
        metric: `accuracy`, `perplexity`, `regression` or a `Metric`; by default the one that
            suits the loss.
        owner: who holds each training item: one label per item, or the name of a column (which
            is then no input).
        roles: (glob, role) pairs that go before those of a plain task.

    Raises `InputError` for data of another kind and for a loss that is not per item.

    >>> x, y = torch.randn(20, 4, generator=seeds.generator(0)), torch.arange(20) % 2
    >>> task = of(lambda: nn.Linear(4, 2), (x, y), (x, y), owner=["ann", "bob"] * 10)
    >>> [len(part) for part in task.partition(task.synthesise().train, 2, "natural")]
    [9, 9]
    """
    column = owner if isinstance(owner, str) else None
    labels = None if owner is None or column else [_label(o) for o in cast(Sequence[Any], owner)]
    parts = (
        _items(train, column, labels),
        None if val is None else _items(val, column),
        _items(test, column),
    )
    wanted = tuple(targets)
    for name_ in wanted:
        if name_ not in parts[0].columns:
            raise unknown("targets", name_, parts[0].columns)
    if isinstance(loss, str) and loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    per_item = LOSSES[loss] if isinstance(loss, str) else loss
    stage = {
        "roles": (*roles, *PLAIN_ROLES),
        "optimiser": optimiser,
        "lr": lr,
        "batch_size": batch_size,
        "epochs": epochs,
    }
    task = OwnTask(name, model, parts, wanted, per_item, metrics.Loss(per_item), stage)
    if metric is None and isinstance(loss, str):
        metric = _USUAL[loss]
    if isinstance(metric, str) and metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    task.metric = (
        METRICS[metric](wanted[0])
        if isinstance(metric, str)
        else metric or metrics.Loss(task.per_entry)
    )
    _check_loss(task, parts[0])
    return task


def find(text: str, **knobs: Any) -> Task:
    """The task of a catalogue name, of `path.py:name`, or of a `.npz` or `.csv` file.

    A user's own object is a `Task`, a class of tasks, or a function that returns one; `knobs`
    go to classes and functions. A path runs that file's code, so it is never guessed from a name.
    """
    if Path(text).suffix in (".npz", ".csv"):
        from isthmus.tasks import files

        return files.read(Path(text), **knobs)
    found = catalogue.find("task", text)
    task = found if isinstance(found, Task) or not callable(found) else found(**knobs)
    if not isinstance(task, Task):
        raise InputError("task", text, "a Task, a class of tasks or a function that returns one")
    return task


def _items(data: Any, owner: str | None, labels: list[str] | None = None) -> Items:
    if isinstance(data, Items):
        return Items(data.columns, labels or data.group, data.domain)
    columns = _columns(data)
    if owner is not None:
        if owner not in columns:
            raise unknown("owner", owner, columns)
        labels = [_label(o) for o in columns.pop(owner)]
    return Items(columns, labels)


def _columns(data: Any) -> dict[str, Tensor]:
    if isinstance(data, Mapping):
        return {name: torch.as_tensor(column) for name, column in data.items()}
    if isinstance(data, torch.utils.data.TensorDataset):
        data = data.tensors
    elif not isinstance(data, tuple) and hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        rows = [data[i] for i in range(len(data))]
        if rows and isinstance(rows[0], Mapping):
            return {name: _stack([row[name] for row in rows]) for name in rows[0]}
        if not rows or not isinstance(rows[0], tuple | list):
            raise InputError("data", type(data).__name__, "a data set of tuples or of dicts")
        data = tuple(_stack(column) for column in zip(*rows, strict=True))
    if not isinstance(data, tuple) or len(data) < 2:
        raise InputError("data", type(data).__name__, "(x, y), a dict of tensors, or a data set")
    names = ["x", *(f"x{i}" for i in range(1, len(data) - 1)), "y"]
    return {name: torch.as_tensor(c) for name, c in zip(names, data, strict=True)}


def _stack(values: Sequence[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(value) for value in values])


def _label(owner: Any) -> str:
    return str(owner.item() if isinstance(owner, Tensor | np.generic) else owner)


def _check_loss(task: OwnTask, items: Items) -> None:
    """Two sizes of batch tell whether the loss is per item: a reduced one would ignore weights."""
    model = task.build().eval()
    for count in (2, 3):
        columns = items.take([0] * count).columns
        with torch.no_grad():
            outputs = task.predict(model, task.inputs(columns))
            values = task.per_entry(outputs, task.targets(columns))
        if values.ndim == 0 or values.shape[0] != count:
            given = f"shape {list(values.shape)} for {count} items"
            raise InputError("loss", given, "one value per item (reduction='none')")
