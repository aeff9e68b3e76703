"""A model of two halves, `features` and `head`, of which one may stay with its client."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from isthmus.errors import InputError
from isthmus.tasks.contract import Role


def demand(module: nn.Module, kind: type) -> nn.Module:
    """The module; raises `InputError` unless it has the two halves that this method needs."""
    for half in ("features", "head"):
        if not isinstance(getattr(module, half, None), nn.Module):
            raise InputError("method", _name(kind), f"one for a model without {half}")
    return module


def linear_head(module: nn.Module, kind: type) -> nn.Linear:
    """The head; raises `InputError` unless it is one linear layer."""
    head = demand(module, kind).head
    if not isinstance(head, nn.Linear):
        raise InputError(
            "method", _name(kind), "one for a model whose head is not one linear layer"
        )
    return head


def _name(kind: type) -> str:
    return getattr(kind, "catalogue_name", kind.__name__)


def is_head(name: str) -> bool:
    """True for the name of a tensor of the head."""
    return name.startswith("head.")


def personal(given: Mapping[str, Role], mine: Callable[[str], bool]) -> dict[str, Role]:
    """The roles with what was shared and is `mine` made local."""
    return {n: "local" if role == "shared" and mine(n) else role for n, role in given.items()}
