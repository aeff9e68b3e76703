"""Selections of clients: without bias they are uniform, with it they take whom they should."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tests.federated import tiny

from isthmus.errors import InputError
from isthmus.federated.schedulers.oort import Oort
from isthmus.federated.schedulers.power_of_choice import PowerOfChoice
from isthmus.federated.schedulers.tifl import TiFL
from isthmus.run import checkpoint

UNBIASED: dict[str, Any] = {
    "power-of-choice": lambda seed: PowerOfChoice(6, 2, seed, d=2),
    "oort": lambda seed: Oort(6, 2, seed, explore=1.0, decay=1.0, least=1.0),
    "tifl": lambda seed: TiFL(6, 2, seed, tiers=1),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_without_bias_every_subset_is_equally_likely(name: str) -> None:
    """Chi-square against the uniform law over all 15 pairs, losses known or not."""
    pairs = list(combinations(range(6), 2))
    counts = dict.fromkeys(pairs, 0)
    for seed in range(100):
        made = UNBIASED[name](seed)
        for round in range(1, 16):
            counts[tuple(made.clients(round).tolist())] += 1
            if name != "oort":  # who was tried is no longer explored
                who = np.arange(6)
                made.seen(round, who, np.arange(6.0) + 1, np.arange(6.0) + 1)
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_power_of_choice_takes_the_largest_losses() -> None:
    made = PowerOfChoice(9, 3, 0, d=9)
    losses = np.array([5.0, 1, 7, 3, 2, 9, 4, 0, 6])
    made.seen(1, np.arange(9), losses, losses)
    assert made.clients(2).tolist() == [2, 5, 8]
    made.losses[7] = np.nan  # not seen: the paper's infinite loss
    assert made.clients(3).tolist() == [2, 5, 7]
    few = PowerOfChoice(9, 3, 0, d=5)
    few.seen(1, np.arange(9), losses, losses)
    for round in range(2, 12):
        candidates = few.shuffled(round, np.arange(9))[:5]
        best = sorted(candidates, key=lambda c: -losses[c])[:3]
        assert few.clients(round).tolist() == sorted(best)


def test_utility_of_oort_by_hand() -> None:
    """n loss + sqrt(0.1 log R / L), and (T / t)^2 of it for whoever is slower than T."""
    sizes = np.array([[10], [20], [30], [40]])
    made = Oort(4, 2, 0, histograms=sizes, wait=0.5)
    made.seen(2, np.arange(4), np.array([0.5, 1.0, 2.0, 0.25]), np.array([1.0, 2.0, 3.0, 8.0]))
    made.last[1] = 5
    bonus = np.sqrt(0.1 * np.log(7) / np.array([2, 5, 2, 2]))
    base = np.array([5.0, 20.0, 60.0, 10.0]) + bonus
    t = 2.5  # the median
    want = base * np.array([1, 1, (t / 3) ** 2, (t / 8) ** 2])
    np.testing.assert_allclose(made.utility(7, np.arange(4)), want)


def test_oort_explores_then_exploits() -> None:
    made = Oort(20, 4, 1, explore=0.5, decay=1.0, least=0.5, c=1.0)
    first = made.clients(1)
    made.seen(1, first, np.array([1.0, 5, 2, 9]), np.ones(4))
    second = made.clients(2)
    assert len(second) == 4 and len(set(second) & set(first)) == 2
    assert set(second) & set(first) == {first[1], first[3]}  # the two largest losses


def test_tifl_keeps_to_a_tier() -> None:
    made = TiFL(12, 3, 0, tiers=4, interval=1, credits=5)
    times = np.array([4, 1, 9, 2, 7, 3, 12, 5, 11, 6, 10, 8], float)
    made.seen(1, np.arange(12), np.where(times > 9, 100.0, 1e-9), times)
    slowest = np.flatnonzero(times > 9)
    turns = [made.clients(round) for round in range(2, 12)]
    for cohort in turns:
        assert any(set(cohort) <= set(tier) for tier in made.members())
    assert sum(set(c) == set(slowest) for c in turns[:5]) == 5  # its loss draws every turn
    assert not any(set(c) == set(slowest) for c in turns[5:7])  # and then its credits are used up


@pytest.mark.parametrize("schedule", ["power-of-choice", "oort", "tifl:tiers=2"])
def test_the_loss_crosses_and_a_run_resumes(schedule: str, tmp_path: Any) -> None:
    """What the server selects by is in the upload's bytes; a resumed run goes on with its bits."""
    task = tiny.task((5, 16, 9, 12, 8, 8))
    keys: dict[str, Any] = {"cohort": 3, "speeds": "1,2,5"}
    plain = tiny.play("fedavg", task, 1, **keys)
    whole = tiny.federation("fedavg", task, schedule=schedule, **keys)
    half = tiny.federation("fedavg", task, schedule=schedule, **keys)
    whole.step()
    up = [int(f.ledger.total("bytes", direction="up")) for f in (plain, whole)]
    assert up[1] - up[0] >= 3 * 8  # a float64 from each
    for step in range(6):
        whole.step()
        if step < 3:
            half.step()
    checkpoint.write(tmp_path, half, {})
    again = tiny.federation("fedavg", task, schedule=schedule, **keys)
    checkpoint.restore(again, *checkpoint.read(tmp_path))
    json.dumps(again.schedule.state())
    while again.round < whole.round:
        again.step()
    for name, x in tiny.state(whole).items():
        assert torch.equal(x, tiny.state(again)[name])


def test_bad_settings() -> None:
    with pytest.raises(InputError, match=r"d: 1 given, allowed: 2 \(the cohort\) to 6"):
        PowerOfChoice(6, 2, 0, d=1)
    with pytest.raises(InputError, match="tiers: 4 given, allowed: 1 to 3"):
        TiFL(6, 2, 0, tiers=4)
    with pytest.raises(InputError, match=r"explore: 1\.5 given"):
        Oort(6, 2, 0, explore=1.5)
    keys: dict[str, Any] = {"clip": 1.0, "privacy": "local", "noise": 1.0}
    with pytest.raises(InputError, match="scalars without noise must be declared public"):
        public = {"schedule": "oort", "public": ("examples",)}
        tiny.federation("fedavg", tiny.task(), **keys, **public)
