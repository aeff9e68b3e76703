"""Every reducer, selector and attack of the catalogue leaves the uploads as they are.

They may lie in the memory in which clients left them, and decoding does not copy them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus import catalogue, tree
from isthmus.contracts import Context, Meta, Reducer, Selector, Updates, View
from isthmus.federated.mean import Mean
from isthmus.federated.stack import Stack
from isthmus.run import pieces

N = 9


def uploads() -> Updates:
    g = torch.Generator().manual_seed(4)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(N, *shape, generator=g)

    return Updates(
        delta={"w": some(3, 2), "b": some(4)},
        values={"v": some(2, 5)},
        buffers={"m": some(3)},
        meta=[Meta(i, 1, 0, 2.0 + i) for i in range(N)],
    )


def made() -> dict[str, Any]:
    named = {
        f"{place}/{name}": pieces.make(place, name, f=2)
        for place in ("reducer", "selector", "attack")
        for name in catalogue.names(place)
    }
    return {"reducer/mean": Mean(), "reducer/stack": Stack(), **named}


@pytest.mark.parametrize("name", made())
def test_uploads_stay_as_they_are(name: str) -> None:
    piece, given, before = made()[name], uploads(), uploads()
    weights = torch.linspace(0.1, 0.2, N, dtype=torch.float64)
    if isinstance(piece, Selector):
        piece.select(given, Context(1, 7))
    elif isinstance(piece, Reducer):
        piece.reduce(given, weights, Context(1, 7))
    else:
        own, others = [0, 1], list(range(2, N))
        seen = {"own_update": given.take(own), "benign_updates": given.take(others)}
        held = {kind: uploads().take(rows) for kind, rows in zip(seen, (own, others), strict=True)}
        piece.craft(seen["own_update"], View(piece.threat, 3, **seen))
        for kind, kept in held.items():
            assert all(
                tree.equal(a, b) for a, b in zip(parts(seen[kind]), parts(kept), strict=True)
            )
    assert all(tree.equal(a, b) for a, b in zip(parts(given), parts(before), strict=True))


def parts(updates: Updates) -> list[tree.Tree]:
    return [updates.delta, updates.values, updates.buffers]
