from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus import catalogue, seeds
from isthmus.contracts import Context, Meta, Reducer, Selector, Updates
from isthmus.defenses.krum import (
    Krum,
    MultiKrum,
    krum,
    multi_krum,
    scores,
    squared_distances,
)
from isthmus.defenses.median import Median, median
from isthmus.defenses.trimmed_mean import TrimmedMean, trimmed_mean
from isthmus.errors import InputError

N, D, F = 11, 7, 3


def rows(n=N, d=D, seed=5):
    """Skewed rows: mean, median, trimmed mean, first and last row all differ."""
    return torch.exp(1.5 * seeds.normal(seed, (n, d), torch.float64)) - 1.0


RULES = {
    "median": median,
    "trimmed-mean": lambda x: trimmed_mean(x, F),
    "krum": lambda x: krum(x, F),
    "multi-krum": lambda x: multi_krum(x, F),
    "multi-krum-2": lambda x: multi_krum(x, F, 2),
}
each = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def brute_scores(x, f):
    """Krum's scores by explicit differences, in plain Python."""
    points = x.tolist()
    found = []
    for i, p in enumerate(points):
        apart = sorted(
            sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
            for j, q in enumerate(points)
            if j != i
        )
        found.append(sum(apart[: len(points) - f - 2]))
    return found


def test_the_inputs_tell_the_rules_apart():
    x = rows()
    results = [rule(x) for rule in RULES.values()] + [x.mean(dim=0), x[0], x[-1]]
    for a, b in itertools.combinations(results, 2):
        assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_median_is_the_middle_or_the_mean_of_the_two(n):
    x = rows(n)
    expected = [statistics.median(column) for column in x.T.tolist()]
    assert torch.allclose(median(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-14)
    assert torch.equal(median(x.view(n, D, 1)), median(x).view(D, 1))
    if n == 10:
        assert not torch.allclose(median(x), x.median(dim=0).values)


@pytest.mark.parametrize("f", [0, 1, 5])
def test_trimmed_mean_is_the_mean_of_what_remains(f):
    x = rows()
    expected = [statistics.fmean(sorted(c)[f : N - f]) for c in x.T.tolist()]
    assert torch.allclose(
        trimmed_mean(x, f), torch.tensor(expected, dtype=torch.float64), rtol=1e-13
    )


def test_trimming_nothing_is_the_mean_and_trimming_most_is_the_median():
    x = rows()
    assert torch.equal(trimmed_mean(x, 0), x.mean(dim=0))
    assert torch.equal(trimmed_mean(x, (N - 1) // 2), median(x))


@pytest.mark.parametrize("f", [0, 1, 4])
def test_krum_scores_are_sums_of_the_nearest_squared_distances(f):
    x = rows()
    found = scores(squared_distances(x @ x.T), f)
    expected = torch.tensor(brute_scores(x, f), dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-10)
    # one neighbour more, or distances that are not squared, would choose otherwise somewhere
    assert torch.equal(krum(x, f), x[int(expected.argmin())])
    order = expected.argsort()
    assert torch.allclose(multi_krum(x, f), x[order[: N - f]].mean(dim=0))
    assert torch.allclose(multi_krum(x, f, 2), x[order[:2]].mean(dim=0))
    assert torch.equal(multi_krum(x, f, 1), krum(x, f))


def test_the_number_of_neighbours_and_the_squares_decide():
    """Nine points of which n-f-2 neighbours, n-f-1, and unsquared distances choose three others."""
    first = [0.9, -0.6, -0.2, -0.6, 0.7, 1.8, 2.9, 1.0, 8.6]
    second = [-0.2, -0.9, -0.7, 0.0, 2.0, 0.0, 15.7, 6.4, 4.4]
    x = torch.tensor([first, second], dtype=torch.float64).T
    f = 2
    apart = torch.cdist(x, x).fill_diagonal_(float("inf")).sort(dim=1).values
    assert int(apart[:, : 9 - f - 1].square().sum(dim=1).argmin()) == 4
    assert int(apart[:, : 9 - f - 2].sum(dim=1).argmin()) == 2
    assert torch.equal(krum(x, f), x[0])


@each
def test_order_of_clients_does_not_matter(rule):
    x = rows()
    for seed in range(5):
        shuffled = x[seeds.permutation(seed, N)]
        assert torch.allclose(rule(shuffled), rule(x), rtol=1e-12, atol=1e-12)


@each
def test_a_common_shift_shifts_the_result(rule):
    x = rows()
    shift = 10.0 * seeds.normal(9, (D,), torch.float64)
    assert torch.allclose(rule(x + shift), rule(x) + shift, rtol=1e-10, atol=1e-10)


@each
def test_a_common_scale_scales_the_result(rule):
    x = rows()
    assert torch.allclose(rule(3.5 * x), 3.5 * rule(x), rtol=1e-12)
    assert torch.allclose(rule(-x), -rule(x), rtol=1e-12)


@each
@settings(max_examples=30, deadline=None)
@given(
    row=hnp.arrays("float64", 4, elements=st.floats(-1e6, 1e6, allow_subnormal=False)),
    n=st.integers(2 * F + 3, 14),
)
def test_equal_uploads_are_returned(rule, row, n):
    x = torch.from_numpy(row).expand(n, 4)
    assert torch.allclose(rule(x), x[0], rtol=1e-14, atol=0.0)


@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(
        "float64",
        st.tuples(st.integers(3, 12), st.integers(1, 5)),
        elements=st.integers(-50, 50).map(float),
    ),
    data=st.data(),
)
def test_properties_of_any_input(x, data):
    x = torch.from_numpy(x)
    n = len(x)
    f = data.draw(st.integers(0, (n - 3) // 2))
    low, high = x.sort(dim=0).values[f], x.sort(dim=0).values[n - 1 - f]
    for result in (median(x), trimmed_mean(x, f)):
        assert ((low - 1e-9 <= result) & (result <= high + 1e-9)).all()
    chosen = krum(x, f)
    assert (x == chosen).all(dim=1).any()  # one of the inputs
    best = brute_scores(x, f)
    own = [s for s, row in zip(best, x, strict=True) if torch.equal(row, chosen)]
    assert min(own) <= min(best) + 1e-6


def test_one_huge_row_moves_the_mean_without_bound_and_the_others_within_the_honest_range():
    x = rows()
    honest = x[1:]
    spread = float(torch.cdist(honest, honest).max())
    moved = {}
    for size in (1e3, 1e6, 1e9):
        bad = x.clone()
        bad[0] = size
        for name, rule in RULES.items():
            moved.setdefault(name, []).append(float((rule(bad) - honest.mean(dim=0)).norm()))
        assert float((bad.mean(dim=0) - honest.mean(dim=0)).norm()) > size / N
    for name, distances in moved.items():
        assert max(distances) <= spread, name
        assert distances[1] == pytest.approx(distances[2], rel=1e-6), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_krum_never_chooses_an_upload_that_is_not_finite(bad):
    x = rows()
    x[4] = bad
    x[7, 2] = bad
    for f in (2, 3):
        assert torch.isfinite(krum(x, f)).all()
        assert torch.isfinite(multi_krum(x, f)).all()


def test_illegal_counts_are_named():
    for f in (-1, 4, 9):
        with pytest.raises(
            InputError, match=r"krum.f: -?\d given, allowed: 0 to 3 with 10 uploads"
        ):
            krum(rows(10), f)
    with pytest.raises(InputError, match="no f at all"):
        krum(rows(2), 0)
    krum(rows(11), 4)
    for m in (0, 12):
        with pytest.raises(InputError, match=r"multi-krum\.m"):
            multi_krum(rows(), 2, m)
    for f in (-1, 5):
        with pytest.raises(InputError, match=r"0 to 4 with 10 uploads"):
            trimmed_mean(rows(10), f)
    for make in (lambda: Krum(-1), lambda: MultiKrum(-1), lambda: TrimmedMean(-1)):
        with pytest.raises(InputError):
            make()
    with pytest.raises(InputError, match="beta"):
        TrimmedMean(beta=0.5)
    with pytest.raises(InputError, match="iterative"):
        MultiKrum(f=1, m=3, iterative=True)


# -- weights ---------------------------------------------------------------------------------


def test_weighted_median_of_whole_weights_is_the_median_of_repeated_rows():
    x = rows(6)
    counts = torch.tensor([1, 4, 2, 1, 3, 2])
    repeated = x.repeat_interleave(counts, dim=0)
    for scale in (1.0, 1 / 13):
        found = median(x, counts.float() * scale)
        assert torch.allclose(found, median(repeated), rtol=1e-12)
    assert not torch.allclose(median(x), median(repeated))


@pytest.mark.parametrize("n", [5, 6])
def test_equal_weights_are_no_weights(n):
    x = rows(n)
    equal = torch.full((n,), 1 / n)
    assert torch.equal(median(x, equal), median(x))
    assert torch.allclose(trimmed_mean(x, 2, equal), trimmed_mean(x, 2), rtol=1e-12)


def test_weighted_trimmed_mean_trims_by_rank_and_averages_by_weight():
    x = rows(6)
    w = torch.tensor([5.0, 1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    expected = []
    for column in x.T.tolist():
        kept = sorted(zip(column, w.tolist(), strict=True))[1:5]
        expected.append(sum(v * k for v, k in kept) / sum(k for _, k in kept))
    assert torch.allclose(trimmed_mean(x, 1, w), torch.tensor(expected, dtype=torch.float64))
    assert torch.allclose(trimmed_mean(x, 0, w), (w @ x) / w.sum())


# -- the objects -----------------------------------------------------------------------------

CTX = Context(round=0, key=1)


def updates(x, buffers=None):
    meta = [Meta(client=10 + i, round=0, version=0, n_examples=1.0 + i) for i in range(len(x))]
    delta = {"w": x[:, :6].reshape(-1, 2, 3), "b": x[:, 6:]}
    return Updates(delta=delta, buffers=buffers or {}, meta=meta)


def test_reducers_reduce_every_tensor_of_the_uploads_in_use():
    x = rows()
    counts = torch.arange(N).view(N, 1) ** 2
    given_updates = updates(x, {"mean": 2 * x[:, :2] + 1, "steps": counts})
    weights = torch.ones(N, dtype=torch.float64)
    weights[[2, 9]] = 0.0
    keep = weights > 0
    for reducer, rule in (
        (Median(), median),
        (TrimmedMean(f=2), lambda v: trimmed_mean(v, 2)),
        (TrimmedMean(beta=0.25), lambda v: trimmed_mean(v, 2)),  # floor(0.25 * 9)
    ):
        assert isinstance(reducer, Reducer)
        out = reducer.reduce(given_updates, weights, CTX)
        assert torch.allclose(out.tensors["w"].reshape(-1), rule(x[keep, :6]))
        assert torch.allclose(out.tensors["b"], rule(x[keep, 6:]))
        assert torch.allclose(out.buffers["mean"], rule(2 * x[keep, :2] + 1))
        assert out.buffers["steps"].dtype == torch.int64
        expected = rule(counts[keep].double()).round()
        assert torch.equal(out.buffers["steps"].double(), expected)
        assert out.weights is None and out.diag["accepted"] == N - 2


def test_reducers_use_weights_only_when_asked():
    x = rows()
    w = torch.linspace(0.2, 4.0, N, dtype=torch.float64)
    given_updates = updates(x)
    for plain, weighted, expected in (
        (Median(), Median(weighted=True), median(x, w)),
        (TrimmedMean(2), TrimmedMean(2, weighted=True), trimmed_mean(x, 2, w)),
    ):
        one = plain.reduce(given_updates, w, CTX)
        same = plain.reduce(given_updates, torch.ones(N), CTX)
        assert torch.equal(one.tensors["w"], same.tensors["w"])
        assert torch.allclose(
            weighted.reduce(given_updates, w, CTX).tensors["b"], expected[6:], rtol=1e-12
        )


def test_reducing_nothing_changes_nothing():
    out = Median().reduce(updates(rows()), torch.zeros(N), CTX)
    assert torch.equal(out.tensors["w"], torch.zeros(2, 3, dtype=torch.float64))


def test_selectors_accept_what_the_rules_choose():
    x = rows()
    one = Krum(f=F).select(updates(x), CTX)
    assert isinstance(Krum(), Selector) and isinstance(MultiKrum(), Selector)
    assert int(one.accepted.sum()) == 1
    assert torch.equal(x[one.accepted][0], krum(x, F))
    assert torch.equal(one.weights @ x, krum(x, F))
    assert torch.allclose(one.diag["scores"].double(), scores(squared_distances(x @ x.T), F))
    for m in (None, 1, 4):
        many = MultiKrum(f=F, m=m).select(updates(x), CTX)
        assert int(many.accepted.sum()) == (m or N - F)
        assert torch.allclose(many.weights @ x, multi_krum(x, F, m), rtol=1e-12)
    kept = MultiKrum(f=F, weighted=True).select(updates(x), CTX)
    assert kept.weights is None and int(kept.accepted.sum()) == N - F


def test_without_f_the_selectors_tolerate_as_many_as_n_allows():
    x = rows()
    largest = (N - 3) // 2
    assert torch.equal(
        Krum().select(updates(x), CTX).accepted, Krum(largest).select(updates(x), CTX).accepted
    )
    assert int(MultiKrum().select(updates(x), CTX).accepted.sum()) == N - largest
    with pytest.raises(InputError, match="no f at all"):
        Krum().select(updates(rows(2)), CTX)
    assert (Krum(3).min_clients(), MultiKrum().min_clients(), TrimmedMean(3).min_clients()) == (
        9,
        3,
        7,
    )


def test_iterative_multi_krum_scores_the_rest_again_after_each_choice():
    x, f = rows(), 1
    pool, chosen = list(range(N)), set()
    while len(pool) > 2 * f + 2:
        inside = brute_scores(x[pool], f)
        chosen.add(pool.pop(inside.index(min(inside))))
    found = MultiKrum(f=f, iterative=True).select(updates(x), CTX)
    assert set(found.accepted.nonzero().flatten().tolist()) == chosen
    assert len(chosen) == N - 2 * f - 2
    at_once = MultiKrum(f=f, m=len(chosen)).select(updates(x), CTX)
    assert not torch.equal(found.accepted, at_once.accepted)


def test_the_rules_are_found_by_name():
    assert catalogue.find("selector", "Krum") is Krum
    assert catalogue.find("selector", "multi_krum") is MultiKrum
    assert catalogue.find("reducer", "median") is Median
    assert catalogue.find("reducer", "Trimmed Mean") is TrimmedMean
