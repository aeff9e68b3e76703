"""Small networks with two named halves: `features` (the base) and `head` (the last layer).

Personalised methods keep one half and share the other; split inference cuts `features`.
Weights come from a seed, by the rule torch itself uses for linear and convolution layers
(uniform in +-1/sqrt(fan_in)), and the global generator is neither read nor moved.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from isthmus import seeds
from isthmus.errors import InputError, unknown

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
}


Module = TypeVar("Module", bound=nn.Module)


class Net(nn.Module):
    """`head(features(x))`."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def mlp(sizes: Sequence[int], activation: str = "relu", seed: int = 0) -> Net:
    """A multi-layer perceptron `[b, sizes[0]] -> [b, sizes[-1]]`; axes after b are flattened.

    >>> net = mlp([64, 32, 10])
    >>> sorted(net.state_dict())
    ['features.linear0.bias', 'features.linear0.weight', 'head.bias', 'head.weight']
    """
    if len(sizes) < 2:
        raise InputError("sizes", list(sizes), "two or more widths")
    act = _activation(activation)
    with torch.device("meta"):
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for i, (width, after) in enumerate(pairwise(sizes[:-1])):
            layers[f"linear{i}"] = nn.Linear(width, after)
            layers[f"{activation}{i}"] = act()
        net = Net(nn.Sequential(layers), nn.Linear(sizes[-2], sizes[-1]))
    return initialise(net.to_empty(device="cpu"), seed)


def cnn(
    channels: Sequence[int],
    classes: int,
    seed: int = 0,
    *,
    inputs: int = 1,
    activation: str = "relu",
) -> Net:
    """A small convolution net `[b, inputs, h, w] -> [b, classes]`.

    Each entry of `channels` is a 3x3 convolution, group normalisation (which has no statistics to
    average, unlike batch normalisation), activation and 2x2 mean pooling; then a mean over what
    is left of the picture and a linear head.
    """
    if not channels:
        raise InputError("channels", list(channels), "one or more widths")
    act = _activation(activation)
    with torch.device("meta"):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (width, after) in enumerate(pairwise([inputs, *channels])):
            layers[f"conv{i}"] = nn.Conv2d(width, after, 3, padding=1)
            layers[f"norm{i}"] = nn.GroupNorm(math.gcd(after, 4), after)
            layers[f"{activation}{i}"] = act()
            layers[f"pool{i}"] = nn.AvgPool2d(2, ceil_mode=True)
        layers["mean"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        net = Net(nn.Sequential(layers), nn.Linear(channels[-1], classes))
    return initialise(net.to_empty(device="cpu"), seed)


def initialise(module: Module, seed: int | torch.Generator) -> Module:
    """Draw all weights of linear, convolution and normalisation layers anew; returns the module.

    A seed gives each tensor a generator of its own, by name, so a layer's bits do not depend on
    the layers beside it. Raises `InputError` for a layer of another kind with parameters.
    """
    for name, layer in module.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if not own:
            continue
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            bound = 1.0 / math.sqrt(layer.weight[0].numel())
            for part, tensor in own.items():
                draw = (
                    seed
                    if isinstance(seed, torch.Generator)
                    else seeds.generator(seed, "init", f"{name}.{part}")
                )
                with torch.no_grad():
                    tensor.uniform_(-bound, bound, generator=draw)
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            layer.reset_parameters()
        else:
            raise InputError(f"layer {name}", type(layer).__name__, "linear, convolution, norm")
    return module


def _activation(name: str) -> type[nn.Module]:
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
