"""What a task is: data with owners, a model, a loss by stages, a metric that adds up.

A task is all that training, serving, compression, attacks and reports know about a
workload. Three rules hold it together:

- *One loss for one client and for a thousand.* A loss sees a `Batch` and reduces with
  `weighted_mean`, so an item of weight 0 is padding, and the same code runs alone, under
  `torch.vmap` and compiled.
- *One inference entry.* Scoring, serving, calibration and export all call `Task.predict`,
  on a module or on a module bound to named tensors.
- *Statistics that add.* A metric's state is a dict of sums, because averages of the
  clients' F1 scores or perplexities are wrong; states of clients, batches and machines merge.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from isthmus import seeds
from isthmus.errors import InputError, unknown
from isthmus.tasks.items import Batch, Items, Splits, weighted_mean
from isthmus.tree import Tree

__all__ = [
    "Batch",
    "Card",
    "Compressible",
    "Cut",
    "Items",
    "Loss",
    "Metric",
    "Role",
    "Size",
    "Splits",
    "Stage",
    "Task",
    "data_file",
    "data_root",
    "roles",
    "weighted_mean",
]

Size = Literal["tiny", "small", "paper"]
Role = Literal["shared", "local", "frozen", "follow", "recalibrate"]
Loss = Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]

PLAIN_ROLES: tuple[tuple[str, Role], ...] = (
    ("*running_mean", "recalibrate"),
    ("*running_var", "recalibrate"),
    ("*num_batches_tracked", "recalibrate"),
    ("*", "shared"),
)
"""The roles of a plain task: everything is shared, except the running statistics of batch
normalisation. Those are recomputed from data before scoring: the mean of the clients'
variances is not the variance of their union, and a step mutates nothing."""


@dataclass(frozen=True)
class Stage:
    """One phase of a task's training: its loss, and the role of every tensor.

    `loss(model, batch) -> (scalar, aux)`, where `model` is a module or a module bound to named
    tensors and `aux` holds scalars to be logged. `roles` are (glob, role) pairs over the names of
    parameters and buffers, first match wins. `follow(tensors)` gives the new values of the
    tensors whose role is `follow`. The other fields are the stage's defaults for local training.
    """

    name: str
    loss: Loss
    roles: tuple[tuple[str, Role], ...] = PLAIN_ROLES
    optimiser: str = "sgd"
    lr: float = 0.1
    batch_size: int = 32
    epochs: int = 1
    follow: Callable[[Mapping[str, Tensor]], Tree] | None = None


def roles(stage: Stage, tensors: Mapping[str, Tensor]) -> dict[str, Role]:
    """The role of every name in `tensors` (parameters and buffers).

    A tensor of integers has no mean, so `shared` becomes `frozen` for it. Raises `InputError`
    for a name without a role, an unknown role, and a `follow` without its rule.

    >>> stage = Stage("train", lambda model, batch: ..., (("head.*", "local"), ("*", "shared")))
    >>> roles(stage, {"head.weight": torch.ones(1), "body.weight": torch.ones(1)})
    {'head.weight': 'local', 'body.weight': 'shared'}
    """
    for _, role in stage.roles:
        if role not in get_args(Role):
            raise unknown("role", role, get_args(Role))
    given: dict[str, Role] = {}
    for name, tensor in tensors.items():
        role: Role | None = next(
            (r for pattern, r in stage.roles if fnmatchcase(name, pattern)), None
        )
        if role is None:
            patterns = ", ".join(pattern for pattern, _ in stage.roles)
            raise InputError(f"role of {name}", "none", f"a pattern that matches, now {patterns}")
        if role == "follow" and stage.follow is None:
            raise InputError(f"role of {name}", "follow", "follow only in a stage with its rule")
        if role == "shared" and not (tensor.is_floating_point() or tensor.is_complex()):
            role = "frozen"
        given[name] = role
    return given


class Metric(ABC):
    """Additive sufficient statistics: `state` is a dict of float64 or int64 sums.

    `update` is pure and weighs every item; `merge(a, b)` equals one pass over both halves.
    """

    primary: str
    higher_is_better: bool

    @abstractmethod
    def init(self) -> Tree:
        """The state of no items: zeros."""

    @abstractmethod
    def update(
        self,
        state: Mapping[str, Tensor],
        outputs: Any,
        targets: Mapping[str, Tensor],
        weight: Tensor,
    ) -> Tree:
        """The state after a batch: what `predict` gave, the target columns, weight `[b]`."""

    def merge(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
        """The state of both."""
        return {name: value + b[name].to(value.device) for name, value in a.items()}

    @abstractmethod
    def finish(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """The named values of a state; nan where no item was counted."""


@dataclass(frozen=True)
class Card:
    """What a task is called, what kind of problem it is and where its data come from."""

    name: str
    kind: Literal["trainable", "test_time", "per_scene", "agentic"] = "trainable"
    problem: str = "classification"
    source: str = ""
    licence: str = ""
    sizes: tuple[str, ...] = ("tiny", "small", "paper")


@dataclass(frozen=True)
class Compressible:
    """Module names that may be stored in few bits, those that may not, and the tolerated drop
    of the primary metric (absolute) with 8-bit weights."""

    modules: tuple[str, ...]
    full_precision: tuple[str, ...] = ()
    drop: float = 0.02


class Cut(NamedTuple):
    """A legal cut: after module `name`, whose output per item has this shape."""

    name: str
    shape: tuple[int, ...]


class Task(ABC):
    """One workload: `card`, `metric`, data, model, stages and the one way to predict.

    `input_names` and `target_names` say which columns `predict` and the metric see.
    """

    card: Card
    metric: Metric
    input_names: tuple[str, ...] = ("x",)
    target_names: tuple[str, ...] = ("y",)

    @abstractmethod
    def synthesise(self, seed: int = 0, size: Size = "small") -> Splits:
        """The data without any download, a pure function of `seed` and `size`."""

    def load(self, root: str | Path | None = None) -> Splits:
        """The real data under `root` (or `$ISTHMUS_DATA`); items as `synthesise` gives them."""
        raise InputError("data", "real", f"synthetic: {self.card.name} has no other data")

    @abstractmethod
    def build(self, size: Size = "small", seed: int = 0) -> nn.Module:
        """A new model: the same bits for the same seed, and no other effect."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The phases of training, in order."""

    def inputs(self, columns: Mapping[str, Tensor]) -> Tree:
        """The columns that `predict` may see."""
        return {name: columns[name] for name in self.input_names}

    def targets(self, columns: Mapping[str, Tensor]) -> Tree:
        """The columns that the metric compares with."""
        return {name: columns[name] for name in self.target_names}

    def predict(self, model: Any, inputs: Mapping[str, Tensor], context: Any = None) -> Any:
        """The outputs `[b, ...]` for a batch of inputs; `model` as in `Stage.loss`."""
        return model(*(inputs[name] for name in self.input_names))

    def partition(
        self, items: Items, n: int, scheme: str = "iid", seed: int = 0, **options: float
    ) -> list[np.ndarray]:
        """The indices of each of n clients (int64, sorted); `tasks.partition` lists the schemes."""
        from isthmus.tasks import partition

        return partition.partition(
            n, scheme, seed, labels=self.labels(items), groups=items.group, **options
        )

    def labels(self, items: Items) -> np.ndarray | None:
        """One class per item, for partitions by label: the first target when it is one integer."""
        column = items.columns.get(self.target_names[0]) if self.target_names else None
        if column is None or column.ndim != 1 or column.is_floating_point():
            return None
        return column.cpu().numpy()

    def compressible(self, model: nn.Module) -> Compressible:
        """Which modules may be quantised: by default all linear, convolution and embedding ones."""
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
        return Compressible(tuple(n for n, m in model.named_modules() if isinstance(m, kinds)))

    def calibration(
        self, items: Items, batches: int = 4, batch_size: int = 32, seed: int = 0
    ) -> Iterator[Tree]:
        """Inputs for calibration: batches of items drawn without replacement."""
        order = torch.randperm(len(items), generator=seeds.generator(seed, "calibration"))
        for index in order[: batches * batch_size].split(batch_size):
            yield self.inputs(items.take(index).columns)

    def probe(self, size: Size = "small") -> Tree:
        """Example inputs (one item) for counting, profiling, export and warm-up."""
        return self.inputs(self.synthesise(0, size).train.take([0]).columns)

    def cut_points(self, size: Size = "small") -> list[Cut]:
        """Where the model may be cut between device and server.

        After each child of `features`, from the first that has parameters on: what lies before
        it is the raw input, which may not cross.
        """
        model = self.build(size, 0).eval()
        features = getattr(model, "features", None)
        if not isinstance(features, nn.Module):
            return []
        shapes: dict[str, tuple[int, ...]] = {}

        def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _module, _inputs, output: shapes.update({name: tuple(output.shape[1:])})

        watched: dict[str, nn.Module] = {}
        for name, module in features.named_children():
            if watched or any(True for _ in module.parameters()):
                watched[f"features.{name}"] = module
        handles = [m.register_forward_hook(watch(name)) for name, m in watched.items()]
        with torch.no_grad():
            self.predict(model, self.probe(size))
        for handle in handles:
            handle.remove()
        return [Cut(name, shape) for name, shape in shapes.items()]

    @staticmethod
    def of(model: Any, train: Any, test: Any, **options: Any) -> Task:
        """A task from your own module and data; `isthmus.tasks.own.of` lists the options."""
        from isthmus.tasks import own

        return own.of(model, train, test, **options)


def data_root(root: str | Path | None = None) -> Path:
    """The folder of the real data: `root`, or `$ISTHMUS_DATA`. Raises `InputError` without one."""
    given = root if root is not None else os.environ.get("ISTHMUS_DATA")
    if not given:
        raise InputError("data-dir", "nothing", "a folder, by --data-dir or $ISTHMUS_DATA")
    return Path(given)


def data_file(root: str | Path | None, relative: str) -> Path:
    """A real file; a missing one raises one `InputError` that names `relative`."""
    folder = data_root(root)
    path = folder / relative
    if not path.exists():
        raise InputError("data-dir", folder, f"a folder that holds {relative}")
    return path
