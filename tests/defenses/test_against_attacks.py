"""The claims of the rules at small size: 20 clients share digits, five of them attack."""

from __future__ import annotations

import functools
from statistics import fmean

import pytest
import torch

from isthmus import seeds
from isthmus.attacks.random_update import RandomUpdate
from isthmus.attacks.sign_flip import SignFlip
from isthmus.contracts import Context, Meta, Updates, View
from isthmus.defenses.krum import Krum, MultiKrum
from isthmus.defenses.median import Median
from isthmus.defenses.trimmed_mean import TrimmedMean
from isthmus.privacy.gaussian import DPFedAvg, LocalDP

CLIENTS, ATTACKERS, ROUNDS, STEPS = 20, 5, 15, 5


@pytest.fixture(autouse=True)
def one_thread():
    """Many small products: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def data():
    """Digits scaled to [0, 1]: 1437 to train, dealt to 20 clients, 360 to test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    order = seeds.permutation(3, len(x))
    train, test = order[:1420], order[1437:]
    return x[train].view(CLIENTS, -1, 64), y[train].view(CLIENTS, -1), x[test], y[test]


def accuracy(seed, attack=None, rule=None, mechanism=None):
    """Softmax regression by local full-batch steps; the last test accuracy."""
    x, y, test_x, test_y = data()
    weight = 0.01 * seeds.normal(seed, (64, 10))
    target = torch.nn.functional.one_hot(y, 10).float()
    for r in range(ROUNDS):
        local = weight.expand(CLIENTS, 64, 10).clone()
        for _ in range(STEPS):
            error = torch.softmax(x @ local, dim=-1) - target
            local -= 2.0 * x.transpose(1, 2) @ error / x.shape[1]
        meta = [Meta(c, r, r, float(x.shape[1])) for c in range(CLIENTS)]
        ups = Updates(delta={"w": local - weight}, meta=meta)
        weight = weight + step(ups, seeds.key(seed, r), attack, rule, mechanism)
    return float((torch.argmax(test_x @ weight, dim=1) == test_y).double().mean())


def step(ups, key, attack, rule, mechanism):
    ctx = Context(round=0, key=key)
    if attack is not None:
        own = ups.take(range(ATTACKERS))
        bad = attack.craft(own, View(attack.threat, key, own_update=own))
        ups = ups.with_delta({"w": torch.cat([bad.delta["w"], ups.delta["w"][ATTACKERS:]])})
    if mechanism is not None and mechanism.where == "local":
        ups = ups.with_delta(mechanism.local(ups.delta, seeds.keys(key, range(CLIENTS))).tensors)
    weights = torch.full((CLIENTS,), 1.0 / CLIENTS)
    if isinstance(rule, Krum | MultiKrum):
        weights = rule.select(ups, ctx).weights.float()
    elif rule is not None:
        return rule.reduce(ups, weights, ctx).tensors["w"]
    if mechanism is not None and mechanism.where == "central":
        total = {"w": mechanism.clipped(ups.delta)["w"].sum(dim=0) * mechanism.weight}
        return mechanism.central(total, key).tensors["w"]
    return (weights @ ups.matrix()).view(64, 10)


def mean_accuracy(**given):
    return fmean(accuracy(seed, **given) for seed in range(3))


RULES = {
    "median": Median(),
    "trimmed-mean": TrimmedMean(ATTACKERS),
    "krum": Krum(ATTACKERS),
    "multi-krum": MultiKrum(ATTACKERS),
}


def test_sign_flip_breaks_the_mean_and_a_random_update_of_that_size_does_not():
    clean = mean_accuracy()
    assert clean > 0.9  # measured 0.947
    assert mean_accuracy(attack=SignFlip(3.0)) < 0.6  # measured 0.256
    assert mean_accuracy(attack=RandomUpdate(3.0)) > 0.6  # measured 0.939


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_robust_rules_hold_against_sign_flip_and_cost_little_without(rule):
    assert mean_accuracy(rule=rule) > 0.85  # measured 0.900 (Krum) to 0.947
    assert mean_accuracy(rule=rule, attack=SignFlip(3.0)) > 0.6  # measured 0.870 (Krum) to 0.951


def test_accuracy_falls_with_noise_and_local_noise_costs_more():
    def central(sigma):
        return mean_accuracy(mechanism=DPFedAvg(sigma, 1.0, population=CLIENTS, sampling="none"))

    # measured: central 0.926, 0.883, 0.347 at 1, 3, 10; local 0.282 at 3
    low, middle, high = central(1.0), central(3.0), central(10.0)
    assert low - middle > 0.02 and middle - high > 0.27
    assert middle - mean_accuracy(mechanism=LocalDP(3.0, 1.0)) > 0.3
