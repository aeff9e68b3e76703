"""Losses per entry, and how much each entry counts; a stage reduces with `weighted_mean`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""The target class that is not counted, as in `torch.nn.functional.cross_entropy`."""


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    """The negative log-probability (nats) of each entry of `target` `[b, ...]`.

    `outputs` `[b, ..., C]` are logits, the classes on the last axis. 0 where the target is -100.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor([1.3863, 0.0000])
    """
    flat = F.cross_entropy(
        outputs.reshape(-1, outputs.shape[-1]),
        target.reshape(-1).long(),
        ignore_index=IGNORE,
        reduction="none",
    )
    return flat.view(target.shape)


def squared_error(outputs: Tensor, target: Tensor) -> Tensor:
    """The squared error of each entry of `target` `[b, ...]`; `outputs` take its shape.

    >>> squared_error(torch.tensor([[1.0], [5.0]]), torch.tensor([1.0, 2.0]))
    tensor([0., 9.])
    """
    return (outputs.reshape(target.shape) - target.to(outputs.dtype)).square()


def counts(weight: Tensor, target: Tensor) -> Tensor:
    """How much each entry of `target` `[b, ...]` counts: its item's weight `[b]`, 0 where an
    integer target is -100.

    >>> counts(torch.tensor([2.0, 1.0]), torch.tensor([[3, -100], [0, 1]])).tolist()
    [[2.0, 0.0], [1.0, 1.0]]
    """
    wide = weight.view(-1, *[1] * (target.ndim - 1)).expand(target.shape)
    return wide if target.is_floating_point() else torch.where(target == IGNORE, 0.0, wide)
