"""q-FFL: q = 0 is even FedAvg; by hand; where it comes to rest; how even it is."""

from __future__ import annotations

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import hand
from torch import nn
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.errors import InputError
from isthmus.models.bind import bind
from isthmus.models.nets import initialise


def test_q_zero_is_even_fedavg() -> None:
    fed = tiny.federation("q-ffl", hand.TASK, cohort=3, epochs=2, settings={"q": 0.0})
    w = hand.initial()
    for round in (1, 2):
        chosen = fed.schedule.clients(round).tolist()
        rule = lambda slope, v: slope(v)  # noqa: E731
        w = hand.mean([hand.steps(fed, round, i, w, rule, epochs=2)[0] for i in chosen])
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-13


def test_by_hand() -> None:
    q, lr = 1.7, 0.1
    fed = tiny.federation("q-ffl", hand.TASK, cohort=3, epochs=2, settings={"q": q})
    w = hand.initial()
    for round in (1, 2, 3):
        above, below = tree.zeros_like(w), 0.0
        for i in fed.schedule.clients(round).tolist():
            items = torch.from_numpy(fed.ground.owned.rows(i))
            x, y = fed.ground.columns["x"][items], fed.ground.columns["y"][items]
            loss = float(F.cross_entropy(bind(fed.ground.module, w)(x), y))
            v, _ = hand.steps(fed, round, i, w, lambda slope, v: slope(v), epochs=2)
            d = tree.scale(tree.sub(w, v), 1.0 / lr)
            above = hand.up(above, d, loss**q)
            square = float(hand.norm(d)) ** 2
            below += q * loss ** (q - 1.0) * square + loss**q / lr
        w = hand.up(w, above, -1.0 / below)
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-9  # F is raised by 1e-10


def test_it_rests_where_the_sum_of_powers_is_least() -> None:
    """sum_i F_i^q F_i' = 0 on parabolas, and the worst loss falls as q grows."""
    task, a, b = hand.quadratics()
    worst = []
    for q in (0.0, 1.0, 4.0):
        fed = tiny.play("q-ffl", task, 30, lr=0.5, settings={"q": q}, executor="vectorised")
        w = hand.shared(fed)["w"]
        losses, slopes = 0.5 * a * (w - b) ** 2, a * (w - b)
        terms = losses**q * slopes
        assert abs(float(terms.sum())) < 1e-6 * float(terms.abs().sum())
        worst.append(float(losses.max()))
    assert worst[0] > 1.1 * worst[1] > 1.3 * worst[2]


def test_measuring_is_counted_and_only_sgd_is_taken() -> None:
    """One gradient on all items beside the two passes over them."""
    fair, avg = (tiny.play(name, hand.TASK, 1, epochs=2) for name in ("q-ffl", "fedavg"))
    assert fair.ledger.total("flops") == pytest.approx(1.5 * avg.ledger.total("flops"))
    with pytest.raises(InputError, match="plain sgd with method q-ffl"):
        tiny.federation("q-ffl", hand.TASK, optimiser="adam")


def test_a_higher_q_evens_the_accuracies() -> None:
    """Four clients ask for the sign of x_0 and one for that of x_1, of one linear model."""
    x = seeds.normal(7, (500, 2), torch.float64)
    y = torch.cat([x[:400, 0] > 0, x[400:, 1] > 0]).long()

    def linear(seed: int) -> nn.Module:
        return initialise(nn.Linear(2, 2), seed).double()

    task = tiny.task([100] * 5, module=linear, data=(x, y))
    std, mean = [], []
    for q in (0.0, 2.0, 8.0):
        keys = {"lr": 1.0, "batch": 0, "executor": "vectorised", "settings": {"q": q}}
        fed = tiny.play("q-ffl", task, 40, **keys)
        model = bind(fed.ground.module, hand.shared(fed))
        right = (model(x).argmax(1) == y).double().view(5, 100).mean(1)
        std.append(float(right.std()))
        mean.append(float(right.mean()))
    assert std[0] > 1.3 * std[1] > 1.4 * std[2] and mean[0] > mean[2] > 0.6
