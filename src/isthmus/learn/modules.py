"""A net cut into modules, each with a loss of its own: no gradient crosses a border.

The modules run in order in one forward pass. Each takes its gradient as soon as its output is
there and hands the output on without its graph, so one module's graph is alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.errors import InputError
from isthmus.models.bind import bind
from isthmus.models.vit import Patches
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

Function = Callable[[Tree], tuple[Tensor, Any]]
Gradient = Callable[[Function, Tree], tuple[Tree, Any]]
"""`gradient(function, params) -> (grads, extra)`, of a function that gives a scalar and extra."""


class Part(NamedTuple):
    """The children of `features` that are one module; `inlet` makes the features it starts from."""

    inlet: tuple[str, ...]
    body: tuple[str, ...]

    def enter(self, model: Any, x: Tensor) -> Tensor:
        return _run(model, self.inlet, x)

    def work(self, model: Any, h: Tensor) -> Tensor:
        return _run(model, self.body, h)


class Border(NamedTuple):
    """What a module other than the last has: its features `[b, ...]` before and after."""

    number: int
    model: Any
    before: Tensor
    after: Tensor


LocalLoss = Callable[[Border], tuple[Tensor, Tree]]
"""The loss of a module from its own border, and scalars to be logged."""


def _run(model: Any, names: tuple[str, ...], h: Tensor) -> Tensor:
    for name in names:
        h = getattr(model.features, name)(h)
    return h


def functional(function: Function, params: Tree) -> tuple[Tree, Any]:
    """By `torch.func`: also under `torch.vmap`."""
    return torch.func.grad(function, has_aux=True)(params)  # type: ignore[return-value]


def plain(function: Function, params: Tree) -> tuple[Tree, Any]:
    """By `torch.autograd.grad`, whose saved tensors can be watched."""
    leaves = {name: x.detach().requires_grad_() for name, x in params.items()}
    with torch.enable_grad():
        value, extra = function(leaves)
        got = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, got, strict=True)), _detached(extra)


def _detached(extra: Any) -> Any:
    if isinstance(extra, Tensor):
        return extra.detach()
    if isinstance(extra, dict):
        return {name: _detached(x) for name, x in extra.items()}
    return tuple(_detached(x) for x in extra)


def parts(model: Any, count: int) -> list[Part]:
    """The modules of a net: `count` of them, or one per block where it has fewer blocks.

    A block is a child of `features` with linear or convolution layers, and what follows it
    up to the next; the embedding of a Transformer belongs to the first module.
    """
    features = getattr(model, "features", None)
    if not isinstance(features, nn.Sequential) or not isinstance(model.head, nn.Linear):
        raise InputError("method", type(model).__name__, "a chain `features` and a linear `head`")
    inlet: list[str] = []
    blocks: list[list[str]] = []
    for name, child in features.named_children():
        heavy = any(isinstance(m, nn.Linear | nn.Conv2d) for m in child.modules())
        if isinstance(child, Patches) or (not heavy and not blocks):
            inlet.append(name)
        elif heavy:
            blocks.append([name])
        else:
            blocks[-1].append(name)
    if not blocks:
        raise InputError("method", "features without a layer", "a net with a block")
    grouped = np.array_split(np.arange(len(blocks)), min(count, len(blocks)))
    bodies = [tuple(name for i in group for name in blocks[i]) for group in grouped]
    return [Part(tuple(inlet) if k == 0 else (), body) for k, body in enumerate(bodies)]


def names_of(model: nn.Module, cut: list[Part], extra: Callable[[int], str]) -> list[list[str]]:
    """The parameters of each module; those under the prefix `extra(k)` are module k's too."""
    out: list[list[str]] = []
    for k, part in enumerate(cut):
        prefixes = [f"features.{name}." for name in (*part.inlet, *part.body)]
        prefixes.append("head." if k == len(cut) - 1 else extra(k))
        mine = tuple(prefixes)
        out.append([name for name, _ in model.named_parameters() if name.startswith(mine)])
    return out


def learn(
    loss: Callable[[Any, Batch], tuple[Tensor, Tree]],
    local: LocalLoss,
    model: nn.Module,
    batch: Batch,
    cut: list[Part],
    names: list[list[str]],
    gradient: Gradient = functional,
) -> tuple[Tensor, Tree, Tree]:
    """The value of `loss` (the last module's), scalars to be logged, and the gradient of each
    module's tensors in its own loss: `local` in all but the last."""
    tensors = {name: x.detach() for name, x in model.named_parameters()}

    def bound(params: Mapping[str, Tensor]) -> Any:
        return bind(model, {**tensors, **params}, key=batch.key)

    def border(k: int, h: Tensor, params: Tree) -> tuple[Tensor, tuple[Tensor, Tree]]:
        mine = bound(params)
        before = cut[k].enter(mine, h)
        after = cut[k].work(mine, before)
        value, aux = local(Border(k, mine, before.detach(), after))
        return value, (after, aux)

    def whole(x: Tensor, params: Tree, grads: Tree, logged: dict[str, Tree]) -> Tensor:
        h = x
        for k in range(len(cut) - 1):
            own = {name: tensors[name] for name in names[k]}
            got, (after, aux) = gradient(lambda p, k=k, h=h: border(k, h, p), own)
            grads.update(got)
            logged[str(k)] = aux
            h = after.detach()
        mine = bound(params)
        return mine.head(cut[-1].work(mine, cut[-1].enter(mine, h)))

    def last(params: Tree) -> tuple[Tensor, Any]:
        grads, logged = dict[str, Tensor](), dict[str, Tree]()
        value, aux = loss(lambda x: whole(x, params, grads, logged), batch)
        return value, (value, aux, grads, logged)

    own = {name: tensors[name] for name in names[-1]}
    got, (value, aux, grads, logged) = gradient(last, own)
    for name in next(iter(logged.values()), ()):
        aux = {**aux, name: torch.stack([each[name] for each in logged.values()]).mean()}
    return value, aux, {**grads, **got}
