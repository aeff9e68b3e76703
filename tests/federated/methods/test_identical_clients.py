"""Where all clients hold the same items, their own models are FedAvg's."""

from __future__ import annotations

from typing import Any

import pytest
from tests.federated import tiny
from tests.federated.methods import by_hand

TASK = by_hand.alike()
KEYS: dict[str, Any] = {"batch": 0, "epochs": 3}
"""Whole batches: then clients with the same items take the same steps."""


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedamp", {"lam": 0.0}),
        ("fedfomo", {"s": 0, "M": 2}),
        ("fedphp", {"mu": 0.0, "lam": 0.0}),
        ("fedproto", {"lam": 0.0, "by": "head"}),
        ("ifca", {"k": 1}),
        ("ifca", {"k": 3}),
        ("cfl", {"eps1": 100.0, "eps2": 0.0}),
        ("cfl", {"eps1": 0.0}),
    ],
)
def test_every_client_has_fedavgs_model(name: str, settings: dict[str, Any]) -> None:
    rounds = 3
    fed = tiny.play(name, TASK, rounds, settings=settings, **KEYS)
    fedavg = tiny.play("fedavg", TASK, rounds, **KEYS).state["shared"]
    if name == "ifca" and settings["k"] == 3:  # from where the chosen cluster began
        fedavg = picked(fed, rounds)
    x = fed.ground.columns["x"][:5]
    models = by_hand.each(fed)
    assert len(models) == 3
    for i, model in enumerate(models):
        said, expected = by_hand.said(fed, i, model, x, TASK), by_hand.logits(fedavg, x)
        assert tiny.apart({"y": said}, {"y": expected}) < 1e-12
    assert tiny.apart(fedavg, by_hand.initial(TASK)) > 1e-2


def picked(fed: Any, rounds: int) -> Any:
    """The first model of the cluster that all have chosen, trained by hand."""
    start = fed.method.init(by_hand.initial(TASK))["clusters"]
    rows = by_hand.batches(fed, 0, 0, 1, 0)
    models = [{n: t[j] for n, t in start.items()} for j in range(3)]
    losses = [float(by_hand.entropy(m, *rows[0])) for m in models]
    best = losses.index(min(losses))
    assert fed.state["members"].tolist() == [3.0 * (j == best) for j in range(3)]
    w = models[best]
    for _ in range(rounds):
        w = by_hand.descend(w, by_hand.batches(fed, 0, 0, 3, 0))
    return w
