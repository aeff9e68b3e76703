"""Orders of batches as pure functions of a key.

Each has a form for one client and one for a cohort (`_many`) that gives the same rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isthmus import seeds
from isthmus.learn.phase import Plan

_LAST = np.iinfo(np.int64).max


def shuffled_epochs(key: int, n: int, epochs: int, batch: int) -> Plan:
    """`epochs` passes over n items in fresh random orders; the last batch of a pass may be short.

    A short batch is padded with item 0 at weight 0. T = epochs * ceil(n / batch).
    """
    many = shuffled_epochs_many(np.array([key]), np.array([n]), epochs, batch)
    return Plan(many.index[0], many.weight[0])


def shuffled_epochs_many(keys: np.ndarray, sizes: np.ndarray, epochs: int, batch: int) -> Plan:
    """`shuffled_epochs` of many clients, int64 `[n]` each, padded to the longest: `[n, T, b]`."""
    clients, widest = len(sizes), int(sizes.max(initial=0))
    per_epoch = -(-widest // batch)
    inside = (np.arange(per_epoch * batch) < sizes[:, None])[:, None]
    draws = _draws(seeds.keys_grid(keys, epochs).reshape(-1), widest)
    draws = draws.reshape(clients, epochs, widest)
    np.copyto(draws, _LAST, where=~inside[..., :widest])
    index = np.zeros((clients, epochs, per_epoch * batch), dtype=np.int64)
    order = draws.argsort(axis=-1, kind="stable")
    np.multiply(order, inside[..., :widest], out=index[..., :widest])
    weight = np.empty(index.shape, dtype=np.float32)
    weight[:] = inside
    if sizes.min(initial=widest) > (per_epoch - 1) * batch:  # as many steps for every client
        shape = (clients, epochs * per_epoch, batch)
        return _tensors(index.reshape(shape), weight.reshape(shape))
    shape = (clients, epochs, per_epoch, batch)
    return _front(index.reshape(shape), weight.reshape(shape), -(-sizes // batch))


def random_batches_many(keys: np.ndarray, sizes: np.ndarray, steps: int, batch: int) -> Plan:
    """`steps` whole batches of many clients, from shuffled passes without end: `[n, steps, b]`.

    A client with fewer items than a batch sees all of them in every step.
    """
    whole = np.maximum(1, sizes // batch)
    epochs = int((-(-steps // whole)).max(initial=1))
    index = np.zeros((len(sizes), steps, batch), dtype=np.int64)
    weight = np.zeros((len(sizes), steps, batch), dtype=np.float32)
    widest = int(sizes.max(initial=0))
    inside = np.arange(widest) < sizes[:, None]
    orders = np.stack(
        [
            np.argsort(
                np.where(inside, _draws(seeds.keys_of(keys, e), widest), _LAST), 1, kind="stable"
            )
            for e in range(epochs)
        ],
        axis=1,
    )
    for row, size in enumerate(sizes):
        width = min(size, batch)
        epoch, place = np.divmod(np.arange(steps), whole[row])
        columns = place[:, None] * batch + np.arange(width)
        index[row, :, :width] = orders[row, epoch[:, None], columns]
        weight[row, :, :width] = 1.0
    return Plan(torch.from_numpy(index), torch.from_numpy(weight))


def counted_batches_many(
    keys: np.ndarray, sizes: np.ndarray, steps: np.ndarray, batch: int
) -> Plan:
    """`random_batches_many` with a number of steps `[n]` for each client: `[n, max steps, b]`."""
    most = int(steps.max(initial=0))
    plan = random_batches_many(keys, sizes, most, batch)
    told = torch.arange(most)[None, :] < torch.from_numpy(np.asarray(steps))[:, None]
    return Plan(plan.index * told[..., None], plan.weight * told[..., None])


def full_batch_many(sizes: np.ndarray, steps: int) -> Plan:
    """All items in every step: `[n, steps, widest]`."""
    widest = int(sizes.max(initial=0))
    inside = np.arange(widest) < sizes[:, None]
    index = np.where(inside, np.arange(widest), 0)[:, None].repeat(steps, 1)
    weight = inside.astype(np.float32)[:, None].repeat(steps, 1)
    return Plan(torch.from_numpy(index), torch.from_numpy(weight))


def _draws(keys: np.ndarray, width: int) -> np.ndarray:
    """Non-negative hashes `[n, width]`, the ones that `seeds.bits` gives for each key."""
    return seeds.bits_of(keys, width) & _LAST


def _front(index: np.ndarray, weight: np.ndarray, per_epoch: np.ndarray) -> Plan:
    """Move each client's own steps to the front, so that padding comes last."""
    clients, epochs, widest, _ = index.shape
    step = np.arange(epochs * widest)
    own = np.maximum(per_epoch, 1)[:, None]
    epoch = np.minimum(step // own, epochs - 1)
    place = step - epoch * own
    live = step < per_epoch[:, None] * epochs
    row = np.arange(clients)[:, None]
    place = np.where(live, place, 0)
    index = np.where(live[..., None], index[row, epoch, place], 0)
    weight = np.where(live[..., None], weight[row, epoch, place], 0.0).astype(np.float32)
    return _tensors(index, weight)


def _tensors(index: np.ndarray, weight: np.ndarray) -> Plan:
    return Plan(torch.from_numpy(index), torch.from_numpy(weight))


def local_steps(weight: Tensor) -> Tensor:
    """How many steps of a plan do work: `[..., T, b] -> [...]`."""
    return (weight.amax(-1) > 0).sum(-1)
