"""FedPHP: the heir and the teaching by hand; without teaching the shared path is FedAvg's."""

from __future__ import annotations

import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from torch import Tensor

from isthmus import tree
from isthmus.federated.twin import own
from isthmus.tree import Tree


def test_by_hand() -> None:
    mu, T, lam = 0.8, 3, 0.4
    settings = {"mu": mu, "T": T, "lam": lam}
    fed = tiny.federation("fedphp", by_hand.TASK, epochs=2, settings=settings)
    w, heirs = by_hand.initial(), [by_hand.initial()] * 5
    for round in (1, 2, 3, 4):
        made, share = [], mu * min(1.0, round / T)
        for i in range(5):

            def loss(w: Tree, x: Tensor, y: Tensor, h: Tree = heirs[i]) -> Tensor:
                p, q = (by_hand.logits(m, x).softmax(1) for m in (h, w))
                gap = (p * (p / q).log()).sum(1).mean()
                return (1 - lam) * by_hand.entropy(w, x, y) + lam * gap

            parts = by_hand.batches(fed, by_hand.key_of(fed, round, i), i, 2)
            local = by_hand.descend(w, parts, loss=loss)
            heirs[i] = {n: share * heirs[i][n] + (1 - share) * local[n] for n in w}
            made.append(local)
        w = by_hand.mean(made)
        fed.step()
        kept = tiny.kept(fed)
        assert tiny.apart(fed.state["shared"], w) < 1e-12
        assert tiny.apart({n: kept[own(n)] for n in w}, tree.stack(heirs)) < 1e-12
    x = fed.ground.columns["x"][:5]
    for i, model in enumerate(by_hand.each(fed)):
        torch.testing.assert_close(by_hand.said(fed, i, model, x), by_hand.logits(heirs[i], x))


def test_without_teaching_the_shared_path_is_fedavgs_and_the_heir_stays() -> None:
    task = tiny.task(dropout=0.3)
    plain = tiny.play("fedavg", task, 3, epochs=2).state["shared"]
    fed = tiny.federation("fedphp", task, epochs=2, settings={"lam": 0.0})
    down, up, _ = by_hand.crossed(fed, 3)
    assert tree.equal(plain, fed.state["shared"]) and down == up == set(by_hand.ALL)
