"""Metrics as sums: each state is a dict of float64 sums, so states of clients merge exactly.

`outputs` is a tensor (classification: logits `[b, ..., C]`; regression: values), `targets` the
task's target columns, `weight` `[b]` counts an item that many times and 0 not at all. With
axes after the first (tokens), integer targets equal to -100 are not counted. `update` is pure and
runs under `torch.vmap`; the sums live where the outputs live.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.tasks.contract import Metric
from isthmus.tasks.losses import counts, cross_entropy
from isthmus.tree import Tree


def _zeros(*names: str) -> Tree:
    return {name: torch.zeros((), dtype=torch.float64) for name in names}


def _plus(state: Mapping[str, Tensor], **sums: Tensor) -> Tree:
    return {name: state[name].to(value.device) + value for name, value in sums.items()}


def _ratio(top: Tensor, bottom: Tensor) -> float:
    return float(top / bottom) if float(bottom) > 0 else math.nan


class Accuracy(Metric):
    """Accuracy and mean cross-entropy: the sums `correct`, `loss` and `total`.

    >>> metric = Accuracy()
    >>> logits, y = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    >>> state = metric.update(metric.init(), logits, {"y": y}, torch.tensor([3.0, 1.0]))
    >>> metric.finish(state)["accuracy"]
    0.75
    """

    primary, higher_is_better = "accuracy", True

    def __init__(self, target: str = "y") -> None:
        self.target = target

    def init(self) -> Tree:
        return _zeros("correct", "loss", "total")

    def update(
        self,
        state: Mapping[str, Tensor],
        outputs: Any,
        targets: Mapping[str, Tensor],
        weight: Tensor,
    ) -> Tree:
        target = targets[self.target]
        counted = counts(weight.double(), target)
        hit = (outputs.argmax(-1) == target).double()
        return _plus(
            state,
            correct=(counted * hit).sum(),
            loss=(counted * cross_entropy(outputs.double(), target)).sum(),
            total=counted.sum(),
        )

    def finish(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        return {
            "accuracy": _ratio(state["correct"], state["total"]),
            "loss": _ratio(state["loss"], state["total"]),
        }


class MacroF1(Metric):
    """Macro F1 and accuracy from the confusion matrix `confusion[true, predicted]` `[C, C]`.

    F1 of a class is 2 TP / (2 TP + FP + FN); the mean is over the classes that occur among
    targets or predictions.
    """

    primary, higher_is_better = "f1", True

    def __init__(self, classes: int, target: str = "y") -> None:
        self.classes, self.target = classes, target

    def init(self) -> Tree:
        square = torch.zeros(self.classes, self.classes, dtype=torch.float64)
        return {"confusion": square} | _zeros("loss")

    def update(
        self,
        state: Mapping[str, Tensor],
        outputs: Any,
        targets: Mapping[str, Tensor],
        weight: Tensor,
    ) -> Tree:
        target = targets[self.target]
        counted = counts(weight.double(), target)
        true = F.one_hot(target.clamp_min(0).reshape(-1).long(), self.classes).double()
        said = F.one_hot(outputs.argmax(-1).reshape(-1), self.classes).double()
        return _plus(
            state,
            confusion=(true * counted.reshape(-1, 1)).T @ said,
            loss=(counted * cross_entropy(outputs.double(), target)).sum(),
        )

    def finish(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        confusion = state["confusion"]
        hits, true, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        occurs = (true + said) > 0
        each = 2 * hits / torch.where(occurs, true + said, 1.0)
        return {
            "f1": _ratio(each.sum(), occurs.sum()),
            "accuracy": _ratio(hits.sum(), confusion.sum()),
            "loss": _ratio(state["loss"], confusion.sum()),
        }


class Perplexity(Metric):
    """exp of the mean loss per token: the sums `nll` (nats), `correct` and `tokens`.

    `outputs` `[b, T, V]` are the logits *for* the targets `[b, T]`: the task has shifted them.
    """

    primary, higher_is_better = "perplexity", False

    def __init__(self, target: str = "y") -> None:
        self.target = target

    def init(self) -> Tree:
        return _zeros("nll", "correct", "tokens")

    def update(
        self,
        state: Mapping[str, Tensor],
        outputs: Any,
        targets: Mapping[str, Tensor],
        weight: Tensor,
    ) -> Tree:
        target = targets[self.target]
        counted = counts(weight.double(), target)
        hit = (outputs.argmax(-1) == target).double()
        return _plus(
            state,
            nll=(counted * cross_entropy(outputs.double(), target)).sum(),
            correct=(counted * hit).sum(),
            tokens=counted.sum(),
        )

    def finish(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        loss = _ratio(state["nll"], state["tokens"])
        return {
            "perplexity": math.exp(min(loss, 700.0)),
            "loss": loss,
            "accuracy": _ratio(state["correct"], state["tokens"]),
        }


class Regression(Metric):
    """Root mean square error, mean absolute error and R^2, from sums over all entries.

    R^2 = 1 - sum (y - f)^2 / sum (y - mean y)^2, all entries of `y` `[b, ...]` pooled.
    """

    primary, higher_is_better = "rmse", False

    def __init__(self, target: str = "y") -> None:
        self.target = target

    def init(self) -> Tree:
        return _zeros("squared", "absolute", "sum", "sum_squares", "total")

    def update(
        self,
        state: Mapping[str, Tensor],
        outputs: Any,
        targets: Mapping[str, Tensor],
        weight: Tensor,
    ) -> Tree:
        y = targets[self.target].double()
        error = outputs.double().reshape(y.shape) - y
        counted = counts(weight.double(), y)
        return _plus(
            state,
            squared=(counted * error.square()).sum(),
            absolute=(counted * error.abs()).sum(),
            sum=(counted * y).sum(),
            sum_squares=(counted * y.square()).sum(),
            total=counted.sum(),
        )

    def finish(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        total, mean_square = state["total"], _ratio(state["squared"], state["total"])
        spread = state["sum_squares"] - state["sum"].square() / total
        return {
            "rmse": math.sqrt(mean_square),
            "mae": _ratio(state["absolute"], total),
            "r2": 1.0 - _ratio(state["squared"], spread),
            "loss": mean_square,
        }


class Loss(Metric):
    """The mean of a task's own loss per item, `fn(outputs, targets) -> [b, ...]`."""

    primary, higher_is_better = "loss", False

    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def init(self) -> Tree:
        return _zeros("loss", "total")

    def update(
        self,
        state: Mapping[str, Tensor],
        outputs: Any,
        targets: Mapping[str, Tensor],
        weight: Tensor,
    ) -> Tree:
        values = self.fn(outputs, targets)
        each = values.reshape(values.shape[0], -1).mean(1).double()
        return _plus(state, loss=(weight.double() * each).sum(), total=weight.double().sum())

    def finish(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        return {"loss": _ratio(state["loss"], state["total"])}
