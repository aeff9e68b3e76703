"""Running statistics of batch normalisation, recomputed from data before a model is scored.

A training step normalises by the statistics of its batch and moves no buffer (see
`learn.visit`), and the mean of clients' variances is not the variance of their union. So the
buffers whose role is `recalibrate` are computed anew for the weights that are to be scored: for
every batch the statistics that a training pass sees, averaged with the sizes of the batches.
They add up: batches may come from any number of clients, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from isthmus.errors import InputError
from isthmus.learn.visit import BATCH_NORMS
from isthmus.models.bind import bind
from isthmus.tree import Tree


def recalibrate(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Sequence[str],
    predict: Callable[[Any, Tree], object],
    batches: Iterable[tuple[Tree, int]],
) -> Tree:
    """New values of the buffers `names` for a model that computes with `tensors`.

    `predict(model, inputs)` runs the model; `batches` are pairs of inputs and their number of
    items. Batches of one item have no variance and are left out. Neither `module` nor
    `tensors` is changed. Raises `InputError` for a buffer that no normalisation layer owns, and
    when no batch is left.
    """
    fresh = {name: torch.zeros_like(tensors[name]) for name in names}
    model = bind(module, {**tensors, **fresh}).eval()
    layers = [_layer(model, name) for name in names]
    for layer in layers:
        layer.train()
        layer.track_running_stats = True
    total = 0
    with torch.no_grad():
        for inputs, size in batches:
            if size < 2:
                continue
            total += size
            for layer in layers:
                layer.momentum = size / total
            predict(model, inputs)
    if not total:
        raise InputError("recalibrate", "batches of one item", "a batch of two items or more")
    return fresh


def _layer(model: nn.Module, name: str) -> Any:
    """The normalisation layer of a bound model that owns a buffer."""
    owner, _, buffer = name.rpartition(".")
    layer = model.get_submodule(owner)
    if not isinstance(layer, BATCH_NORMS) or buffer not in dict(layer.named_buffers()):
        raise InputError(f"role of {name}", "recalibrate", "buffers of batch normalisation")
    return cast(Any, layer)


def freeze_statistics(module: nn.Module) -> nn.Module:
    """Let training passes of normalisation layers leave their buffers alone; returns `module`."""
    for layer in module.modules():
        if isinstance(layer, BATCH_NORMS) and layer.running_mean is not None:
            layer.track_running_stats = False
    return module
