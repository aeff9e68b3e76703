"""Orders of batches: every item once a pass, and the same rows alone and in a cohort."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus import seeds
from isthmus.learn import plan as plans
from isthmus.learn.phase import Plan

SIZES = st.lists(st.integers(1, 23), min_size=1, max_size=5).map(lambda s: np.array(s, np.int64))
KEYS = st.integers(-(2**63), 2**63 - 1)


def keys_of(key: int, n: int) -> np.ndarray:
    return seeds.keys(key, np.arange(n))


def live(plan: Plan, row: int) -> list[list[int]]:
    """The items of each step of one client, padding left out."""
    return [
        i[w > 0].tolist() for i, w in zip(plan.index[row], plan.weight[row], strict=True)
    ]  # fmt: skip


@given(KEYS, SIZES, st.integers(1, 3), st.integers(1, 9))
def test_shuffled_epochs(key: int, sizes: np.ndarray, epochs: int, batch: int) -> None:
    keys = keys_of(key, len(sizes))
    many = plans.shuffled_epochs_many(keys, sizes, epochs, batch)
    assert many.index.shape == many.weight.shape
    assert many.index.shape[1:] == (epochs * -(-int(sizes.max()) // batch), batch)
    for row, size in enumerate(sizes.tolist()):
        steps = [step for step in live(many, row) if step]
        per_pass = -(-size // batch)
        assert len(steps) == epochs * per_pass == int(plans.local_steps(many.weight)[row])
        assert live(many, row)[: len(steps)] == steps  # padding comes last
        for e in range(epochs):
            one_pass = steps[e * per_pass : (e + 1) * per_pass]
            assert all(len(step) == batch for step in one_pass[:-1])
            assert sorted(chain(*one_pass)) == list(range(size))
        alone = plans.shuffled_epochs(int(keys[row]), size, epochs, batch)
        assert torch.equal(alone.index, many.index[row, : len(steps)])
        assert torch.equal(alone.weight, many.weight[row, : len(steps)])
    padded = many.index[many.weight == 0]
    assert not padded.any() and set(many.weight.unique().tolist()) <= {0.0, 1.0}


@given(KEYS, SIZES, st.integers(1, 7), st.integers(1, 9))
def test_random_batches(key: int, sizes: np.ndarray, steps: int, batch: int) -> None:
    keys = keys_of(key, len(sizes))
    many = plans.random_batches_many(keys, sizes, steps, batch)
    assert many.index.shape == (len(sizes), steps, batch)
    for row, size in enumerate(sizes.tolist()):
        drawn = live(many, row)
        assert all(len(set(step)) == len(step) == min(size, batch) for step in drawn)
        whole = max(1, size // batch)
        for start in range(0, steps, whole):  # a pass repeats nothing
            one_pass = list(chain(*drawn[start : start + whole]))
            assert len(set(one_pass)) == len(one_pass) and set(one_pass) <= set(range(size))
        alone = plans.random_batches_many(keys[row : row + 1], sizes[row : row + 1], steps, batch)
        assert torch.equal(alone.index[0], many.index[row])
        assert torch.equal(alone.weight[0], many.weight[row])


@given(SIZES, st.integers(1, 3))
def test_full_batch(sizes: np.ndarray, steps: int) -> None:
    many = plans.full_batch_many(sizes, steps)
    for row, size in enumerate(sizes.tolist()):
        assert live(many, row) == [list(range(size))] * steps
    assert int(many.index.max()) < int(sizes.max())


def test_passes_are_in_new_orders_and_every_order_can_come() -> None:
    keys = keys_of(1, 4000)
    many = plans.shuffled_epochs_many(keys, np.full(4000, 3), 2, 3)
    first, second = many.index[:, 0], many.index[:, 1]
    assert 0.7 < float((first != second).any(1).double().mean()) < 0.95  # 5 of 6 differ
    orders = (first * torch.tensor([9, 3, 1])).sum(1)
    counts = np.unique(orders.numpy(), return_counts=True)[1]
    assert len(counts) == 6 and np.abs(counts - 4000 / 6).max() < 4 * (4000 / 6) ** 0.5
