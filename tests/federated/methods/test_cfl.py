"""CFL: the bipartition against all bipartitions, and a planted pair of groups."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import by_hand

from isthmus import seeds, tree
from isthmus.federated.methods.cfl import bipartition


@pytest.mark.parametrize("m", [3, 5, 8])
def test_no_bipartition_has_a_smaller_largest_similarity_across(m: int) -> None:
    for draw in range(6):
        rows = seeds.normal(seeds.key(m, draw), (m, 4), torch.float64)
        unit = rows / rows.norm(dim=1, keepdim=True)
        similar = (unit @ unit.T).numpy()

        def across(half: np.ndarray, similar: np.ndarray = similar) -> float:
            return float(similar[half][:, ~half].max())

        every = [np.array([False, *rest]) for rest in product([False, True], repeat=m - 1)]
        best = min(across(half) for half in every if half.any())
        half = bipartition(similar)
        assert 0 < half.sum() < m and across(half) == best


def opposed(clients: int = 6, items: int = 24):
    """Odd clients name the classes the other way round, on the same inputs."""
    x, y = tiny.data((items * clients,), torch.float64)
    y = (x @ torch.tensor([3.0, -2, 1, 0, 0, 0]).double() > 0).long() + 2 * (x[:, 3] > 0).long()
    odd = torch.arange(clients).repeat_interleave(items) % 2 == 1
    return tiny.task((items,) * clients, data=(x, torch.where(odd, 3 - y, y)))


def test_two_planted_groups_are_found_and_then_go_apart() -> None:
    """As FedAvg until the split; from then on, FedAvg in each group."""
    keys = {"batch": 0, "epochs": 5, "lr": 0.5}
    settings = {"eps1": 0.28, "eps2": 1.1}
    fed = tiny.federation("cfl", opposed(), settings=settings, **keys)
    plain = tiny.federation("fedavg", opposed(), **keys)
    while not fed.state["group"].any():
        assert fed.round < 9
        fed.step()
        plain.step()
        for model in by_hand.each(fed):
            assert tiny.apart(model, plain.state["shared"]) < 1e-10
    assert fed.round > 1
    group = fed.state["group"]
    assert group[::2].unique().tolist() != group[1::2].unique().tolist()
    assert len(group[::2].unique()) == len(group[1::2].unique()) == 1
    before = by_hand.each(fed)[0]
    fed.step()
    rows = fed.state["clients"]
    for odd in (0, 1):
        made = [
            by_hand.descend(before, by_hand.batches(fed, 0, i, 5, 0), lr=0.5)
            for i in range(odd, 6, 2)
        ]
        even = by_hand.mean(made, torch.ones(3).double())
        for i in range(odd, 6, 2):
            assert tiny.apart(tree.row(rows, i), even) < 1e-10
    assert tiny.apart(tree.row(rows, 0), tree.row(rows, 1)) > 1e-2


def test_who_is_away_moves_with_the_group() -> None:
    fed = tiny.play("cfl", by_hand.TASK, 2, cohort=2, settings={"eps1": 0.0})
    same = tiny.play("fedavg", by_hand.TASK, 2, cohort=2).state["shared"]
    assert len(fed.store) == 0
    for model in by_hand.each(fed):
        assert tiny.apart(model, same) < 1e-13
