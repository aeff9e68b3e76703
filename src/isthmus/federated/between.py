"""A model in two halves, `head(features(x))`: what methods that act between them need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isthmus.errors import InputError


class Call(NamedTuple):
    """One call of a module: what it was given, and what came out."""

    given: tuple[Any, ...]
    made: Tensor


def halves(module: nn.Module, method: str) -> tuple[nn.Module, nn.Linear]:
    """`features` and the linear `head` of a model; raises `InputError` where one is missing."""
    features, head = getattr(module, "features", None), getattr(module, "head", None)
    if not (isinstance(features, nn.Module) and isinstance(head, nn.Linear)):
        wanted = f"one with features and a linear head, with method {method}"
        raise InputError("model", type(module).__name__, wanted)
    return features, head


@contextmanager
def watched(module: nn.Module) -> Iterator[list[Call]]:
    """The calls of a module while the block runs, in their order.

    >>> layer = nn.ReLU()
    >>> with watched(layer) as calls:
    ...     _ = layer(torch.tensor([-1.0, 2.0]))
    >>> calls[0].made
    tensor([0., 2.])
    """
    calls: list[Call] = []

    def seen(_: nn.Module, given: tuple[Any, ...], made: Tensor) -> None:
        calls.append(Call(given, made))

    handle = module.register_forward_hook(seen)
    try:
        yield calls
    finally:
        handle.remove()


def shares(weight: Tensor, like: Tensor) -> Tensor:
    """The weights `[b]` of a batch as shares of their sum, 0 where all are 0; dtype of `like`."""
    weight = weight.to(like.dtype)
    total = weight.sum()
    return weight / torch.where(total > 0, total, torch.ones_like(total))
