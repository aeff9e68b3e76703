"""A personal model beside the shared one: a copy of its parameters that never leaves a client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from isthmus.federated.method import Method
from isthmus.learn.phase import Phase
from isthmus.models.bind import bind
from isthmus.models.factors import Places
from isthmus.tasks.contract import Role
from isthmus.tree import Tree

OWN = "own__"
"""Prefix of a parameter's copy, whose name has `__` for every dot."""


def own(name: str) -> str:
    """The name of the copy of a parameter.

    >>> own("features.linear0.weight")
    'own__features__linear0__weight'
    """
    return OWN + name.replace(".", "__")


class Twin(Method):
    """Clients keep a second model of the same shape and predict with it.

    Only parameters are copied. Running statistics of batch normalisation are those of the shared
    weights, and so are not exact for the personal ones when these predict.
    """

    of: dict[str, str]
    """The name of a copy -> the shared parameter that it is a copy of."""

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        # At the root and flat: a chain of layers would run through a child that is added to it.
        for name, x in list(module.named_parameters()):
            if x.requires_grad:
                module.register_parameter(own(name), nn.Parameter(x.detach().clone()))
        return module

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        out = dict(given)
        for name, role in given.items():
            if own(name) in given:
                out[own(name)] = "local" if role == "shared" else "frozen"
        return out

    def __post_init__(self) -> None:
        names = {own(name): name for name in self.names.trainable if name in self.names.shared}
        self.of = {copy: name for copy, name in names.items() if copy in self.names.local}

    @property
    def mine(self) -> tuple[str, ...]:
        """The trained parameters of the personal model."""
        return tuple(self.of)

    @property
    def ours(self) -> tuple[str, ...]:
        """The trained parameters of the shared model."""
        return tuple(name for name in self.names.trainable if name in self.names.shared)

    def phases(self, purpose: str) -> list[Phase]:
        return [replace(phase, trainable=self.ours) for phase in super().phases(purpose)]

    def personal(self, model: Any, key: Tensor | None = None) -> Any:
        """The model with the personal parameters in their places."""
        named = parameters(model)
        return bind(model, {name: named[copy] for copy, name in self.of.items()}, key)

    def predict(self, task: Any, model: Any, inputs: Tree, context: Any, kept: Tree) -> Any:
        return task.predict(self.personal(model), inputs, context)


def parameters(model: Any) -> Tree:
    """The parameters of a bound model by all their names."""
    return dict(model.named_parameters(remove_duplicate=False))
