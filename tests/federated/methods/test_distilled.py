"""Trajectory matching: its gradient, its descent; DynaFed's server."""

from __future__ import annotations

from typing import Any

import torch
from tests.federated import tiny
from tests.federated.methods import hand
from torch import Tensor
from torch.nn import functional as F

from isthmus import tree
from isthmus.federated.distilled import Distilled, Settings, distil, matching, noise
from isthmus.models.bind import bind
from isthmus.tree import Tree

FEW: dict[str, Any] = {"R0": 2, "E": 1, "M": 2, "ipc": 2, "iterations": 3}


def two(u: Tree, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a model of two numbers: two classes with logits w x and b."""
    logits = torch.cat([u["w"] * x, u["b"].expand(len(x), 1)], 1)
    return -(y * F.log_softmax(logits, 1)).sum(1).mean()


def test_the_unrolled_gradient_is_that_of_finite_differences() -> None:
    start = {"w": torch.tensor([0.3]).double(), "b": torch.tensor([-0.2]).double()}
    goal = {"w": torch.tensor([0.9]).double(), "b": torch.tensor([0.4]).double()}
    held = noise(2, (1,), 2, torch.float64, key=5)

    def value(held: Tree) -> Tensor:
        return matching(two, start, goal, held, steps=5)

    got, h = torch.func.grad(value)(held), 1e-6
    slots = tree.layout(held)
    flat, slope = tree.flatten(held), tree.flatten(got)
    for i in range(len(flat)):
        step = torch.zeros_like(flat)
        step[i] = h
        high, low = (float(value(tree.unflatten(flat + s, slots))) for s in (step, -step))
        assert abs((high - low) / (2 * h) - float(slope[i])) < 1e-7
    assert float(slope.abs().min()) > 1e-5  # x, y and the rate all matter


def test_matching_is_one_where_nothing_moves_and_zero_where_the_goal_is_met() -> None:
    start = {"w": torch.tensor([0.3]).double(), "b": torch.tensor([-0.2]).double()}
    held = noise(2, (1,), 2, torch.float64, key=5)
    still = {**held, "log lr": torch.tensor(-80.0).double()}
    goal = tree.scale(start, 2.0)
    assert abs(float(matching(two, start, goal, still, 4)) - 1.0) < 1e-12
    x, y, lr = held["x"], held["y"].softmax(1), held["log lr"].exp()
    there = start
    for _ in range(3):
        g = torch.func.grad(two)(there, x, y)
        there = {n: p - lr * g[n] for n, p in there.items()}
    assert float(matching(two, start, there, held, 3)) < 1e-24
    assert float(matching(two, start, there, held, 1)) > 0.1


def test_the_loss_begins_at_about_one_and_falls() -> None:
    """On the trajectory of a federation; the set then leads where the trajectory went."""
    fed = tiny.federation("dynafed", hand.TASK, settings={"R0": 8}, lr=0.3, epochs=3)
    for _ in range(7):
        fed.step()
    method = fed.method
    assert isinstance(method, Distilled)
    given = {"R0": 8, "E": 2, "M": 4, "ipc": 3, "iterations": 100}
    knobs = Settings.model_validate(given)
    trajectory = {n: x[1:] for n, x in fed.state["trajectory"].items()}
    begun = noise(3, (tiny.WIDE,), tiny.CLASSES, torch.float64, key=1)
    learned, history = distil(method.loss_on, trajectory, begun, knobs, key=1)
    first, last = (sum(part) / 20 for part in (history[:20], history[-20:]))
    assert abs(history[0] - 1.0) < 0.3 and last < 0.7 and last < first
    assert not torch.equal(learned["y"], begun["y"])


def test_dynafed_tunes_the_mean_on_the_set() -> None:
    keys = {"cohort": 3, "settings": {**FEW, "T": 4, "lr_s": 0.3}}
    fed = tiny.federation("dynafed", hand.TASK, **keys)
    plain = tiny.federation("fedavg", hand.TASK, cohort=3)
    for _ in range(4):
        plain.state = {"shared": hand.shared(fed)}
        fed.step()
        plain.step()
        w = hand.shared(plain)
        if fed.round >= 2:
            held = fed.state["synthetic"]
            for _ in range(4):
                leaves = {n: t.clone().requires_grad_() for n, t in w.items()}
                log = F.log_softmax(bind(fed.ground.module, leaves)(held["x"]), 1)
                loss = -(held["y"] * log).sum(1).mean()
                g = torch.autograd.grad(loss, list(leaves.values()))
                w = {n: t - 0.3 * d for (n, t), d in zip(w.items(), g, strict=True)}
        assert tiny.apart(hand.shared(fed), w) < 1e-12
        assert (fed.round < 2) == tree.equal(hand.shared(fed), hand.shared(plain))


def test_dynafed_without_steps_is_fedavg_and_sends_nothing_more() -> None:
    keys = {"cohort": 3, "epochs": 2}
    a = tiny.play("dynafed", hand.TASK, 4, settings={**FEW, "T": 0}, **keys)
    b = tiny.play("fedavg", hand.TASK, 4, **keys)
    assert tree.equal(hand.shared(a), hand.shared(b))
    assert list(a.ledger.rows()) == list(b.ledger.rows())


def test_noise_is_of_a_key_and_its_classes_take_turns() -> None:
    a, b, c = (noise(3, (6,), 4, torch.float64, key) for key in (1, 1, 2))
    assert tree.equal(a, b) and not torch.equal(a["x"], c["x"])
    assert a["y"].argmax(1).tolist() == [0, 1, 2, 3] * 3
    assert 0.8 < float(a["x"].std()) < 1.2
