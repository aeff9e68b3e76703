"""IFCA: choice and averages by hand, and what goes up."""

from __future__ import annotations

import torch
from tests.federated import tiny
from tests.federated.methods import by_hand

from isthmus import tree


def test_by_hand() -> None:
    """Each client counts for the cluster it picked, and for no other."""
    fed = tiny.federation("ifca", by_hand.TASK, epochs=2, lr=0.5, settings={"k": 3})
    start = fed.state["clusters"]
    models = [tree.row(start, j) for j in range(3)]
    assert tree.equal(models[0], by_hand.initial())
    for name, x in models[1].items():
        assert torch.equal(x.flatten().sort()[0], models[0][name].flatten().sort()[0])
    picks = set()
    for round in (1, 2, 3):
        made: list[list] = [[], [], []]
        for i in range(5):
            ((x, y),) = by_hand.batches(fed, 0, i, 1, 0)
            losses = [float(by_hand.entropy(m, x, y)) for m in models]
            j = losses.index(min(losses))
            picks.add(j)
            parts = by_hand.batches(fed, by_hand.key_of(fed, round, i, 1), i, 2)
            made[j].append((by_hand.descend(models[j], parts, lr=0.5), tiny.RAGGED[i]))
        for j, some in enumerate(made):
            if some:
                sizes = torch.tensor([n for _, n in some], dtype=torch.float64)
                models[j] = by_hand.mean([m for m, _ in some], sizes)
        fed.step()
        assert tiny.apart(fed.state["clusters"], tree.stack(models)) < 1e-12
        assert fed.state["members"].tolist() == [float(len(some)) for some in made]
    assert len(picks) > 1
    for i, model in enumerate(by_hand.each(fed)):
        ((x, y),) = by_hand.batches(fed, 0, i, 1, 0)
        losses = [float(by_hand.entropy(m, x, y)) for m in models]
        own = {n: model[n] for n in models[0]}
        assert tiny.apart(own, models[losses.index(min(losses))]) < 1e-12


def test_k_models_go_down_and_one_comes_up() -> None:
    fed = tiny.federation("ifca", by_hand.TASK, settings={"k": 3})
    down, up, _ = by_hand.crossed(fed, 1)
    assert down == {f"clusters/{n}" for n in by_hand.ALL} and up == {*by_hand.ALL, "pick"}
    size = by_hand.bytes_of(by_hand.initial(), by_hand.ALL)
    sums = fed.ledger.sums("values", by="kind", what="crossing")
    assert sums == {"model": 5 * 3 * size, "update": 5 * (size + 3 * 8)}


def test_judging_is_k_forwards_and_no_more() -> None:
    flops = {k: tiny.play("ifca", by_hand.TASK, 1, settings={"k": k}).ledger.total("flops")
             for k in (1, 2, 3)}  # fmt: skip
    forward = 2 * (tiny.WIDE * tiny.HIDDEN + tiny.HIDDEN * tiny.CLASSES) * sum(tiny.RAGGED)
    for k in (1, 2):
        assert abs((flops[k + 1] - flops[k]) / forward - 1) < 0.1
