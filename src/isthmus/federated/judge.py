"""A client judges several models on its own items, by their losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.learn.phase import Grad
from isthmus.models.bind import bind
from isthmus.tasks.contract import Batch, Role, Stage
from isthmus.tree import Tree

JUDGED = "judged"
"""Weights `[k]` of the models under judgement, beside the tensors of the client's own."""


def attach(module: nn.Module) -> nn.Module:
    """The module with a place for the weights."""
    module.register_buffer(JUDGED, next(module.parameters()).new_zeros(()))
    return module


def roles(given: Mapping[str, Role]) -> dict[str, Role]:
    """The weights are nobody's to train or send."""
    return {**given, JUDGED: "frozen"}


def weighted(stage: Stage, model: Any, models: Tree, batch: Batch) -> Tensor:
    """sum_j w_j l(model j), for tensors stacked `[k, ...]` in place of the model's own."""
    weights = getattr(model, JUDGED)
    losses = [
        stage.loss(bind(model, {name: x[j] for name, x in models.items()}, batch.key), batch)[0]
        for j in range(len(weights))
    ]
    return weights @ torch.stack(losses)


def losses(grad: Grad, k: int, batch: Batch) -> Tensor:
    """The losses `[k]` of the models on a batch, from the gradient of `weighted`.

    It is the gradient for the weights, so no model is differentiated: the work is k forwards.
    """
    grads, _ = grad({JUDGED: torch.ones(k, dtype=batch.weight.dtype)})
    return grads[JUDGED]


def mixed(weights: Tensor, models: Tree) -> Tree:
    """sum_j w_j model j, for weights `[k]`.

    Written without a matrix product: it is work of a step, not of each of its items.
    """
    return {name: (weights.view(-1, *[1] * (x.ndim - 1)) * x).sum(0) for name, x in models.items()}
