"""Dropout as a pure function of a key."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus import seeds
from isthmus.errors import InputError

_WHOLE_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class KeyedDropout(nn.Module):
    """Dropout whose mask is hashed from the batch's key: the same mask sequentially, under
    `torch.vmap` and after a resume. `bind` hands it the key; without one it does nothing.

    With `channels`, whole channels of `[b, c, ...]` are dropped. A layer that is called twice in
    one pass draws one mask for equal shapes.
    """

    def __init__(self, p: float, number: int, channels: bool = False) -> None:
        super().__init__()
        self.p, self.number, self.channels = p, number, channels
        self.draw: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.draw is None or self.p == 0.0:
            return x
        if self.p == 1.0:
            return torch.zeros_like(x)
        shape = (*x.shape[:2], *[1] * (x.ndim - 2)) if self.channels else x.shape
        kept = seeds.uniform(seeds.fold(self.draw, self.number), shape) >= self.p
        return torch.where(kept, x / (1.0 - self.p), torch.zeros_like(x))


def keyed(module: nn.Module) -> nn.Module:
    """Replace every dropout layer with p > 0 in place, numbered in order; returns the module.

    Masks are drawn for the shape that the layer sees, so a client's mask depends on its own
    key alone. Raises `InputError` for a layer that draws inside itself while it trains.
    """
    number = 0
    for path, parent in list(module.named_modules()):
        if parent.training:
            _refuse(path, parent)
        for name, child in list(parent._modules.items()):
            if isinstance(child, (nn.Dropout, *_WHOLE_CHANNELS)) and child.p > 0:
                twin = KeyedDropout(child.p, number, isinstance(child, _WHOLE_CHANNELS))
                twin.train(child.training)
                setattr(parent, name, twin)
                number += 1
    return module


def _refuse(path: str, layer: nn.Module) -> None:
    drawn = (
        (isinstance(layer, nn.AlphaDropout | nn.FeatureAlphaDropout) and layer.p > 0)
        or isinstance(layer, nn.RReLU)
        or (isinstance(layer, nn.MultiheadAttention | nn.RNNBase) and layer.dropout > 0)
    )
    if drawn:
        allowed = "layers that draw from no generator of their own (dropout 0 inside them)"
        raise InputError(f"layer {path or 'model'}", type(layer).__name__, allowed)
