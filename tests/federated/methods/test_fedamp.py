"""FedAMP: clouds by hand, and who pulls whom."""

from __future__ import annotations

import math

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from torch import Tensor

from isthmus import tree
from isthmus.federated.method import Known
from isthmus.tree import Tree


def distance(a: Tree, b: Tree) -> float:
    return sum(float((a[n] - b[n]).square().sum()) for n in a)


def clouds(models: list[Tree], alpha: float, sigma: float) -> tuple[list[Tree], list[list[float]]]:
    n, made, weights = len(models), [], []
    for i, own in enumerate(models):
        xi = [alpha / (n - 1) * math.exp(-distance(own, other) / sigma) for other in models]
        xi[i] = 0.0
        xi[i] = 1 - sum(xi)
        weights.append(xi)
        made.append({k: sum(x * m[k] for x, m in zip(xi, models, strict=True)) for k in own})
    return made, weights


def test_by_hand_with_a_partial_cohort() -> None:
    alpha, sigma, lam = 0.8, 0.3, 0.7
    settings = {"alpha": alpha, "sigma": sigma, "lam": lam}
    fed = tiny.federation("fedamp", by_hand.TASK, cohort=3, epochs=2, settings=settings)
    models = [by_hand.initial()] * 5
    for turn in (1, 2, 3):
        chosen = fed.schedule.clients(turn).tolist()
        made, _ = clouds(models, alpha, sigma)
        for i in chosen:

            def loss(w: Tree, x: Tensor, y: Tensor, u: Tree = made[i]) -> Tensor:
                tie = sum((w[n] - u[n]).square().sum() for n in u)
                return by_hand.entropy(w, x, y) + lam / 2 * tie

            parts = by_hand.batches(fed, by_hand.key_of(fed, turn, i), i, 2)
            models[i] = by_hand.descend(made[i], parts, loss=loss)
        fed.step()
        assert tiny.apart(fed.state["clients"], tree.stack(models)) < 1e-12
    made, weights = clouds(models, alpha, sigma)
    assert len({round(x, 3) for row in weights for x in row}) > 6
    for i, model in enumerate(by_hand.each(fed)):
        assert tiny.apart(model, made[i]) < 1e-12
    assert tiny.apart(
        fed.method.served(fed.state), by_hand.mean(models, torch.ones(5).double())
    ) < (1e-12)


def test_those_near_pull_and_those_far_do_not() -> None:
    """Three models in one corner, two in another: nothing crosses from corner to corner."""
    fed = tiny.federation("fedamp", by_hand.TASK, settings={"alpha": 1.0, "sigma": 1.0})
    rows = {n: x.clone() for n, x in fed.state["clients"].items()}
    for name, x in rows.items():
        x[3:] += 10.0
        rows[name] = x + torch.arange(5).double().view(-1, *[1] * (x.ndim - 1)) * 1e-3
    for i in range(5):
        got = fed.method.send({"clients": rows}, Known(i, 0, 0))
        near = (0, 1, 2) if i < 3 else (3, 4)
        for name, x in got.items():
            low, high = rows[name][list(near)].amin(0), rows[name][list(near)].amax(0)
            assert bool(((x >= low - 1e-9) & (x <= high + 1e-9)).all())
    xi = fed.method.attention(rows, torch.tensor([0]))[0]  # pyright: ignore[reportAttributeAccessIssue]
    assert float(xi.sum()) == pytest.approx(1.0) and float(xi[3:].max()) < 1e-12
    assert 0.1 < float(xi[1]) <= 0.25


def test_models_far_from_zero_that_differ_little_are_told_apart() -> None:
    """In float32 a product of such models rounds away what the distance is made of."""
    fed = tiny.federation("fedamp", by_hand.TASK, settings={"alpha": 0.8, "sigma": 0.001})
    g = torch.Generator().manual_seed(1)
    rows = {"w": 100.0 + 1e-2 * torch.randn(5, 3, generator=g)}
    xi = fed.method.attention(rows, torch.arange(5))  # pyright: ignore[reportAttributeAccessIssue]
    _, weights = clouds([{"w": x} for x in rows["w"].double()], 0.8, 0.001)
    torch.testing.assert_close(xi, torch.tensor(weights), rtol=1e-5, atol=1e-7)
