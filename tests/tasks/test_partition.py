from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import InputError
from isthmus.tasks.partition import parse, partition

LABELS = np.arange(300) * 7 % 10
GROUPS = [f"g{i * i % 23}" for i in range(300)]  # 12 groups of unequal size


@st.composite
def cases(draw):
    size = draw(st.integers(1, 200))
    n = draw(st.integers(1, size))
    minimum = draw(st.integers(0, size // n))
    labels = np.array(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size)))
    return labels, n, minimum, draw(st.integers(0, 2**40))


def _exactly_once(parts, size: int) -> None:
    assert np.concatenate(parts).dtype == np.int64
    assert sorted(np.concatenate(parts).tolist()) == list(range(size))
    assert all((np.diff(part) > 0).all() for part in parts)


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([1e-6, 0.05, 0.5, 100.0]))
def test_every_index_once_and_the_minimum_holds(case, alpha) -> None:
    labels, n, minimum, seed = case
    groups = [str(label) for label in labels]
    for scheme in ("iid", f"dirichlet:{alpha}"):
        parts = partition(n, scheme, seed, labels=labels, groups=groups, minimum=minimum)
        assert len(parts) == n and min(map(len, parts)) >= minimum
        _exactly_once(parts, len(labels))
        again = partition(n, scheme, seed, labels=labels, groups=groups, minimum=minimum)
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**40))
def test_shards_give_every_index_once(n, per_client, seed) -> None:
    parts = partition(n, "shards", seed, labels=LABELS, per_client=per_client)
    _exactly_once(parts, 300)
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 300 // (n * per_client) * per_client


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**40))
def test_natural_never_divides_a_group(n, seed) -> None:
    parts = partition(n, "natural", seed, groups=GROUPS)
    _exactly_once(parts, 300)
    owners = [{GROUPS[i] for i in part} for part in parts]
    assert sum(map(len, owners)) == len(set(GROUPS))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.3", "shards:2", "natural"])
def test_the_seed_decides(scheme) -> None:
    a, b = (partition(5, scheme, seed, labels=LABELS, groups=GROUPS) for seed in (0, 1))
    assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_iid_is_even() -> None:
    parts = partition(7, "iid", 0, groups=GROUPS)
    assert sorted(map(len, parts)) == [42, 43, 43, 43, 43, 43, 43]


def test_dirichlet_skew_follows_alpha() -> None:
    """The largest class share of a client: about 1 for small alpha, near 1/10 for large."""

    def top_share(alpha: float) -> float:
        labels = np.arange(6000) % 10
        parts = partition(10, "dirichlet", 3, labels=labels, alpha=alpha)
        return float(np.mean([np.bincount(labels[p]).max() / len(p) for p in parts]))

    assert top_share(0.05) > 0.55 > top_share(0.5) > 0.2 > top_share(1000.0)


def test_dirichlet_shares_have_the_laws_mean_and_variance() -> None:
    """Shares of one class over n clients: mean 1/n, variance (1/n)(1 - 1/n) / (n alpha + 1)."""
    n, alpha, labels = 4, 0.8, np.zeros(1000, dtype=int)
    shares = np.array(
        [
            [
                len(p) / 1000
                for p in partition(n, "dirichlet", s, labels=labels, alpha=alpha, minimum=0)
            ]
            for s in range(600)
        ]
    )
    variance = 0.25 * 0.75 / (n * alpha + 1)
    assert shares.mean(0) == pytest.approx(np.full(n, 0.25), abs=4 * (variance / 600) ** 0.5)
    assert shares.var() == pytest.approx(variance, rel=0.1)


def test_a_minimum_beyond_luck_is_repaired() -> None:
    parts = partition(20, "dirichlet:0.01,minimum=15", 0, labels=LABELS)
    assert {len(part) for part in parts} == {15}


def test_a_shard_client_sees_few_classes() -> None:
    parts = partition(50, "shards:2", 0, labels=np.arange(1000) % 10)
    assert all(len(set((part % 10).tolist())) <= 2 for part in parts)
    assert len({tuple(sorted(set((part % 10).tolist()))) for part in parts}) > 10


def test_natural_clients_are_the_groups_in_order() -> None:
    groups = ["b", "b", "c", "a", "c", "b"]
    parts = partition(3, "natural", 0, groups=groups)
    assert [p.tolist() for p in parts] == [[0, 1, 5], [2, 4], [3]]
    two = partition(2, "natural", 0, groups=groups)
    assert sorted(p.tolist() for p in two) == [[0, 1, 5], [2, 3, 4]]


@pytest.mark.parametrize(
    ("n", "scheme", "message"),
    [
        (0, "iid", "clients: 0 given"),
        (301, "iid", "minimum: 1 given, allowed: 0 or less: 300 items over 301 clients"),
        (30, "dirichlet:0.3,minimum=11", "minimum: 11 given, allowed: 10 or less"),
        (100, "shards:4", "minimum: 1 given, allowed: 0 or less with 4 shards each"),
        (13, "natural", "clients: 13 given, allowed: 12 or fewer"),
        (3, "natural:minimum=200", "minimum: 200 given"),
        (12, "natural:minimum=20", "the smallest client's items"),
        (3, "dirichlet:-1", "alpha: -1.0 given, allowed: above 0"),
        (3, "dirichlet:x", "alpha: x given, allowed: a number"),
        (3, "dirichlet:0.3,12", "option of dirichlet: alpha given"),
        (3, "shards:per_cleint=2", "nearest: per_client"),
        (3, "dirichlt:0.3", "nearest: dirichlet"),
        (3, "iid:alpha=2", "option of iid: alpha given"),
    ],
)
def test_impossible_demands_are_one_line(n, scheme, message) -> None:
    with pytest.raises(InputError, match=message):
        partition(n, scheme, 0, labels=LABELS, groups=GROUPS)


def test_label_skew_needs_labels_and_options_need_names() -> None:
    with pytest.raises(InputError, match="no single class"):
        partition(2, "dirichlet", 0, groups=GROUPS)
    with pytest.raises(InputError, match="option of iid: alpah"):
        partition(2, "iid", 0, groups=GROUPS, alpah=1.0)
    assert parse(" shards: 3 ") == ("shards", {"per_client": 3})
