"""Hand loops in plain torch against which methods are held, float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.federated import tiny
from tests.federated.test_baselines import gradient, initial, mean_model, rows_of, shared
from torch import Tensor, nn

from isthmus import seeds
from isthmus.federated.round import Federation
from isthmus.tasks.contract import Task
from isthmus.tree import Tree

__all__ = [
    "LR", "TASK", "Point", "Slope", "initial", "mean", "mean_model", "norm", "optimum", "parabola",
    "quadratics", "rows_of", "shared", "steps", "up",
]  # fmt: skip

TASK = tiny.task()
LR = 0.1
Slope = Callable[[Tree], Tree]
"""The gradient of one batch at some weights."""


def steps(
    fed: Federation,
    round: int,
    client: int,
    w: Tree,
    rule: Callable[[Slope, Tree], Tree],
    epochs: int = 1,
) -> tuple[Tree, int]:
    """The weights after a visit, `v <- v - lr rule(slope, v)`, and the number of its steps."""
    v, parts = w, rows_of(fed, round, client, epochs, 8)
    for part in parts:
        x, y = fed.ground.columns["x"][part], fed.ground.columns["y"][part]

        def slope(at: Tree, x: Tensor = x, y: Tensor = y) -> Tree:
            return gradient(fed.ground.module, at, x, y)

        direction = rule(slope, v)
        v = {n: p - LR * direction[n] for n, p in v.items()}
    return v, len(parts)


def up(a: Tree, b: Tree, scale: float = 1.0) -> Tree:
    """a + scale b."""
    return {n: x + scale * b[n] for n, x in a.items()}


def norm(a: Tree) -> Tensor:
    return torch.cat([x.flatten() for x in a.values()]).norm()


def mean(trees: list[Tree]) -> Tree:
    """The even mean."""
    return mean_model(trees, torch.ones(len(trees), dtype=torch.float64))


class Point(nn.Module):
    """One number w; the output is w itself, so that the loss sees it beside its target."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.w.expand(len(x), 1)], dim=1)


def parabola(outputs: Tensor, y: Tensor) -> Tensor:
    """a / 2 (w - b)^2 of items x = (a, b)."""
    a, b, w = outputs.T
    return 0.5 * a * (w - b).square()


def quadratics(n: int = 10, seed: int = 5) -> tuple[Task, Tensor, Tensor]:
    """Client i has one item, f_i(w) = a_i / 2 (w - b_i)^2: the task, a and b (float64 `[n]`)."""
    a = 0.5 + 2.0 * seeds.uniform(seeds.key(seed, "a"), (n,), torch.float64)
    b = 3.0 * seeds.normal(seeds.key(seed, "b"), (n,), torch.float64)
    columns = torch.stack([a, b], dim=1), torch.zeros(n, dtype=torch.int64)
    made = tiny.task([1] * n, module=lambda seed: Point(), data=columns, loss=parabola)
    return made, a, b


def optimum(a: Tensor, b: Tensor) -> float:
    """Where sum_i f_i is least."""
    return float((a * b).sum() / a.sum())
