"""FedBN: normalisation layers are found by type, stay at home and act where they were."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from torch import nn

from isthmus import tree
from isthmus.models.bind import bind
from isthmus.models.nets import Net
from isthmus.tree import Tree

NORMS = {
    "layer": lambda: nn.LayerNorm(9),
    "group": lambda: nn.GroupNorm(3, 9),
    "batch": lambda: nn.BatchNorm1d(9),
}
SIZES = (4, 12, 8)


def made(norm: str) -> Net:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers["lower"], layers["scaled"] = nn.Linear(tiny.WIDE, 9), NORMS[norm]()
        layers["act"] = nn.Tanh()
        return Net(nn.Sequential(layers), nn.Linear(9, tiny.CLASSES)).double()


OWN = ("features.scaled.weight", "features.scaled.bias")


@pytest.mark.parametrize("norm", NORMS)
def test_by_hand(norm: str) -> None:
    task = tiny.task(SIZES, module=lambda seed: made(norm))
    fed = tiny.federation("fedbn", task, batch=4)
    plain = made(norm)
    w = {n: p.detach() for n, p in plain.named_parameters()}
    rest = tuple(n for n in w if n not in OWN)

    def loss(w: Tree, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(bind(plain, w)(x), y)

    shared, owns = by_hand.only(w, rest), [by_hand.only(w, OWN)] * 3
    for round in (1, 2):
        sent = []
        for i in range(3):
            parts = by_hand.batches(fed, by_hand.key_of(fed, round, i), i, 1, 4)
            own = by_hand.descend({**shared, **owns[i]}, parts, loss=loss)
            owns[i] = by_hand.only(own, OWN)
            sent.append(by_hand.only(own, rest))
        shared = by_hand.mean(sent, torch.tensor(SIZES, dtype=torch.float64))
        fed.step()
    assert tiny.apart(fed.state["shared"], shared) < 1e-12
    kept = {n.replace("norm__", "").replace("__", "."): x for n, x in tiny.kept(fed).items()}
    assert tiny.apart(kept, tree.stack(owns)) < 1e-12
    x = fed.ground.columns["x"][:6]
    for i, tensors in enumerate(by_hand.each(fed)):
        own = bind(plain, {**shared, **owns[i]}).train()  # by the statistics of these items
        torch.testing.assert_close(bind(fed.ground.module, tensors).train()(x), own(x))
    apart = tiny.apart(owns[0], owns[1])
    assert apart > 1e-3


def test_normalisation_never_crosses() -> None:
    fed = tiny.federation("fedbn", tiny.task(SIZES, module=lambda seed: made("layer")))
    down, up, _ = by_hand.crossed(fed, 2)
    assert down == up == {"features.lower.weight", "features.lower.bias", "head.weight",
                          "head.bias"}  # fmt: skip
    assert fed.method.names.local == (
        "norm__features__scaled__weight",
        "norm__features__scaled__bias",
    )


def test_without_normalisation_it_is_fedavg() -> None:
    a, b = (tiny.play(n, by_hand.TASK, 2, epochs=2) for n in ("fedbn", "fedavg"))
    assert tree.equal(a.state["shared"], b.state["shared"])
