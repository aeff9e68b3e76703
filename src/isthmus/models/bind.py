"""A module as a function of named tensors.

`bind(module, tensors)` gives a module that computes with `tensors` and leaves `module`
as it was, so one definition of a model serves plain PyTorch, `torch.func` and tracing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from isthmus.models.dropout import KeyedDropout
from isthmus.tree import Tree


def tensors_of(module: nn.Module) -> Tree:
    """Every parameter and buffer by name (detached, shared storage), tied tensors once."""
    named = {name: p.detach() for name, p in module.named_parameters()}
    named.update({name: b.detach() for name, b in module.named_buffers()})
    return named


def trainable(module: nn.Module) -> list[str]:
    """Names of the floating-point parameters that ask for a gradient."""
    return [name for name, p in module.named_parameters() if p.requires_grad]


def aliases(module: nn.Module) -> dict[str, str]:
    """Second names of tied tensors -> the name under which `tensors_of` lists them."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, x in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        if id(x) in first:
            tied[name] = first[id(x)]
        else:
            first[id(x)] = name
    return tied


def bind(module: nn.Module, tensors: Mapping[str, Tensor], key: Tensor | None = None) -> nn.Module:
    """A copy of the module tree that holds `tensors` instead of its own.

    Nothing is copied but the modules' dictionaries; `module.features`, `module.head` and
    every other attribute work as in plain PyTorch. Tensors that are not named keep the
    module's own. Tied tensors are named once and bound everywhere. `key` (an int64 scalar) is
    what dropout draws from.
    """
    first: dict[int, Tensor] = {}
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        if name in tensors:
            first[id(x)] = tensors[name]
    return _copy(module, first, {}, key)


def _copy(
    module: nn.Module, new: dict[int, Tensor], seen: dict[int, nn.Module], key: Tensor | None
) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    twin = module.__class__.__new__(module.__class__)
    seen[id(module)] = twin
    state = dict(module.__dict__)
    for store in ("_parameters", "_buffers"):
        own = state[store]
        if own:
            state[store] = {
                name: None if x is None else new.get(id(x), x) for name, x in own.items()
            }
    if state["_modules"]:
        state["_modules"] = {
            name: None if child is None else _copy(child, new, seen, key)
            for name, child in state["_modules"].items()
        }
    if isinstance(module, KeyedDropout):
        state["draw"] = key
    twin.__dict__ = state
    return twin


def write(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy `tensors` into the module's own storage (the end of a run); returns the module."""
    own = dict([*module.named_parameters(), *module.named_buffers()])
    with torch.no_grad():
        for name, x in tensors.items():
            own[name].copy_(x)
    return module
