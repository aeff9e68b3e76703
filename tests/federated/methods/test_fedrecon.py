"""FedRecon: the head is rebuilt on even items from its first value, the body moves on odd ones."""

from __future__ import annotations

import numpy as np
import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from tests.federated.methods.by_hand import BODY, HEAD
from torch import Tensor

from isthmus import tree
from isthmus.federated.method import Local
from isthmus.federated.portion import Portion
from isthmus.federated.round import Federation
from isthmus.learn.plan import shuffled_epochs
from isthmus.models import optim


def half(
    fed: Federation, key: int, client: int, odd: int, epochs: int
) -> list[tuple[Tensor, Tensor]]:
    rows = torch.from_numpy(fed.ground.owned.rows(client))[odd::2]
    if not len(rows):
        return []
    plan = shuffled_epochs(key, len(rows), epochs, 8)
    parts = [rows[i[w > 0]] for i, w in zip(plan.index, plan.weight, strict=True)]
    return [(fed.ground.columns["x"][p], fed.ground.columns["y"][p]) for p in parts]


def test_by_hand() -> None:
    fed = tiny.federation("fedrecon", by_hand.TASK, epochs=2, settings={"k_r": 3})
    w = by_hand.initial()
    for round in (1, 2, 3):
        made = []
        for i in range(5):
            even, odd = (
                half(fed, by_hand.key_of(fed, round, i, phase), i, phase, epochs)
                for phase, epochs in ((0, 3), (1, 2))
            )
            own = by_hand.descend(by_hand.descend(w, even, HEAD), odd, BODY)
            made.append({**w, **by_hand.only(own, BODY)})
        w = by_hand.mean(made)
        fed.step()
        assert tiny.apart(fed.state["shared"], by_hand.only(w, BODY)) < 1e-13
    for i, model in enumerate(by_hand.each(fed)):
        parts = by_hand.batches(fed, by_hand.key_of(fed, 4, i, what="score"), i, 3)
        assert tiny.apart(model, by_hand.descend(w, parts, HEAD)) < 1e-13


def test_nothing_stays_and_the_head_never_crosses() -> None:
    fed = tiny.federation("fedrecon", by_hand.TASK)
    down, up, _ = by_hand.crossed(fed, 3)
    assert down == up == set(BODY)
    first = by_hand.only(by_hand.initial(), HEAD)
    assert tree.equal(tiny.kept(fed), tree.stack([first] * 5))


def test_the_two_portions_are_the_items() -> None:
    sizes = np.array([1, 2, 5, 11, 30])
    local = Local(optim.sgd(), batch=4)
    for stride in (2, 3, 5):
        some, rest = (Portion(local, stride, rest=r).plans(sizes, sizes) for r in (False, True))
        for i, size in enumerate(sizes.tolist()):
            first, then = (sorted(p.index[i][p.weight[i] > 0].tolist()) for p in (some, rest))
            assert first == list(range(0, size, stride))
            assert sorted(first + then) == list(range(size))
            assert int(rest.index[i].max()) < size
    none = Portion(local, 2, rest=True).plans(sizes[:1], sizes[:1])
    assert not none.weight.any()
