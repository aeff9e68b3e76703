"""A small recurrent net: `h_t = tanh(W x_t + b + U h_{t-1})`, in plain linear layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from isthmus.errors import InputError
from isthmus.models.nets import Net, initialise


class Recurrent(nn.Module):
    """Sequences `[b, T, inputs] -> [b, T, width]` (Elman, "Finding structure in time", 1990)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.inputs = nn.Linear(inputs, width)
        self.state = nn.Linear(width, width, bias=False)
        self.act = nn.Tanh()

    def unrolled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the activation sees and gives at every time step, `[b, T, width]` each."""
        driven = self.inputs(x)
        z = driven[:, 0]
        seen, out = [z], [self.act(z)]
        for t in range(1, x.shape[1]):
            z = driven[:, t] + self.state(out[-1])
            seen.append(z)
            out.append(self.act(z))
        return torch.stack(seen, dim=1), torch.stack(out, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.unrolled(x)[1]


class Last(nn.Module):
    """`[b, T, width] -> [b, width]`: the last time step."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


def rnn(sizes: Sequence[int], seed: int = 0) -> Net:
    """Recurrent layers and a linear head on the last time step: `[b, T, sizes[0]] -> [b, C]`.

    Pictures `[b, 1, T, sizes[0]]` are read row by row.

    >>> rnn([8, 16, 10])(torch.zeros(2, 1, 5, 8)).shape
    torch.Size([2, 10])
    """
    if len(sizes) < 3:
        raise InputError("sizes", list(sizes), "three or more widths")
    with torch.device("meta"):
        layers: OrderedDict[str, nn.Module] = OrderedDict(rows=nn.Flatten(1, -2))
        for i, (width, after) in enumerate(pairwise(sizes[:-1])):
            layers[f"recurrent{i}"] = Recurrent(width, after)
        layers["last"] = Last()
        net = Net(nn.Sequential(layers), nn.Linear(sizes[-2], sizes[-1]))
    return initialise(net.to_empty(device="cpu"), seed)
