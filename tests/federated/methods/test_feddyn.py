"""FedDyn: exact on parabolas with any number of local steps, by hand, and its memories."""

from __future__ import annotations

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import hand

from isthmus import tree
from isthmus.errors import InputError


@pytest.mark.parametrize("steps", [1, 10, pytest.param(50, marks=pytest.mark.slow)])
def test_parabolas_are_solved_exactly(steps: int) -> None:
    task, a, b = hand.quadratics()
    keys = {"lr": 0.2, "steps": steps, "executor": "vectorised", "compile": "trace"}
    dyn = tiny.play("feddyn", task, 36, settings={"alpha": 2.0}, **keys)
    assert abs(float(hand.shared(dyn)["w"]) - hand.optimum(a, b)) < 1e-8
    if steps > 1:
        avg = tiny.play("fedavg", task, 8, **keys)
        assert abs(float(hand.shared(avg)["w"]) - hand.optimum(a, b)) > 1e-3


def test_by_hand() -> None:
    fed = tiny.federation("feddyn", hand.TASK, cohort=3, epochs=2, settings={"alpha": 0.3})
    w = hand.initial()
    gradients = [tree.zeros_like(w) for _ in range(5)]  # the paper's grad_i, and its server's h
    h = tree.zeros_like(w)
    for round in range(1, 5):
        chosen = fed.schedule.clients(round).tolist()
        models = []
        for i in chosen:

            def rule(slope: hand.Slope, v: tree.Tree, i: int = i, w: tree.Tree = w) -> tree.Tree:
                return hand.up(hand.up(slope(v), gradients[i], -1.0), tree.sub(v, w), 0.3)

            v, _ = hand.steps(fed, round, i, w, rule, epochs=2)
            models.append(v)
        for i, v in zip(chosen, models, strict=True):
            gradients[i] = hand.up(gradients[i], tree.sub(v, w), -0.3)
        total = {n: torch.stack([v[n] - w[n] for v in models]).sum(0) for n in w}
        h = hand.up(h, total, -0.3 / 5)
        w = hand.up(hand.mean(models), h, -1.0 / 0.3)
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-11
        own = {n.removeprefix("h/"): x for n, x in tiny.kept(fed).items()}
        assert tiny.apart({n: x.mean(0) for n, x in own.items()}, fed.state["h"]) < 1e-12
        assert tiny.apart(own, tree.scale(tree.stack(gradients), -1.0 / 0.3)) < 1e-11


def test_other_optimisers_are_refused() -> None:
    with pytest.raises(InputError, match="optimiser: adam given"):
        tiny.federation("feddyn", hand.TASK, optimiser="adam")


def test_zero_is_no_strength() -> None:
    with pytest.raises(InputError, match=r"settings\.alpha"):
        tiny.federation("feddyn", hand.TASK, settings={"alpha": 0.0})
