"""AFL: the minimax point in closed form, the projection, and its limit."""

from __future__ import annotations

import torch
from tests.federated import tiny
from tests.federated.methods import hand

from isthmus import seeds
from isthmus.federated.methods.afl import LAMBDA, onto_simplex


def test_without_ascent_it_is_even_fedavg() -> None:
    fed = tiny.federation("afl", hand.TASK, cohort=3, epochs=2, settings={"gamma": 0.0})
    w = hand.initial()
    for round in (1, 2):
        chosen = fed.schedule.clients(round).tolist()
        rule = lambda slope, v: slope(v)  # noqa: E731
        w = hand.mean([hand.steps(fed, round, i, w, rule, epochs=2)[0] for i in chosen])
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-13


def test_the_worst_parabolas_are_balanced() -> None:
    """min_w max_i (w - b_i)^2 / 2 lies midway between the outermost b, whatever lies within."""
    b = torch.tensor([-4.0, 1.0, 1.5, 2.0, 8.0], dtype=torch.float64)
    columns = torch.stack([torch.ones(5).double(), b], 1), torch.zeros(5, dtype=torch.int64)
    task = tiny.task([1] * 5, module=lambda seed: hand.Point(), data=columns, loss=hand.parabola)
    fed = tiny.play("afl", task, 70, lr=0.5, settings={"gamma": 0.002}, executor="vectorised")
    assert abs(float(hand.shared(fed)["w"]) - 2.0) < 1e-5
    lam = fed.state["lambda"][LAMBDA]
    torch.testing.assert_close(lam, torch.tensor([0.5, 0, 0, 0, 0.5]).double(), atol=1e-5, rtol=0)


def test_the_first_rounds_by_hand() -> None:
    """Losses are of the model that was sent, and only those present climb."""
    task, a, b = hand.quadratics(4)
    fed = tiny.federation("afl", task, cohort=2, lr=0.1, settings={"gamma": 0.05})
    w, lam = torch.zeros(1).double(), torch.full((4,), 0.25).double()
    for round in range(1, 6):
        chosen = fed.schedule.clients(round)
        move = torch.zeros(1).double()
        climbed = lam.clone()
        for i in chosen.tolist():
            move = move - 0.1 * a[i] * (w - b[i]) * lam[i] / lam[chosen].sum()
            climbed[i] += 0.05 * float(0.5 * a[i] * (w - b[i]) ** 2)
        w, lam = w + move, onto_simplex(climbed)
        fed.step()
        torch.testing.assert_close(hand.shared(fed)["w"], w, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fed.state["lambda"][LAMBDA], lam, rtol=1e-12, atol=1e-12)
    assert float(lam.min()) < 0.2 < 0.3 < float(lam.max())


def test_the_projection_is_the_nearest_point() -> None:
    """Stationarity: what was taken off is the same wherever something is left."""
    for i in range(5):
        x = 2.0 * seeds.normal(i, (6,), torch.float64)
        y = onto_simplex(x)
        assert float(y.min()) >= 0 and abs(float(y.sum()) - 1) < 1e-14
        off = (x - y)[y > 0]
        assert float(off.max() - off.min()) < 1e-14 and bool((x[y == 0] <= off.max()).all())
