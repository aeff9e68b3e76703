"""FedNova: equal step counts are FedAvg; unequal ones no longer pull the fixed point."""

from __future__ import annotations

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import hand

from isthmus import tree
from isthmus.errors import InputError


def test_equal_steps_are_fedavg() -> None:
    keys = {"steps": 4, "lr": 0.1}
    a, b = (tiny.play(name, hand.TASK, 3, **keys) for name in ("fednova", "fedavg"))
    assert tiny.apart(hand.shared(a), hand.shared(b)) < 1e-13
    a, b = (tiny.play(name, hand.TASK, 1, epochs=2) for name in ("fednova", "fedavg"))
    assert tiny.apart(hand.shared(a), hand.shared(b)) > 1e-2


def test_by_hand() -> None:
    fed = tiny.federation("fednova", hand.TASK, cohort=3, epochs=2)
    w = hand.initial()
    for round in range(1, 4):
        chosen = fed.schedule.clients(round).tolist()
        p = torch.tensor([float(tiny.RAGGED[i]) for i in chosen], dtype=torch.float64)
        p = p / p.sum()
        d, tau = [], []
        for i in chosen:
            v, k = hand.steps(fed, round, i, w, lambda slope, v: slope(v), epochs=2)
            d.append(tree.scale(tree.sub(v, w), 1.0 / k))
            tau.append(float(k))
        assert len(set(tau)) > 1
        mean = tree.weighted_mean(tree.stack(d), p)
        w = hand.up(w, mean, float(p @ torch.tensor(tau, dtype=torch.float64)))
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-12


def test_the_fixed_point_does_not_follow_the_number_of_steps() -> None:
    """Two parabolas at 0 and 6, whose clients take 1 and 5 steps: FedAvg ends near the busier."""
    columns = torch.tensor([[1.0, 0.0]] + 5 * [[1.0, 6.0]], dtype=torch.float64)
    data = columns, torch.zeros(6, dtype=torch.int64)
    task = tiny.task([1, 5], module=lambda seed: hand.Point(), data=data, loss=hand.parabola)
    keys = {"batch": 1, "lr": 0.03}
    nova, avg = (tiny.play(name, task, 60, **keys) for name in ("fednova", "fedavg"))
    objective = 5.0  # (1 * 0 + 5 * 6) / 6, the weighted optimum
    assert abs(float(hand.shared(nova)["w"]) - objective) < 0.1  # the rest is of the order of lr
    assert float(hand.shared(avg)["w"]) - objective > 0.5


def test_other_optimisers_are_refused() -> None:
    with pytest.raises(InputError, match="plain sgd with method fednova"):
        tiny.federation("fednova", hand.TASK, optimiser="sgd:momentum=0.9")
