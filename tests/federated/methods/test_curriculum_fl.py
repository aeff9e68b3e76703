"""Curricula: the pacing forms, the order, the open part, and FedAvg when all is open."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import hand
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.errors import InputError
from isthmus.federated.cohort import Cohort
from isthmus.federated.method import Data
from isthmus.federated.methods.curriculum_fl import CurriculumFL
from isthmus.federated.pacing import Form, ordered, pace
from isthmus.federated.round import Federation
from isthmus.federated.schedulers.curriculum_fl import CurriculumClients
from isthmus.models.bind import bind
from isthmus.run import checkpoint

FORMS = get_args(Form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "a", "b"), [(50, 0.8, 0.2), (3, 0.5, 0.2), (1000, 1.0, 0.013)])
def test_pace_begins_at_b_n_ends_at_n_and_never_falls(
    form: Form, n: int, a: float, b: float
) -> None:
    said = [pace(form, t, 200, n, a, b) for t in range(201)]
    assert said[0] == max(1, int(b * n)) and all(k == n for k in said[int(a * 200) :])
    assert said == sorted(said) and said[int(a * 200) - 1] <= n


def test_pace_of_each_form_half_way() -> None:
    """n = 1000, b = 0.2, at half of a T: 200 + 800 times s, s^2, s^.5, 0, and both curves."""
    c, s = 10.0, 0.5
    exp = (np.exp(c * s) - 1) / (np.exp(c) - 1)
    log = 1 + np.log(s + np.exp(-c)) / c
    shares = dict(zip(FORMS, [s, s**2, s**0.5, 0.0, exp, log], strict=True))
    for form, share in shares.items():
        assert pace(form, 40, 100, 1000, a=0.8, b=0.2) == int(200 + 800 * share + 1e-9)
    assert len({pace(form, 40, 100, 1000, a=0.8, b=0.2) for form in FORMS}) == 6


def test_orders_are_permutations_anti_is_the_reverse_and_chance_sees_no_score() -> None:
    scores = np.array([2.0, 5.0, 1.0, 5.0, 0.5, 2.0])
    up, down = ordered(scores, "curr", 3), ordered(scores, "anti", 3)
    assert up.tolist() == [4, 2, 0, 5, 1, 3] and down.tolist() == up.tolist()[::-1]
    chance = ordered(scores, "rand", 3)
    assert sorted(chance.tolist()) == list(range(6))
    assert chance.tolist() == ordered(-scores, "rand", 3).tolist()
    assert any(ordered(scores, "rand", k).tolist() != chance.tolist() for k in range(4, 8))


@pytest.mark.parametrize("order", ["curr", "anti", "rand"])
@pytest.mark.parametrize("batch", [8, 0])
def test_all_open_is_fedavg(order: str, batch: int) -> None:
    keys: dict[str, Any] = {"epochs": 2, "cohort": 3, "batch": batch}
    own = {"b": 1.0, "order": order, "score": "LG"}
    a = tiny.play("curriculum-fl", hand.TASK, 3, settings=own, **keys)
    assert tree.equal(hand.shared(a), hand.shared(tiny.play("fedavg", hand.TASK, 3, **keys)))
    other = tiny.play("curriculum-fl", hand.TASK, 3, settings={"b": 0.1, "least": 1}, **keys)
    assert tiny.apart(hand.shared(a), hand.shared(other)) > 1e-3


def planned(fed: Federation, client: int) -> list[list[int]]:
    """The items of each step of a client's next visit, as numbers within its own."""
    who = np.array([client])
    cohort = Cohort(
        who, seeds.keys(5, who), np.zeros(1, np.int64), np.zeros(1, np.int64), fed.round + 1, 0.1,
        fed.downloads(who), fed.store.get(who),
    )  # fmt: skip
    plan = fed.ground.plan(fed.method, fed.method.phases("train")[0], cohort)
    first = int(fed.ground.owned.starts[client])
    steps = zip(plan.index[0], plan.weight[0], strict=True)
    return [(index[weight > 0] - first).tolist() for index, weight in steps]


def of_model(fed: Federation, client: int, tensors: tree.Tree) -> np.ndarray:
    rows = torch.from_numpy(fed.ground.owned.rows(client))
    x, y = (fed.ground.columns[name][rows] for name in "xy")
    return F.cross_entropy(bind(fed.ground.module, tensors)(x), y, reduction="none").numpy()


@pytest.mark.parametrize("order", ["curr", "anti"])
def test_passes_over_the_open_part(order: str) -> None:
    """40 items, 3 epochs of 5 steps, linear, a = 0.8, b = 0.25: the pace is asked at the end of
    each pass, and every pass sees exactly the first k items of the order once."""
    own = {"order": order, "b": 0.25, "least": 1}
    fed = tiny.play("curriculum-fl", hand.TASK, 1, settings=own, epochs=3)
    rank = np.argsort(of_model(fed, 1, hand.shared(fed)), kind="stable")
    rank = rank if order == "curr" else rank[::-1]
    steps, done = planned(fed, 1), 0
    while done < 15:
        k = min(40, int(10 + 30 * done / 12 + 1e-9))
        length = -(-k // 8)
        seen = [i for step in steps[done : done + length] for i in step]
        assert sorted(seen) == sorted(rank[:k].tolist()) and len(seen) == k
        done += length
    assert len(steps) == done


def test_a_small_client_opens_all_that_is_always_open() -> None:
    fed = tiny.federation("curriculum-fl", hand.TASK, settings={"b": 0.01, "least": 17})
    assert sorted(i for step in planned(fed, 3) for i in step) == list(range(17))
    assert len(planned(fed, 1)[0]) == 8 and len(planned(fed, 1)[2]) == 1  # 17 of 40 at first


def test_scores_of_download_and_own_model() -> None:
    """A client that never trained scores by the download; later L is its last model, LG the sum."""
    for score in ("L", "LG"):
        fed = tiny.play("curriculum-fl", hand.TASK, 3, settings={"score": score}, cohort=3)
        method, kept = cast(CurriculumFL, fed.method), tiny.kept(fed)
        for client in range(5):
            rows = torch.from_numpy(fed.ground.owned.rows(client))
            columns = {n: x[rows] for n, x in fed.ground.columns.items()}
            down, mine = hand.shared(fed), tree.row(kept, client)
            said = method.scores(Data(columns, 0, fed.ground.module, down), mine)
            by_down = of_model(fed, client, down)
            if not bool(mine["trained"]):
                np.testing.assert_allclose(said, by_down, rtol=1e-12)
                continue
            by_own = of_model(fed, client, {n: mine["last/" + n] for n in down})
            want = by_own if score == "L" else by_own + by_down
            np.testing.assert_allclose(said, want, rtol=1e-12)
            assert float(np.abs(by_own - by_down).max()) > 1e-3


def walked(order: str, n: int = 23, m: int = 4, rounds: int = 40) -> tuple[Any, list[list[int]]]:
    """A schedule after all its rounds, in which client i has loss i; and the groups."""
    made = CurriculumClients(n, m, 1, rounds=rounds, order=cast(Any, order))
    groups = []
    for round in range(1, rounds + 1):
        group = made.clients(round)
        assert group.tolist() == made.clients(round).tolist()
        made.seen(round, group, group.astype(float), np.ones(len(group)))
        groups.append(group.tolist())
    return made, groups


@pytest.mark.parametrize("order", ["curr", "anti", "rand"])
def test_visits_sum_to_the_budget_and_in_the_end_all_are_in_the_pool(order: str) -> None:
    made, groups = walked(order)
    assert made.visits == sum(map(len, groups)) == 40 * 4
    assert all(len(set(group)) == 4 for group in groups)
    assert sorted(made.pool(41, np.arange(23)).tolist()) == list(range(23))
    assert {c for group in groups[-8:] for c in group} == set(range(23))


def test_the_pool_is_the_easy_part() -> None:
    made = CurriculumClients(20, 4, 2, rounds=50)
    losses = np.array([float((7 * i) % 20) for i in range(20)])
    made.seen(1, np.arange(20), losses, np.ones(20))
    made.visits = 40  # 0.2 of all: a quarter of 0.8
    assert sorted(losses[made.pool(9, np.arange(20))]) == list(range(8))
    made.order = "anti"
    assert sorted(losses[made.pool(9, np.arange(20))]) == list(range(12, 20))
    made.losses[[3, 5]] = np.nan  # never seen: in front in either order
    assert {3, 5} <= set(made.pool(9, np.arange(20)).tolist())
    there = np.arange(0, 20, 2)
    assert set(made.pool(9, there).tolist()) <= set(there.tolist())


def test_a_run_with_both_halves_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"schedule": "curriculum-fl:b=0.3", "cohort": 2, "rounds": 7}
    keys["settings"] = {"score": "LG"}
    whole, half, again = (tiny.federation("curriculum-fl", hand.TASK, **keys) for _ in range(3))
    for step in range(6):
        whole.step()
        if step < 3:
            half.step()
    checkpoint.write(tmp_path, half, {})
    checkpoint.restore(again, *checkpoint.read(tmp_path))
    for _ in range(3):
        again.step()
    assert tree.equal(hand.shared(whole), hand.shared(again))
    assert again.schedule.state() == whole.schedule.state()


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="order: sideways given"):
        tiny.federation("fedavg", hand.TASK, schedule="curriculum-fl:order=sideways")
    with pytest.raises(InputError, match="a: 2 given, allowed: 0 to 1"):
        tiny.federation("fedavg", hand.TASK, schedule="curriculum-fl:a=2")
    with pytest.raises(InputError, match=r"settings\.order"):
        tiny.federation("curriculum-fl", hand.TASK, settings={"order": "sideways"})
