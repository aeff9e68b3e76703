"""Training that is not federated: one visit over data in hand.

Whoever trains something of their own (a defender on root data, an attacker's second model, a
watermark, a soft prompt, a distillation) uses the same step as a federation's clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.errors import InputError, unknown
from isthmus.learn.phase import Carry, Phase, Plan
from isthmus.learn.plan import full_batch_many, random_batches_many, shuffled_epochs_many
from isthmus.learn.recalibrate import freeze_statistics, recalibrate
from isthmus.learn.visit import sequential
from isthmus.models import optim
from isthmus.models.bind import bind, tensors_of, trainable
from isthmus.models.dropout import keyed
from isthmus.models.optim import Optimiser
from isthmus.tasks.contract import Batch, Items, Stage, Task, roles
from isthmus.tree import Tree


class Fitted(NamedTuple):
    """All tensors of the trained model, and the loss of every step.

    `bind(module, tensors)` is the trained model, `write(module, tensors)` puts them into it.
    """

    tensors: Tree
    history: list[float]


def fit(
    task: Task | Stage,
    module: nn.Module,
    items: Items,
    *,
    optimiser: str | Optimiser | None = None,
    lr: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch: int | None = None,
    key: int = 0,
    trainable: Sequence[str] | None = None,
) -> Fitted:
    """Train `module` on `items` by the loss of a stage (of a task: its first).

    What is not given is the stage's: optimiser (also as text, `adam:beta1=0.8`), learning rate,
    batch size (0: all items), `epochs`. `steps` counts updates instead of passes. `trainable`
    names the tensors that move, by default those that ask for a gradient and are `shared` or
    `local`. The module stays as it is; its mode (train or eval) is the mode of the steps.
    Running statistics of batch normalisation are recomputed at the end (only for a task, which
    knows how to predict). Raises `InputError` for a name that is not the model's.
    """
    stage = task.stages()[0] if isinstance(task, Task) else task
    own = tensors_of(module)
    twin = freeze_statistics(keyed(bind(module, own)))
    named = roles(stage, own)
    moving = _moving(module, named, trainable)
    if isinstance(optimiser, Optimiser):
        rule = optimiser
    else:
        rate = stage.lr if lr is None else lr
        rule = optim.parse(optimiser or stage.optimiser, lr=rate)
    history: list[float] = []

    def loss(model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        value, aux = stage.loss(model, batch)
        history.append(float(value.detach()))
        return value, aux

    follow = stage.follow if "follow" in named.values() else None
    first = own[moving[0]]
    work = sequential(
        Phase("fit", moving, loss, rule, follow=follow),
        twin,
        {},
        own,
        {},
        items.columns,
        _plan(stage, len(items), epochs, steps, batch, key, first.dtype),
        key,
        torch.tensor(rule.lr if lr is None else lr, dtype=first.dtype),
    )
    tensors = {name: x.detach() for name, x in work.params.items()}
    stale = [name for name, role in named.items() if role == "recalibrate"]
    if stale and isinstance(task, Task):
        size = stage.batch_size if batch is None else batch
        parts = np.array_split(np.arange(len(items)), max(1, len(items) // (size or len(items))))
        batches = ((task.inputs(items.take(part).columns), len(part)) for part in parts)
        tensors |= recalibrate(module, tensors, stale, task.predict, batches)
    return Fitted(tensors, history)


def _moving(
    module: nn.Module, named: Mapping[str, str], given: Sequence[str] | None
) -> tuple[str, ...]:
    asks = trainable(module)
    if given is None:
        given = [name for name in asks if named[name] in ("shared", "local")]
    for name in given:
        if name not in named:
            raise unknown("trainable", name, asks)
    if not given:
        raise InputError("trainable", "nothing", ", ".join(asks) or "a model with parameters")
    return tuple(given)


def _plan(
    stage: Stage,
    size: int,
    epochs: int | None,
    steps: int | None,
    batch: int | None,
    key: int,
    dtype: torch.dtype,
) -> Plan:
    """The order of the items, as a client of a federation would see them."""
    width = stage.batch_size if batch is None else batch
    passes = stage.epochs if epochs is None else epochs
    keys, sizes = np.array([key]), np.array([size])
    if width == 0:
        many = full_batch_many(sizes, steps or passes)
    elif steps is not None:
        many = random_batches_many(keys, sizes, steps, width)
    else:
        many = shuffled_epochs_many(keys, sizes, passes, width)
    return Plan(many.index[0], many.weight[0].to(dtype))
