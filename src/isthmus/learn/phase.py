"""What a visit consists of: who visits, in which phases, over which batches.

All of it is per client. The same hooks run on one client's tensors or, under `torch.vmap`,
on a cohort's, so they hold no branch on tensor values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from isthmus.models.optim import Optimiser
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

Purpose = Literal["warm-up", "train", "score"]
"""Why a client is visited: once before the first round, in a round, or before it predicts."""

Carry = dict[str, Any]
"""Tensors that a method carries through a visit, by name; trees may be nested in it."""


@dataclass(frozen=True)
class Visit:
    """One client's turn. All fields but `purpose` are tensors (scalars, or `[n]` under vmap).

    `version` is the server's version the client starts from, `rank` its adapter's rank (0 without
    one), `key` the seed of every draw, `examples` the number of items the client holds, `steps`
    the number of its local updates (known at the end), `lr` the learning rate of this round.
    """

    client: Tensor
    round: Tensor
    version: Tensor
    rank: Tensor
    key: Tensor
    examples: Tensor
    steps: Tensor
    lr: Tensor
    purpose: Purpose = "train"


@dataclass(frozen=True)
class Plan:
    """Which items each step sees: `index` int64 `[T, b]`, `weight` float `[T, b]` (0: padding)."""

    index: Tensor
    weight: Tensor


class Opt:
    """The optimiser of one visit: `params, opt = opt.update(grads, params)`."""

    __slots__ = ("lr", "rule", "state")

    def __init__(self, rule: Optimiser, state: Tree, lr: Tensor) -> None:
        self.rule, self.state, self.lr = rule, state, lr

    def update(self, grads: Mapping[str, Tensor], params: Tree) -> tuple[Tree, Opt]:
        """One update of `params` by `grads`; names without a gradient stay as they are."""
        params, state = self.rule.update(grads, self.state, params, self.lr)
        return params, Opt(self.rule, state, self.lr)


class Grad(Protocol):
    """`grads, aux = grad(params)`: the gradient of the phase's loss on this batch at `params`.

    May be called several times in a step (sharpness-aware methods call it twice); every call
    is counted as work.
    """

    def __call__(self, params: Tree) -> tuple[Tree, dict[str, Tensor]]: ...


Loss = Callable[[Any, Batch, Carry], tuple[Tensor, dict[str, Tensor]]]
Step = Callable[[Grad, Tree, Opt, Carry, Batch], tuple[Tree, Opt, Carry]]
Until = Callable[[Tree, Carry, Tensor], Tensor]


def update_once(
    grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
) -> tuple[Tree, Opt, Carry]:
    """The plain step: one gradient, one update."""
    grads, _ = grad(params)
    params, opt = opt.update(grads, params)
    return params, opt, carry


@dataclass(frozen=True)
class Phase:
    """Some steps over the same names with the same loss.

    `trainable` are the names that the gradient is taken for. `until(params, carry, loss)` ends
    the phase early for a client, at the latest after its planned steps. `plans(keys, sizes)` gives
    the batches of many clients `[n, T, b]` where they are not those of the run. Two phases that
    compare equal share their recording, so pass methods and named functions, not fresh lambdas.
    """

    name: str
    trainable: tuple[str, ...]
    loss: Loss
    optimiser: Optimiser
    step: Step = update_once
    until: Until | None = None
    follow: Callable[[Mapping[str, Tensor]], Tree] | None = None
    plans: Callable[[np.ndarray, np.ndarray], Plan] | None = field(default=None, compare=False)


class Work(NamedTuple):
    """What one phase left behind, per client.

    `loss` is the mean loss of the steps taken, `steps` their number, `examples` the number of
    items seen (with repeats) and `grads` the gradients taken per step.
    """

    params: Tree
    carry: Carry
    loss: Tensor
    aux: dict[str, Tensor]
    steps: Tensor
    examples: Tensor
    grads: int
