"""Ditto: the global path is FedAvg's to the bit, the personal one a proximal descent by hand."""

from __future__ import annotations

import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from torch import Tensor, nn

from isthmus import tree
from isthmus.federated.twin import own
from isthmus.tree import Tree


def test_the_global_path_is_fedavgs_to_the_bit() -> None:
    task = tiny.task(dropout=0.3)
    keys = {"epochs": 2, "cohort": 3}
    plain, ditto = (tiny.federation(n, task, **keys) for n in ("fedavg", "ditto"))
    up, down, sent = by_hand.crossed(plain, 3)
    up_too, down_too, sent_too = by_hand.crossed(ditto, 3)
    assert (up, down) == (up_too, down_too)
    for a, b in zip(sent, sent_too, strict=True):
        assert tree.equal(a.delta, b.delta) and not b.values and not b.buffers
    assert tree.equal(plain.state["shared"], ditto.state["shared"])
    assert len(ditto.method.names.local) == 4


def test_the_personal_path_by_hand() -> None:
    lam, epochs = 0.6, 2
    fed = tiny.federation("ditto", by_hand.TASK, epochs=epochs, settings={"lam": lam})
    owns = [by_hand.initial()] * 5
    for round in (1, 2, 3):
        w = tree.clone(fed.state["shared"])

        def loss(v: Tree, x: Tensor, y: Tensor, w: Tree = w) -> Tensor:
            tie = sum((v[n] - w[n]).square().sum() for n in w)
            return by_hand.entropy(v, x, y) + lam / 2 * tie

        for i in range(5):
            parts = by_hand.batches(fed, by_hand.key_of(fed, round, i, 1), i, epochs)
            owns[i] = by_hand.descend(owns[i], parts, loss=loss)
        fed.step()
        kept = tiny.kept(fed)
        for name, x in tree.stack(owns).items():
            torch.testing.assert_close(kept[own(name)], x, rtol=1e-12, atol=1e-13)
    x = fed.ground.columns["x"][:5]
    for i, tensors in enumerate(by_hand.each(fed)):
        torch.testing.assert_close(by_hand.said(fed, i, tensors, x), by_hand.logits(owns[i], x))


def test_a_chain_of_layers_may_have_a_twin() -> None:
    def chain() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(nn.Linear(tiny.WIDE, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    task = tiny.task(module=chain)
    a, b = (tiny.play(n, task, 2).state["shared"] for n in ("fedavg", "ditto"))
    assert tree.equal(a, b)
