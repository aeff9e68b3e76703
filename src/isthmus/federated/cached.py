"""One model per client at the server, of which the shared model is the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from isthmus.tree import Tree


@dataclass
class Cache:
    """`entries` by client, empty before the first mix; equal entries are one object."""

    entries: dict[int, Tree] = field(default_factory=dict)

    def put(self, models: Mapping[int, Tree]) -> None:
        """Replace the entries of these clients."""
        self.entries = {**self.entries, **models}

    def from_now(self, now: Tree) -> Tree:
        """Every entry's distance from the present model `[n, ...]`, in the order of clients."""
        held = [self.entries[client] for client in sorted(self.entries)]
        return {name: torch.stack([model[name] for model in held]) - x for name, x in now.items()}

    def journal(self) -> tuple[list[list[int]], dict[str, Tree]]:
        """Which of the models is whose `[[client, number], ...]`, and the models by number."""
        models = {id(model): model for model in self.entries.values()}
        places = {name: number for number, name in enumerate(models)}
        whose = [[client, places[id(model)]] for client, model in self.entries.items()]
        return whose, {str(i): model for i, model in enumerate(models.values())}

    def take_up(self, whose: Sequence[Sequence[int]], models: Mapping[str, Any]) -> None:
        """Take up a `journal` again."""
        self.entries = {client: models[str(number)] for client, number in whose}
