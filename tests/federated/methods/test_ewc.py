"""EWC: FedMobile without its penalty, the penalty by hand, and the minimum of a quadratic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import by_hand, hand
from tests.federated.methods.test_fedmobile import NONE, Sensed

from isthmus import tree
from isthmus.tasks.contract import Items, Splits, Task

STAGES: dict[str, Any] = {"rounds": 2, "stages": 2}


def test_without_its_penalty_it_is_fedmobile_to_the_bit() -> None:
    task = Sensed().make()
    keys: dict[str, Any] = {"epochs": 2, "cohort": 4}
    parent = tiny.play("fedmobile", task, 5, settings={**NONE, **STAGES}, **keys)
    zero = tiny.play("ewc", task, 5, settings={"lam": 0.0, **STAGES}, **keys)
    assert tree.equal(hand.shared(zero), hand.shared(parent))
    held = tiny.play("ewc", task, 5, settings={"lam": 3.0, **STAGES}, **keys)
    assert tiny.apart(hand.shared(held), hand.shared(parent)) > 1e-4
    first = [tiny.play("ewc", task, 2, settings={"lam": x, **STAGES}, **keys) for x in (0.0, 3.0)]
    assert tree.equal(hand.shared(first[0]), hand.shared(first[1]))  # nothing to hold as yet


def test_fisher_and_penalty_by_hand() -> None:
    """One client, two stages of one round: F of each labelled item of stage 0, after training."""
    sensed = Sensed()
    sensed.inner = tiny.task((13,))
    task = sensed.make()
    lam, settings = 5.0, {"lam": 5.0, "rounds": 1, "stages": 2}
    fed = tiny.federation("ewc", task, batch=0, epochs=3, settings=settings)
    x, y = fed.ground.columns["x"], fed.ground.columns["y"]
    stage, known = fed.ground.columns["stage"], fed.ground.columns["labelled"] > 0
    old, new = (torch.nonzero((stage == s) & known).flatten() for s in (0, 1))
    assert len(old) > 1 and len(new) > 1
    w = by_hand.descend(by_hand.initial(task), [(x[old], y[old])] * 3)
    fed.step()
    assert tiny.apart(hand.shared(fed), w) < 1e-12
    squares = [by_hand.gradient(by_hand.entropy, w, x[i : i + 1], y[i : i + 1]) for i in old]
    fisher = {n: torch.stack([g[n].square() for g in squares]).mean(0) for n in w}
    star = w

    def held(v: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        away = sum((fisher[n] * (v[n] - star[n]).square()).sum() for n in v)
        return by_hand.entropy(v, x, y) + 0.5 * lam * away

    w = by_hand.descend(w, [(x[new], y[new])] * 3, loss=held)
    fed.step()
    assert tiny.apart(hand.shared(fed), w) < 1e-12
    kept = tree.row(tiny.kept(fed), 0)
    for n in w:
        torch.testing.assert_close(kept["ewc/fisher/" + n], fisher[n], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(kept["ewc/star/" + n], star[n], rtol=1e-10, atol=1e-14)


def staged(a: torch.Tensor, b: torch.Tensor, stage: torch.Tensor) -> Task:
    """Items f(w) = a / 2 (w - b)^2 of one client, each of its stage."""
    columns = torch.stack([a, b], dim=1), torch.zeros(len(a), dtype=torch.int64)
    task = tiny.task([len(a)], module=lambda seed: hand.Point(), data=columns, loss=hand.parabola)
    whole = task.synthesise()
    train = Items({**whole.train.columns, "stage": stage}, whole.train.group, whole.train.domain)
    splits = Splits(train, whole.val, whole.test)
    task.synthesise = lambda seed=0, size="small": splits  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize("executor", ["sequential", "vectorised"])
def test_a_quadratic_in_closed_form(executor: str) -> None:
    """w* is the minimum of stage 0, F = mean a_i^2 (w* - b_i)^2; then the minimum of the sum."""
    a = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
    b = torch.tensor([-1.0, 2.0, 5.0, 7.0], dtype=torch.float64)
    task = staged(a, b, torch.tensor([0, 0, 1, 1]))
    lam = 0.7
    settings = {"lam": lam, "rounds": 1, "stages": 2}
    keys: dict[str, Any] = {"batch": 0, "epochs": 400, "lr": 0.1, "executor": executor}
    fed = tiny.federation("ewc", task, settings=settings, **keys)
    fed.step()
    star = float((a[:2] * b[:2]).sum() / a[:2].sum())
    torch.testing.assert_close(hand.shared(fed)["w"], torch.tensor([star]).double())
    fisher = float((a[:2] * (star - b[:2])).square().mean())
    fed.step()
    slope, pull = float(a[2:].mean()), float((a[2:] * b[2:]).mean())
    want = (pull + lam * fisher * star) / (slope + lam * fisher)
    torch.testing.assert_close(hand.shared(fed)["w"], torch.tensor([want]).double())
    assert abs(want - star) > 0.1 and abs(want - pull / slope) > 0.1
