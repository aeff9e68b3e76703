"""What data look like: items in columns, the batches that losses see, the mean they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import InputError
from isthmus.tree import Tree

RESERVED = ("columns", "weight", "key", "group", "domain")
"""Names that a column may not have: `Batch` and `Items` use them."""


class Batch:
    """What a loss sees: `columns` with a leading axis b, `weight` `[b]`, `key` (int64 scalar).

    >>> batch = Batch({"x": torch.ones(2, 3)}, torch.tensor([1.0, 0.0]))
    >>> batch.x is batch["x"], len(batch)
    (True, 2)
    """

    __slots__ = ("columns", "key", "weight")

    def __init__(
        self, columns: Mapping[str, Tensor], weight: Tensor, key: Tensor | None = None
    ) -> None:
        self.columns, self.weight = columns, weight
        self.key = torch.zeros((), dtype=torch.int64) if key is None else key

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __getattr__(self, name: str) -> Tensor:
        if name in Batch.__slots__ or name not in self.columns:
            raise AttributeError(f"the batch has no column {name}")
        return self.columns[name]

    def __len__(self) -> int:
        return self.weight.shape[0]


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """The mean of `values` `[b, ...]` where item i counts `weight[i]` times (a scalar).

    Axes after the first are averaged evenly. 0 when all weights are 0.

    >>> weighted_mean(torch.tensor([1.0, 4.0, 100.0]), torch.tensor([2.0, 1.0, 0.0]))
    tensor(2.)
    """
    weight = weight.to(values.dtype)
    total = weight.sum()
    each = values.reshape(values.shape[0], -1).mean(1)
    return (weight * each).sum() / torch.where(total > 0, total, torch.ones_like(total))


class Items:
    """A column store: tensors with one leading axis, and for each item a group and a domain.

    `group` is the natural owner (a writer, a hospital, a city), `domain` where it comes from.
    Raises `InputError` for columns of unequal length or with a reserved name.

    >>> items = Items({"x": torch.tensor([3, 1, 2])}, group=["a", "b", "a"])
    >>> items[1]
    {'x': tensor(1), 'group': 'b', 'domain': ''}
    >>> items.take([2, 0]).columns["x"], items.take([2, 0]).group
    (tensor([2, 3]), ['a', 'a'])
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        group: Sequence[str] | None = None,
        domain: Sequence[str] | None = None,
    ) -> None:
        if not columns:
            raise InputError("columns", "none", "one or more tensors")
        self.columns: Tree = dict(columns)
        size = next(iter(self.columns.values())).shape[0]
        for name, column in self.columns.items():
            if name in RESERVED:
                raise InputError("column", name, "any name but " + ", ".join(RESERVED))
            if column.shape[0] != size:
                raise InputError(f"column {name}", f"{column.shape[0]} items", f"{size} items")
        self.group = ["all"] * size if group is None else [str(g) for g in group]
        self.domain = [""] * size if domain is None else [str(d) for d in domain]
        for word, labels in (("group", self.group), ("domain", self.domain)):
            if len(labels) != size:
                raise InputError(word, f"{len(labels)} labels", f"{size} labels")

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = {name: column[i] for name, column in self.columns.items()}
        return row | {"group": self.group[i], "domain": self.domain[i]}

    def take(self, indices: Sequence[int] | np.ndarray | Tensor) -> Items:
        """The items at `indices`, in that order (copies)."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        where = index.tolist()
        return Items(
            {name: column[index.to(column.device)] for name, column in self.columns.items()},
            [self.group[i] for i in where],
            [self.domain[i] for i in where],
        )


class Splits(NamedTuple):
    """Train, validation and test items, and what every prediction may look up beside its input."""

    train: Items
    val: Items
    test: Items
    context: Any = None
