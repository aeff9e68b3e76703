"""A small net layer by layer, with the derivatives of each single layer written out.

What learning without backpropagation needs: a net is a chain of layers `o = act(norm(W h + b))`,
the input h of each is taken as given, and from an error at o comes the gradient of that layer
alone. Nothing here builds a graph for `torch.autograd`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from isthmus.errors import InputError
from isthmus.models.dropout import KeyedDropout
from isthmus.models.recurrent import Last, Recurrent
from isthmus.tree import Tree

BETWEEN = (
    *(nn.Flatten, nn.Identity, nn.Dropout, KeyedDropout, Last),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
)
"""Layers without weights, which a signal does not have to cross."""


def _gelu(z: Tensor, o: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0))) + z * density


def _silu(z: Tensor, o: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


SLOPES: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.ReLU: lambda z, o: (z > 0).to(z.dtype),
    nn.Tanh: lambda z, o: 1.0 - o * o,
    nn.Sigmoid: lambda z, o: o * (1.0 - o),
    nn.GELU: _gelu,
    nn.SiLU: _silu,
}
"""The derivative of each activation, from its input z and output o."""


class Layer(NamedTuple):
    """One layer with weights: `before` shapes its input, `act` is None for the output layer.

    `name` and `norm_name` are the names of `affine` and `norm` in the model.
    """

    name: str
    before: tuple[nn.Module, ...]
    affine: nn.Module
    norm_name: str = ""
    norm: nn.GroupNorm | None = None
    act: nn.Module | None = None

    @property
    def units(self) -> int:
        """The number of units, or of channels."""
        if isinstance(self.affine, Recurrent):
            return self.affine.width
        kind = self.affine.out_channels if isinstance(self.affine, nn.Conv2d) else None
        return int(kind if kind is not None else self.affine.out_features)  # type: ignore[arg-type]

    @property
    def inputs(self) -> int:
        """The number of values that a unit reads."""
        if isinstance(self.affine, Recurrent):
            return self.affine.inputs.in_features
        return int(self.affine.weight[0].numel())  # type: ignore[index, operator]

    @property
    def two_sided(self) -> bool:
        """Whether outputs lie about zero, as those of tanh do."""
        return isinstance(self.act, nn.Tanh)


class Seen(NamedTuple):
    """A layer at work: its input h, what its activation sees z, its output o.

    `raw` is `W h + b` where a norm follows, `back` the outputs one time step earlier of a
    recurrent layer.
    """

    layer: Layer
    h: Tensor
    z: Tensor
    o: Tensor
    raw: Tensor | None = None
    back: Tensor | None = None


def layers(model: Any) -> list[Layer]:
    """The layers of `model.features` and `model.head`, in order.

    Raises `InputError` naming the layer for a net that is no such chain.
    """
    features, head = getattr(model, "features", None), getattr(model, "head", None)
    if not isinstance(features, nn.Sequential) or not isinstance(head, nn.Linear):
        raise InputError("method", type(model).__name__, "a chain `features` and a linear `head`")
    found: list[Layer] = []
    before: list[nn.Module] = []
    current: Layer | None = None
    for name, layer in _leaves("features", features):
        if isinstance(layer, BETWEEN) and current is None:
            before.append(layer)
        elif isinstance(layer, Recurrent) and current is None:
            found.append(Layer(name, tuple(before), layer, act=layer.act))
            before = []
        elif isinstance(layer, nn.Linear | nn.Conv2d) and current is None:
            if isinstance(layer, nn.Conv2d) and not _plain(layer):
                raise InputError(f"layer {name}", "its padding", "zeros, as a number")
            current, before = Layer(name, tuple(before), layer), []
        elif isinstance(layer, nn.GroupNorm) and current is not None and current.norm is None:
            current = current._replace(norm=layer, norm_name=name)
        elif type(layer) in SLOPES and current is not None and _exact(layer):
            found.append(current._replace(act=layer))
            current = None
        else:
            raise InputError(f"layer {name}", type(layer).__name__, _ALLOWED)
    if current is not None:
        raise InputError(f"layer {current.name}", "no activation after it", _ALLOWED)
    return [*found, Layer("head", tuple(before), head)]


_ALLOWED = (
    "linear, convolution or recurrent layers, each with an activation after it, and pooling or "
    "flattening between them"
)


def _leaves(prefix: str, chain: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    for name, child in chain.named_children():
        if isinstance(child, nn.Sequential):
            yield from _leaves(f"{prefix}.{name}", child)
        else:
            yield f"{prefix}.{name}", child


def _plain(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _exact(act: nn.Module) -> bool:
    return not isinstance(act, nn.GELU) or act.approximate == "none"


def walk(chain: Sequence[Layer], x: Tensor) -> Iterator[Seen]:
    """Forward through the layers, one at a time; the last output is the net's.

    Only what was yielded last is held here, so a caller that keeps nothing needs the memory of
    two layers, however many there are.
    """
    h = x
    for layer in chain:
        for shape in layer.before:
            h = shape(h)
        seen = at(layer, h)
        h = seen.o
        yield seen


def at(layer: Layer, h: Tensor) -> Seen:
    """A layer on its (shaped) input h."""
    if isinstance(layer.affine, Recurrent):
        z, o = layer.affine.unrolled(h)
        back = torch.cat([torch.zeros_like(o[:, :1]), o[:, :-1]], dim=1)
        return Seen(layer, h, z, o, back=back)
    raw = layer.affine(h)
    z = raw if layer.norm is None else layer.norm(raw)
    o = z if layer.act is None else layer.act(z)
    return Seen(layer, h, z, o, raw=None if layer.norm is None else raw)


def per_unit(seen: Seen, t: Tensor) -> Tensor:
    """One number per unit `[b, units]`, alike at every position of the output.

    Positions are those of a picture or the time steps of a recurrent layer.
    """
    if isinstance(seen.layer.affine, nn.Conv2d):
        return t[:, :, None, None]
    return t[:, None, :] if isinstance(seen.layer.affine, Recurrent) else t


def shares(seen: Seen, last: bool = False) -> Tensor | float:
    """What each position counts: all alike, and 1 together.

    With `last`, the last time step of a recurrent layer alone counts.
    """
    if isinstance(seen.layer.affine, nn.Conv2d):
        return 1.0 / (seen.o.shape[2] * seen.o.shape[3])
    if not isinstance(seen.layer.affine, Recurrent):
        return 1.0
    steps = seen.o.shape[1]
    if not last:
        return 1.0 / steps
    return (torch.arange(steps, device=seen.o.device) == steps - 1).to(seen.o.dtype)[:, None]


def gradient(seen: Seen, error: Tensor) -> Tree:
    """The gradient of a layer's own tensors, its input taken as given.

    `error` is dJ/do, broadcastable to the output; J is summed over the items.
    """
    layer, h = seen.layer, seen.h
    d = error if layer.act is None else error * SLOPES[type(layer.act)](seen.z, seen.o)
    grads: Tree = {}
    if layer.norm is not None and seen.raw is not None:
        own, d = _norm(layer.norm, seen.raw, d)
        grads |= {f"{layer.norm_name}.{name}": g for name, g in own.items()}
    if isinstance(layer.affine, nn.Conv2d):
        conv: Any = layer.affine  # torch declares fewer kinds of settings than it takes
        how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        grads[f"{layer.name}.weight"] = conv2d_weight(h, conv.weight.shape, d, *how)
        if conv.bias is not None:
            grads[f"{layer.name}.bias"] = d.sum((0, 2, 3))
        return grads
    if isinstance(layer.affine, Recurrent):
        assert seen.back is not None  # `at` gives it with every recurrent layer
        grads[f"{layer.name}.state.weight"] = _outer(d, seen.back)
        parts = layer.affine.inputs, f"{layer.name}.inputs"
    else:
        parts = layer.affine, layer.name
    linear, name = parts
    grads[f"{name}.weight"] = _outer(d, h)
    if linear.bias is not None:
        grads[f"{name}.bias"] = d.flatten(0, -2).sum(0)
    return grads


def _outer(d: Tensor, h: Tensor) -> Tensor:
    return d.flatten(0, -2).mT @ h.flatten(0, -2)


def _norm(norm: nn.GroupNorm, x: Tensor, d: Tensor) -> tuple[Tree, Tensor]:
    """The gradients of a group normalisation's own tensors, and of its input."""
    grouped = (x.shape[0], norm.num_groups, -1)
    each = x.reshape(grouped)
    mean = each.mean(-1, keepdim=True)
    scale = torch.rsqrt((each - mean).square().mean(-1, keepdim=True) + norm.eps)
    flat = (each - mean) * scale
    own: Tree = {}
    if norm.affine:
        over = (0, *range(2, x.ndim))
        own = {"weight": (d * flat.reshape(x.shape)).sum(over), "bias": d.sum(over)}
        d = d * norm.weight.reshape(1, -1, *[1] * (x.ndim - 2))
    d = d.reshape(grouped)
    inner = d - d.mean(-1, keepdim=True) - flat * (d * flat).mean(-1, keepdim=True)
    return own, (scale * inner).reshape(x.shape)


def handed(model: nn.Module, grads: Mapping[str, Tensor], value: Tensor) -> Tensor:
    """A scalar of this value whose gradient in the tensors of `model` is `grads`.

    It is linear in them, so the engine that differentiates it saves nothing of the net.
    """
    line = torch.zeros((), dtype=value.dtype, device=value.device)
    for name, x in model.named_parameters():
        if name in grads:
            line = line + (grads[name].detach() * x).sum()
    return value.detach() + (line - line.detach())
