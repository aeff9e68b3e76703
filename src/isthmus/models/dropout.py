"""Dropout as a pure function of a key."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus import seeds


class KeyedDropout(nn.Module):
    """Dropout whose mask is hashed from the batch's key: the same mask sequentially, under
    `torch.vmap` and after a resume. `bind` hands it the key; without one it does nothing."""

    def __init__(self, p: float, number: int) -> None:
        super().__init__()
        self.p, self.number = p, number
        self.draw: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.draw is None or self.p == 0.0:
            return x
        kept = seeds.uniform(seeds.fold(self.draw, self.number), x.shape) >= self.p
        return torch.where(kept, x / (1.0 - self.p), torch.zeros_like(x))


def keyed(module: nn.Module) -> nn.Module:
    """Replace every `torch.nn.Dropout` with p > 0 in place, numbered in order; returns it.

    Masks are drawn for the shape that the layer sees, so a client's mask depends on its own
    key alone.
    """
    number = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout) and child.p > 0:
                twin = KeyedDropout(child.p, number)
                twin.train(child.training)
                setattr(parent, name, twin)
                number += 1
    return module
