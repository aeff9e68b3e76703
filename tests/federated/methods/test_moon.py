"""MOON: without weight it is FedAvg; the contrast in closed form."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import hand
from torch import Tensor
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.errors import InputError
from isthmus.federated.methods.moon import contrast
from isthmus.models.bind import bind
from isthmus.tree import Tree


def test_weight_zero_is_fedavg() -> None:
    keys = {"epochs": 2, "cohort": 3}
    a = tiny.play("moon", hand.TASK, 3, settings={"mu": 0.0}, **keys)
    assert tree.equal(hand.shared(a), hand.shared(tiny.play("fedavg", hand.TASK, 3, **keys)))


def test_the_contrast_is_the_formula() -> None:
    z, z_g, z_p = (seeds.normal(i, (7, 5), torch.float64) for i in range(3))
    near, far = (F.cosine_similarity(z, o) / 0.5 for o in (z_g, z_p))
    expected = -torch.log(near.exp() / (near.exp() + far.exp()))
    torch.testing.assert_close(contrast(z, z_g, z_p, 0.5), expected, rtol=1e-13, atol=1e-13)
    same = contrast(z, z_g, 3.0 * z_g, 0.5)
    torch.testing.assert_close(same, torch.full_like(same, math.log(2.0)), rtol=0, atol=1e-15)


def test_in_the_first_round_it_adds_log_two_and_pulls_nowhere() -> None:
    """The global model and the last own one are the same."""
    moon, avg = (tiny.federation(name, hand.TASK, epochs=2) for name in ("moon", "fedavg"))
    a, b = moon.step(), avg.step()
    assert a.loss - b.loss == pytest.approx(math.log(2.0), abs=1e-6)
    assert tiny.apart(hand.shared(moon), hand.shared(avg)) < 1e-13
    moon.step()
    avg.step()
    assert tiny.apart(hand.shared(moon), hand.shared(avg)) > 1e-4


def test_two_rounds_by_hand() -> None:
    """The gradient of cross-entropy and contrast, with the own last model held fixed."""
    mu, tau = 2.0, 0.5
    fed = tiny.federation("moon", hand.TASK, settings={"mu": mu, "tau": tau})
    net, w = fed.ground.module, hand.initial()
    last = [w] * 5
    for round in (1, 2, 3):
        models = []
        for i in range(5):
            v = w
            for part in hand.rows_of(fed, round, i, 1, 8):
                x, y = fed.ground.columns["x"][part], fed.ground.columns["y"][part]
                v = hand.up(v, _slope(net, v, w, last[i], x, y, mu, tau), -0.1)
            models.append(v)
        last = models
        w = hand.mean_model(models, torch.tensor(tiny.RAGGED, dtype=torch.float64))
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-12


def _slope(
    net: torch.nn.Module, v: Tree, w: Tree, last: Tree, x: Tensor, y: Tensor, mu: float, tau: float
) -> Tree:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in v.items()}
    seen: Any = bind(net, leaves)
    z_g, z_p = (cast(Any, bind(net, other)).features(x) for other in (w, last))
    z = seen.features(x)
    a, b = (torch.exp(F.cosine_similarity(z, other) / tau) for other in (z_g, z_p))
    loss = F.cross_entropy(seen(x), y) - mu * torch.log(a / (a + b)).mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def test_a_model_without_features_is_refused() -> None:
    task, _, _ = hand.quadratics()
    with pytest.raises(InputError, match="features and head with method moon"):
        tiny.federation("moon", task)
