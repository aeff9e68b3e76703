"""Randomness as an input: the same draws everywhere, and draws that look random."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import isthmus
from isthmus import seeds

WORDS = st.integers(-(2**63), 2**63 - 1)
KEYS = np.array([0, 1, -1, 2**62, -(2**63), 12345], dtype=np.int64)


@given(WORDS, WORDS)
def test_one_fold_in_four_forms(parent: int, child: int) -> None:
    expected = seeds.fold(parent, child)
    p, c = torch.tensor(parent), torch.tensor(child)
    assert seeds.fold(p, child) == expected
    assert seeds.fold(parent, c) == expected
    assert seeds.fold(p, c) == expected
    assert seeds.keys(parent, [child])[0] == expected
    assert seeds.keys_of(np.array([parent]), child)[0] == expected
    assert -(2**63) <= int(expected) < 2**63


@given(WORDS, st.integers(0, 9))
def test_bits_of_many_are_the_bits_of_each(key: int, count: int) -> None:
    both = np.array([key, 7], dtype=np.int64)
    got = seeds.bits_of(both, count)
    assert got.tolist() == [seeds.bits(k, (count,)).tolist() for k in (key, 7)]


def test_draws_are_the_same_under_vmap_and_one_by_one() -> None:
    keys = torch.from_numpy(KEYS)
    for draw in (seeds.uniform, seeds.normal, seeds.bits):
        for shape in ((5,), (2, 3), (0,), ()):
            many = torch.vmap(lambda k, d=draw, s=shape: d(k, s))(keys)
            each = torch.stack([draw(int(k), shape) for k in KEYS])
            assert torch.equal(many, each) and many.dtype == each.dtype
    folded = torch.vmap(lambda k: seeds.fold(k, 9))(keys)
    assert folded.tolist() == [seeds.fold(int(k), 9) for k in KEYS]
    orders = torch.vmap(lambda k: seeds.permutation(k, 11))(keys)
    assert torch.equal(orders, torch.stack([seeds.permutation(int(k), 11) for k in KEYS]))


def test_draws_do_not_depend_on_the_process() -> None:
    program = (
        "from isthmus import seeds; "
        "print(seeds.key(3, 'client', -7), seeds.bits(seeds.key('a'), (3,)).tolist(), "
        "seeds.uniform(5, (2,)).tolist(), seeds.normal(5, (2,)).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(isthmus.__file__).parent.parent), "PYTHONHASHSEED": "77"},
    )
    here = (
        seeds.key(3, "client", -7), seeds.bits(seeds.key("a"), (3,)).tolist(),
        seeds.uniform(5, (2,)).tolist(), seeds.normal(5, (2,)).tolist(),
    )  # fmt: skip
    assert done.stdout.strip() == " ".join(map(str, here))


def test_a_prefix_does_not_depend_on_what_is_drawn_behind_it() -> None:
    """A padded batch sees the masks of the unpadded one."""
    for draw in (seeds.uniform, seeds.normal, seeds.bits):
        assert torch.equal(draw(8, (7, 3))[:4], draw(8, (4, 3)))


def test_keys_tell_order_type_and_length_apart() -> None:
    parts = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), ("0",), ("1", "0"), ("a", "b"), ("ab",)]
    parts += [("b", "a"), (-1,), (2**63 - 1,), (0, "client", 3), (0, "client", 4), ("", 0), (0, "")]
    assert len({seeds.key(*p) for p in parts}) == len(parts)
    grid = {seeds.key(a, "visit", b, c) for a, b, c in itertools.product(range(20), repeat=3)}
    assert len(grid) == 8000


def test_a_flipped_bit_flips_half_of_the_key() -> None:
    flips = [
        bin((seeds.fold(k, 3) ^ seeds.fold(k ^ (1 << bit), 3)) & (2**64 - 1)).count("1")
        for k in (0, 1, 987654321)
        for bit in range(62)
    ]
    assert abs(np.mean(flips) - 32.0) < 1.5 and min(flips) > 10 and max(flips) < 54


def test_uniform_has_its_grid_and_its_range() -> None:
    x = seeds.uniform(4, (1000,))
    assert x.dtype == torch.float32 and bool(((x >= 0) & (x < 1)).all())
    assert torch.equal(x * 2**24, (x * 2**24).round())
    y = seeds.uniform(4, (1000,), torch.float64)
    assert bool(((y * 2**53) == (y * 2**53).round()).all()) and bool((y != y.float()).any())
    assert float((y - x).abs().max()) <= 2.0**-24  # more digits of the same number


@pytest.mark.parametrize("key", [0, 1, -5, seeds.key("uniformity")])
def test_uniformity(key: int) -> None:
    x = seeds.uniform(key, (40_000,)).numpy()
    counts, _ = np.histogram(x, 64, (0, 1))
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(x, "uniform").pvalue > 1e-3
    low = (seeds.bits(key, (40_000,)).numpy() & 255).astype(np.int64)  # the last bits as well
    assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > 1e-3


@pytest.mark.parametrize("key", [0, 2, seeds.key("normality")])
def test_normality(key: int) -> None:
    x = seeds.normal(key, (40_000,), torch.float64).numpy()
    n = len(x)
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(stats.skew(x)) < 4 * (6 / n) ** 0.5
    assert abs(stats.kurtosis(x)) < 4 * (24 / n) ** 0.5
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert torch.equal(seeds.normal(key, (9,)), seeds.normal(key, (9,), torch.float64).float())


def _correlations(rows: np.ndarray) -> np.ndarray:
    c = np.corrcoef(rows)
    return c[np.triu_indices(len(rows), 1)]


def test_streams_are_independent() -> None:
    """Neighbouring keys, clients, steps and positions: no correlation, and pairs fill a square."""
    n = 2000
    root = seeds.key(0, "visit", 1)
    streams = {
        "keys": [seeds.uniform(k, (n,), torch.float64) for k in range(16)],
        "clients": [
            seeds.uniform(int(k), (n,), torch.float64) for k in seeds.keys(root, range(16))
        ],
        "steps": [seeds.uniform(seeds.fold(root, t), (n,), torch.float64) for t in range(16)],
    }
    for rows in streams.values():
        c = _correlations(torch.stack(rows).numpy()) * n**0.5
        assert np.abs(c).max() < 4.5 and abs(c.std() - 1.0) < 0.25
    x = seeds.uniform(root, (40_000,), torch.float64).numpy()
    for lag in (1, 2, 3, 10):
        assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 4 / len(x) ** 0.5
        pairs, _, _ = np.histogram2d(x[:-lag:2], x[lag::2][: len(x[:-lag:2])], 8, [[0, 1], [0, 1]])
        assert stats.chisquare(pairs.ravel()).pvalue > 1e-3
    first = np.array([float(seeds.uniform(k, (), torch.float64)) for k in range(4000)])
    assert stats.kstest(first, "uniform").pvalue > 1e-3  # the first draw of consecutive keys
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / 4000**0.5


def test_parent_and_child_share_no_draws() -> None:
    parent = seeds.bits(1, (500,)).tolist()
    children = [seeds.bits(seeds.fold(1, c), (500,)).tolist() for c in range(4)]
    drawn = [*parent, *itertools.chain(*children)]
    assert len(set(drawn)) == len(drawn)


def test_every_permutation_is_as_likely() -> None:
    orders = [tuple(seeds.permutation(seeds.fold(3, k), 4).tolist()) for k in range(4800)]
    counts = [orders.count(p) for p in itertools.permutations(range(4))]
    assert sum(counts) == 4800 and stats.chisquare(counts).pvalue > 1e-3
    assert seeds.permutation(1, 0).tolist() == [] and seeds.permutation(1, 1).tolist() == [0]


def test_generators_outside_steps() -> None:
    a, b, c = (torch.rand(3, generator=seeds.generator(0, "x", i)) for i in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    u, v, w = (seeds.rng(0, "x", i).random(3) for i in (1, 1, 2))
    assert (u == v).all() and (u != w).any()
    before = torch.get_rng_state()
    seeds.normal(3, (5,)), seeds.generator(4), seeds.rng(4), seeds.permutation(1, 9)
    assert torch.equal(before, torch.get_rng_state())
