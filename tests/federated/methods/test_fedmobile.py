"""FedMobile: FedAvg in its first stage, a teacher that stays, labels and stages not read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import hand
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.errors import InputError
from isthmus.federated.cohort import Cohort
from isthmus.federated.methods.fedmobile import distance, labelled
from isthmus.federated.round import Federation
from isthmus.federated.sensing import seen, warped
from isthmus.models.bind import bind
from isthmus.tasks.contract import Batch, Items, Splits, Task

NONE = {"lam_u": 0.0, "lam_k": 0.0}
UNREAD = -7
"""A class that does not exist: reading it ends in an error."""


class Sensed:
    """The tiny task with columns `stage` and `labelled`; unlabelled items have no usable class."""

    def __init__(self, every: int = 3, stages: int = 2, unread: int = UNREAD) -> None:
        self.inner, self.every, self.stages, self.unread = tiny.task(), every, stages, unread

    def make(self) -> Task:
        whole = self.inner.synthesise()
        n = len(whole.train)
        known = torch.arange(n) % self.every == 0
        columns = {
            **whole.train.columns,
            "y": torch.where(known, whole.train.columns["y"], self.unread),
            "labelled": known.to(torch.int64),
            "stage": torch.arange(n) // 2 % self.stages,
        }
        train = Items(columns, whole.train.group, whole.train.domain)
        splits = Splits(train, whole.val, whole.test)
        self.inner.synthesise = lambda seed=0, size="small": splits  # type: ignore[method-assign]
        return self.inner


def test_first_stage_all_labelled_without_terms_is_fedavg() -> None:
    keys: dict[str, Any] = {"epochs": 2, "cohort": 4}
    b = tiny.play("fedavg", hand.TASK, 4, **keys)
    a = tiny.play("fedmobile", hand.TASK, 4, settings={"lam_u": 0.0}, **keys)
    assert tiny.apart(hand.shared(a), hand.shared(b)) < 1e-13
    later = tiny.play("fedmobile", hand.TASK, 4, settings={"lam_u": 0.0, "rounds": 1}, **keys)
    assert tiny.apart(hand.shared(later), hand.shared(b)) > 1e-4


def test_the_teacher_is_the_model_at_the_end_of_the_last_stage_and_stays() -> None:
    fed = tiny.federation("fedmobile", hand.TASK, settings={"rounds": 2, "stages": 3})
    ends, start = {}, hand.shared(fed)
    for round in range(1, 9):
        before = hand.shared(fed)
        fed.step()
        kept, s = tiny.kept(fed), min((round - 1) // 2, 2)
        if round in (3, 5):
            ends[s] = before
        assert kept["stage"].tolist() == [s] * 5
        for name, x in (ends[s] if s else start).items():
            assert torch.equal(kept["teacher/" + name], x.expand(5, *x.shape))
    assert not any(x.requires_grad for x in tiny.kept(fed).values())


def test_unlabelled_labels_are_never_read() -> None:
    """No class, or NaN where targets are real: all stays finite, and any other value is as good."""
    a, b = (tiny.play("fedmobile", Sensed(unread=u).make(), 4, settings={"rounds": 2})
            for u in (UNREAD, 1))  # fmt: skip
    assert tree.equal(tiny.state(a), tiny.state(b))
    assert all(bool(torch.isfinite(x).all()) for x in tiny.state(a).values())
    y = torch.tensor([1.0, math.nan, 3.0])
    batch = Batch({"x": torch.ones(3), "y": y, "labelled": torch.tensor([1, 0, 1])}, torch.ones(3))
    w = torch.ones(3, requires_grad=True)
    loss = ((w * batch.x - labelled(batch)["y"]).square() * labelled(batch).weight).sum()
    (slope,) = torch.autograd.grad(loss, w)
    assert loss.item() == 4.0 and slope.tolist() == [0.0, 0.0, -4.0]


def plan_of(fed: Federation, client: int, round: int) -> set[int]:
    """The rows of the pool that a client's visit in a round reaches."""
    who = np.array([client])
    zero = np.zeros(1, np.int64)
    cohort = Cohort(
        who, seeds.keys(5, who), zero, zero, round, 0.1, fed.downloads(who), fed.store.get(who)
    )
    plan = fed.ground.plan(fed.method, fed.method.phases("train")[0], cohort)
    return set(plan.index[plan.weight > 0].tolist())


def test_only_items_of_the_stage_are_reached() -> None:
    fed = tiny.federation("fedmobile", Sensed().make(), settings={"rounds": 2, "stages": 2})
    stage = fed.ground.columns["stage"]
    for client in range(5):
        mine = set(fed.ground.owned.rows(client).tolist())
        for round, s in ((1, 0), (2, 0), (3, 1), (9, 1)):
            want = {i for i in mine if int(stage[i]) == s}
            assert plan_of(fed, client, round) == want
    for _ in range(3):
        fed.step()
    with pytest.raises(
        InputError, match="stage: 0 given, allowed: 1 or later: older items are gone"
    ):
        plan_of(fed, 1, 2)


def test_distillation_is_the_formula_and_zero_at_the_teacher() -> None:
    t, f = (seeds.normal(i, (7, 4), torch.float64) for i in range(2))
    p, q = (F.softmax(z / 3.0, -1) for z in (t, f))
    torch.testing.assert_close(distance(t, f, 3.0), 9 * (p * (p / q).log()).sum(-1))
    assert torch.equal(distance(t, t, 3.0), torch.zeros(7, dtype=torch.float64))


def test_nothing_is_sure_enough_at_threshold_one() -> None:
    a = tiny.play("fedmobile", hand.TASK, 2, settings={"threshold": 1.0})
    b = tiny.play("fedmobile", hand.TASK, 2, settings=NONE)
    assert tiny.apart(tiny.state(a), tiny.state(b)) < 1e-13
    c = tiny.play("fedmobile", hand.TASK, 2, settings={"threshold": 0.3})
    assert tiny.apart(tiny.state(c), tiny.state(b)) > 1e-4


def test_loss_by_hand() -> None:
    """CE on the labelled, FixMatch on all with refused items as 0, and the teacher's pull."""
    own: dict[str, Any] = {"threshold": 0.3, "lam_u": 0.7, "lam_k": 0.4, "T": 3.0}
    fed = tiny.federation("fedmobile", Sensed().make(), settings=own)
    net, (x, _) = fed.ground.module, tiny.data((8,), torch.float64)
    y, known = torch.tensor([1, UNREAD, 0, 2, UNREAD, 3, 1, UNREAD]), [1, 0, 1, 1, 0, 1, 1, 0]
    key = torch.tensor(11)
    teacher = {n: w + 0.3 * seeds.normal(2, w.shape, w.dtype) for n, w in hand.shared(fed).items()}
    batch = Batch(
        {"x": x, "y": y, "labelled": torch.tensor(known)}, torch.ones(8, dtype=torch.float64), key
    )
    carry = {"teacher": teacher, "on": torch.tensor(1.0, dtype=torch.float64)}
    value, _ = fed.method.loss(bind(net, hand.shared(fed)), batch, carry)
    have = torch.tensor(known).bool()
    supervised = F.cross_entropy(net(x)[have], y[have])
    weak = net(seen(x, seeds.fold(key, 1), 0.05)).softmax(-1)
    strong = net(seen(x, seeds.fold(key, 2), 0.15))
    sure = weak.amax(-1) > 0.3
    assert 0 < int(sure.sum()) < 8
    semi = F.cross_entropy(strong[sure], weak[sure].argmax(-1), reduction="sum") / 8
    t, f = bind(net, teacher)(x), net(x)
    kd = 9 * F.kl_div((f / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(value, supervised + 0.7 * semi + 0.4 * kd)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_clients_weigh_by_what_they_hold_in_the_stage(gamma: float) -> None:
    task = Sensed().make()
    fed = tiny.federation("fedmobile", task, settings={**NONE, "gamma": gamma}, epochs=2)
    models = models_of(fed)
    columns, m = fed.ground.columns, []
    for client in range(5):
        rows = torch.from_numpy(fed.ground.owned.rows(client))
        rows = rows[columns["stage"][rows] == 0]
        known = float(columns["labelled"][rows].sum())
        m.append(known + gamma * (len(rows) - known))
    weights = torch.tensor(m, dtype=torch.float64)
    expected = hand.mean_model(models, weights)
    fed.step()
    assert tiny.apart(hand.shared(fed), expected) < 1e-12


def models_of(fed: Federation) -> list[tree.Tree]:
    """The model of each client after the first round."""
    everyone = np.arange(5)
    who = seeds.keys(seeds.key(fed.seed, "visit", 1), everyone)
    zero = np.zeros(5, np.int64)
    cohort = Cohort(
        everyone, who, zero, zero, 1, 0.1, fed.downloads(everyone), fed.store.get(everyone)
    )
    stacked = fed.executor.params(fed.method, fed.ground, cohort)
    return [{n: x[i] for n, x in stacked.items() if n in hand.shared(fed)} for i in range(5)]


@pytest.mark.parametrize("consistency", ["fixmatch", "mse"])
def test_all_at_once_is_one_after_the_other_over_three_stages(consistency: str) -> None:
    own = {"rounds": 2, "threshold": 0.3, "scale": 0.1, "consistency": consistency, "gamma": 0.5}
    keys: dict[str, Any] = {"settings": own, "cohort": 4, "epochs": 2}
    a, b = (tiny.play("fedmobile", Sensed(stages=3).make(), 6, executor=e, **keys)
            for e in ("sequential", "vectorised"))  # fmt: skip
    assert tiny.apart(tiny.state(a), tiny.state(b)) < 1e-9
    assert tiny.apart(tiny.kept(a), tiny.kept(b)) < 1e-8


def test_views() -> None:
    x, key = seeds.normal(3, (50, 3, 40), torch.float64), torch.tensor(9)
    assert torch.equal(seen(x, key, 0.0), x)
    noise = seen(x, key, 0.15) - x
    assert float(noise.std()) == pytest.approx(0.15, rel=0.05) and abs(float(noise.mean())) < 0.01
    ratio = seen(x, key, 0.0, scale=0.2) / x
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    assert float(ratio[:, 0, 0].std()) == pytest.approx(0.2, rel=0.3)
    lost = (seen(x, key, 0.0, drop=0.5) == 0).double().mean(-1)
    assert set(lost.unique().tolist()) == {0.0, 1.0} and 0.3 < float(lost.mean()) < 0.7
    assert torch.equal(seen(x, key, 0.1)[:20], seen(x[:20], key, 0.1))  # padding changes nothing


def test_time_is_warped_and_never_runs_backwards() -> None:
    t = torch.arange(64, dtype=torch.float64).expand(5, 64)
    turn = torch.linspace(0, 6, 5, dtype=torch.float64).view(5, 1)
    assert torch.equal(warped(t, turn, 0.0), t)
    read = warped(t, turn, 0.8)
    swing = 0.8 * 64 / (2 * math.pi)
    wanted = (t + swing * torch.sin(2 * math.pi * t / 64 + turn)).clamp(0, 63)
    torch.testing.assert_close(read, wanted)  # of the ramp x = t what is read is the time itself
    assert bool((read.diff(dim=-1) >= 0).all()) and float((read - t).abs().max()) > 5
