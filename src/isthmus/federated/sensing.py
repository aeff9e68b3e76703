"""Noisy views of sensor windows: jitter, scaling, time warp and lost channels, drawn by key.

Um et al., "Data augmentation of wearable sensor data for Parkinson's disease monitoring using
convolutional neural networks", ICMI 2017.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isthmus import seeds


def seen(
    x: Tensor, key: Tensor, jitter: float, scale: float = 0.0, warp: float = 0.0, drop: float = 0.0
) -> Tensor:
    """Another view of inputs `[b, ..., time]` (channels, if any, on axis 1).

    `jitter`: standard deviation of noise on every number. `scale`: of a factor around 1 for each
    item. `warp`: how much faster or slower, at most, time runs. `drop`: chance that a channel is 0.
    """
    each = (x.shape[0], *[1] * (x.ndim - 1))
    if warp:
        turn = 2.0 * math.pi * seeds.uniform(seeds.fold(key, 1), each, x.dtype)
        x = warped(x, turn, warp)
    if scale:
        x = x * (1.0 + scale * seeds.normal(seeds.fold(key, 2), each, x.dtype))
    if drop and x.ndim > 2:
        channels = (x.shape[0], x.shape[1], *[1] * (x.ndim - 2))
        lost = seeds.uniform(seeds.fold(key, 3), channels, x.dtype) < drop
        x = torch.where(lost, 0.0, x)
    if jitter:
        x = x + jitter * seeds.normal(seeds.fold(key, 4), tuple(x.shape), x.dtype)
    return x


def warped(x: Tensor, turn: Tensor, warp: float) -> Tensor:
    """`x` read at t + A sin(2 pi t / L + turn), A = warp L / (2 pi), between its samples.

    Time never runs backwards for `warp` of at most 1.
    """
    length = x.shape[-1]
    t = torch.arange(length, dtype=x.dtype)
    swing = warp * length / (2.0 * math.pi)
    where = (t + swing * torch.sin(2.0 * math.pi * t / length + turn)).clamp(0, length - 1)
    where = where.expand(x.shape)
    low = where.floor().clamp(max=max(length - 2, 0))
    share, left = where - low, low.long()
    right = (left + 1).clamp(max=length - 1)
    return torch.lerp(x.gather(-1, left), x.gather(-1, right), share)
