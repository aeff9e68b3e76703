"""A step without backpropagation, as a loss: errors are set layer by layer on the way forward.

The net runs once, with gradients off. Each layer's own gradient is taken from an error that a
*rule* sets at its output, and is handed to the engine as the gradient of a linear form, so that
optimisers, several clients at once and counting work as for any loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import InputError
from isthmus.models import layerwise
from isthmus.models.layerwise import Seen
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

Rule = Callable[[int, Seen], Tensor]
"""`rule(k, seen)`: the error dJ_k/do of each item at the output of the k-th layer (from 0)."""

LateRule = Callable[[int, Seen, Tensor], Tensor]
"""A rule that also reads the error `[b, classes]` at the net's output."""

Loss = Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]


def descend(
    loss: Loss, model: nn.Module, batch: Batch, rule: Rule
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of `loss`, with the gradients that `rule` gives the hidden layers.

    The output layer has its own gradient of `loss`. A layer's input is let go as soon as its
    gradient is there. Raises `InputError` for a net that is no plain chain of layers.
    """
    chain, share, grads = layerwise.layers(model), even(batch.weight), dict[str, Tensor]()

    def net(x: Tensor) -> Seen:
        walked = layerwise.walk(chain, x)
        for k in range(len(chain) - 1):
            seen = next(walked)
            error = rule(k, seen)
            grads.update(layerwise.gradient(seen, error * over(share, error)))
        return next(walked)

    return _taught(loss, model, batch, net, lambda error: grads)


def descend_late(
    loss: Loss, model: nn.Module, batch: Batch, rule: LateRule
) -> tuple[Tensor, dict[str, Tensor]]:
    """`descend` by a rule that needs the error at the output, so every layer is held till then.

    That error is of a mean over the batch, so the items' weights are in it already.
    """
    chain, held = layerwise.layers(model), list[Seen]()

    def net(x: Tensor) -> Seen:
        held.extend(layerwise.walk(chain, x))
        return held.pop()

    def hidden(error: Tensor) -> Tree:
        grads: Tree = {}
        for k, seen in enumerate(held):
            grads |= layerwise.gradient(seen, rule(k, seen, error))
        return grads

    return _taught(loss, model, batch, net, hidden)


def _taught(
    loss: Loss,
    model: nn.Module,
    batch: Batch,
    net: Callable[[Tensor], Seen],
    hidden: Callable[[Tensor], Tree],
) -> tuple[Tensor, dict[str, Tensor]]:
    last: list[Seen] = []

    def outputs(x: Tensor) -> Tensor:
        last.append(net(x))
        return last[-1].o

    with torch.no_grad():
        value, aux = loss(outputs, batch)
        error = torch.func.grad(lambda o: loss(lambda x: o, batch)[0])(last[-1].o)
        grads = {**hidden(error), **layerwise.gradient(last[-1], error)}
    return layerwise.handed(model, grads, value), aux


def even(weight: Tensor) -> Tensor:
    """What each item counts in a mean over the batch `[b]`; zeros when all weights are zero."""
    total = weight.sum()
    return weight / torch.where(total > 0, total, torch.ones_like(total))


def over(share: Tensor, like: Tensor) -> Tensor:
    """One number per item `[b]` in the shape `[b, 1, ...]` of another tensor."""
    return share.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def labels(batch: Batch) -> Tensor:
    """The classes `[b]` of column `y`; raises `InputError` where they are none."""
    y = batch.columns.get("y")
    if y is None or y.ndim != 1 or y.is_floating_point():
        given = ", ".join(batch.columns) if y is None else f"{y.dtype} with {y.ndim} axes"
        raise InputError("column y", given, "one class per item, as an integer")
    return y
