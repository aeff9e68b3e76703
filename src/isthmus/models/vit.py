"""A small Vision Transformer in plain linear layers, which `torch.vmap` can take.

Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021; without a class token: the head
reads the mean of the tokens.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InputError
from isthmus.models.nets import Net, initialise


class Patches(nn.Module):
    """Pictures `[b, c, h, w]` to tokens `[b, n, width]`, with a learned vector for each place."""

    def __init__(self, inputs: int, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch, self.grid, self.width = patch, side // patch, width
        self.values = inputs * patch * patch
        self.project = nn.Linear(self.values, width)
        self.place = nn.Linear(self.grid**2, width, bias=False)

    def cut(self, x: Tensor) -> Tensor:
        """The pixels of each patch `[b, n, c * patch * patch]`, row by row."""
        b, c, h, w = x.shape
        p = self.patch
        parts = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        return parts.reshape(b, (h // p) * (w // p), c * p * p)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.cut(x)) + self.place.weight.mT


class Block(nn.Module):
    """Self-attention and two linear layers, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int, ratio: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        parts = self.qkv(self.before_attention(x)).reshape(b, n, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.mT) * (width // self.heads) ** -0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.before_feed(x))))


class MeanToken(nn.Module):
    """`[b, n, width] -> [b, width]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def vit(
    side: int,
    patch: int,
    width: int,
    depth: int,
    classes: int,
    seed: int = 0,
    *,
    heads: int = 4,
    inputs: int = 1,
) -> Net:
    """A Vision Transformer of `depth` blocks: `[b, inputs, side, side] -> [b, classes]`.

    >>> net = vit(8, 2, 32, 4, 10)
    >>> [name for name, _ in net.features.named_children()]
    ['embed', 'block0', 'block1', 'block2', 'block3', 'norm', 'mean']
    """
    if side % patch:
        raise InputError("patch", patch, f"a divisor of the side, {side}")
    if width % heads:
        raise InputError("heads", heads, f"a divisor of the width, {width}")
    with torch.device("meta"):
        layers: OrderedDict[str, nn.Module] = OrderedDict(embed=Patches(inputs, side, patch, width))
        for i in range(depth):
            layers[f"block{i}"] = Block(width, heads)
        layers["norm"], layers["mean"] = nn.LayerNorm(width), MeanToken()
        net = Net(nn.Sequential(layers), nn.Linear(width, classes))
    return initialise(net.to_empty(device="cpu"), seed)
