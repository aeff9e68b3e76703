"""What the local steps of several methods share: even weights, plain SGD, a step uphill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from isthmus.contracts import Meta
from isthmus.errors import InputError
from isthmus.federated.method import Method, Names
from isthmus.tree import Tree


def even(meta: Sequence[Meta]) -> Tensor:
    """The same weight for every upload: float64 `[n]`, sum 1."""
    return torch.full((len(meta),), 1.0 / len(meta), dtype=torch.float64)


def moving(names: Names) -> list[str]:
    """The tensors that both travel and are trained."""
    shared = set(names.shared)
    return [name for name in names.trainable if name in shared]


def plain_sgd(method: Method) -> None:
    """Raise `InputError` unless a step is `w - lr g`, on which the method's algebra stands."""
    rule = method.local.optimiser
    if rule.name != "sgd" or rule.init({"x": torch.zeros(1)}):
        given = rule.name if rule.name != "sgd" else "sgd with momentum"
        name = getattr(type(method), "catalogue_name", type(method).__name__)
        raise InputError("optimiser", given, f"plain sgd with method {name}")


def norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm of all entries together, in their own precision."""
    return torch.stack([x.square().sum() for x in tensors.values()]).sum().sqrt()


def uphill(
    params: Tree, along: Mapping[str, Tensor], rho: float | Tensor, eps: float = 1e-12
) -> Tree:
    """`params` moved by a vector of length rho along `along`; other names stay.

    The step of sharpness-aware minimisation (Foret et al., ICLR 2021, equation 2).
    """
    scale = rho / (norm(along) + eps)
    return {**params, **{name: params[name] + scale * x for name, x in along.items()}}
