"""The best draft length: the published table, closed form against brute force, simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import InputError
from isthmus.inference.length import best, estimate, scan, speed, tokens
from isthmus.inference.method import Costs, Seen, method_of

LOADS = (0.01, 0.1, 0.2, 0.4, 0.6)


def brute(alpha: float, load: float, base: float = 1.0, row: float = 0.0) -> list[float]:
    """S(0) to S(64), summed term by term."""
    return [
        sum(alpha**i for i in range(g + 1)) / (base + g * load + (1 - alpha**g) * row)
        for g in range(65)
    ]


@pytest.mark.parametrize(
    ("alpha", "wanted"), [(0.4, [4, 2, 1, 1, 1]), (0.6, [7, 3, 2, 1, 1]), (0.8, [14, 6, 4, 2, 1])]
)
def test_the_table_of_the_paper(alpha: float, wanted: list[int]) -> None:
    assert [best(alpha, load) for load in LOADS] == wanted
    assert [scan(alpha, load) for load in LOADS] == wanted


def test_a_load_equal_to_the_acceptance_gains_nothing() -> None:
    for alpha in (0.4, 0.6):
        assert best(alpha, alpha) == 1
        assert speed(alpha, 1, alpha) == pytest.approx(1.0, abs=1e-15)


alphas = st.one_of(st.floats(0.0, 1.0), st.floats(0.99, 1.0), st.floats(1e-12, 1e-3))


@given(alphas, st.floats(1e-6, 3.0), st.floats(0.01, 100.0))
def test_the_closed_form_is_the_best_of_all(alpha: float, load: float, base: float) -> None:
    all_of_them = brute(alpha, load, base)
    g = best(alpha, load, base)
    assert 1 <= g <= 64
    assert all_of_them[g] >= max(all_of_them[1:]) * (1 - 1e-12)
    assert speed(alpha, g, load, base) == pytest.approx(all_of_them[g], rel=1e-9)
    assert best(alpha, load * 7, base * 7) == pytest.approx(g, abs=1)


@given(alphas, st.floats(0.0, 2.0), st.floats(0.01, 10.0), st.floats(0.0, 50.0))
def test_the_scan_with_a_row_is_the_best_of_all(
    alpha: float, load: float, base: float, row: float
) -> None:
    all_of_them = brute(alpha, load, base, row)
    assert all_of_them[scan(alpha, load, base, row)] >= max(all_of_them[1:]) * (1 - 1e-12)


def test_many_parameter_sets_in_closed_form_and_by_scan() -> None:
    for alpha in np.linspace(0.05, 0.98, 12):
        for load in np.geomspace(1e-3, 0.95, 12):
            for base in (1.0, 1.7, 6.0):
                assert best(alpha, load, base) == scan(alpha, load, base)


@pytest.mark.parametrize(
    ("alpha", "load", "base", "wanted"),
    [
        (1.0, 0.5, 1.0, 64),
        (1.2, 0.5, 1.0, 64),
        (0.5, 0.0, 1.0, 64),
        (0.0, 0.5, 1.0, 1),
        (-0.1, 0.0, 1.0, 1),
        (0.9, 1.0, 1.0, 1),
        (1.0, 1.0, 1.0, 1),
        (0.9, 5.0, 1.0, 1),
        (0.9, 1.0, 50.0, 19),
        (1e-9, 1e-3, 1.0, 1),  # alpha^999 underflows
        (0.5, 1e-9, 1.0, 28),  # so does alpha^(10^9)
        (1 - 1e-16, 1e-12, 1.0, 64),
    ],
)
def test_the_ends_of_the_range(alpha: float, load: float, base: float, wanted: int) -> None:
    assert best(alpha, load, base) == wanted
    clipped = min(max(alpha, 0.0), 1.0)
    assert brute(clipped, load, base)[wanted] >= max(brute(clipped, load, base)[1:]) * (1 - 1e-9)


def test_times_below_zero_are_refused() -> None:
    for load, base, row in ((-1.0, 1.0, 0.0), (0.1, -1.0, 0.0), (0.1, 1.0, math.nan)):
        with pytest.raises(InputError, match="a time"):
            speed(0.5, 3, load, base, row)
    assert speed(0.5, 0, 0.0, 0.0) == math.inf


def test_expected_tokens_and_best_length_in_a_simulation() -> None:
    """Rounds of geometric acceptance: E(g) is their mean, and g* is near their best."""
    alpha, load, base = 0.75, 0.12, 1.4
    runs = np.random.default_rng(8).geometric(1 - alpha, 40_000) - 1
    mean = [1 + np.minimum(runs, g).mean() for g in range(31)]
    for g in (1, 4, 12):
        assert mean[g] == pytest.approx(tokens(alpha, g), rel=0.02)
    simulated = max(range(1, 31), key=lambda g: mean[g] / (base + g * load))
    assert abs(simulated - best(alpha, load, base)) <= 1
    assert math.isclose(tokens(1 - 1e-13, 9), 10, rel_tol=1e-11)


# ------------------------------------------------------------ in the methods


def costs(bit_rate: float, down: float | None = None) -> Costs:
    """50 ms to verify, 5 ms to draft, 10 ms each way, at so many bits per second."""
    return Costs(0.005, 0.05, 8 / bit_rate, 8 / (down or bit_rate), 0.02)


def seen(alpha: float, rounds: int = 4000) -> Seen:
    return Seen(rounds, 10 * rounds, round(10 * rounds * alpha))


def test_tk_slt_follows_the_link() -> None:
    method = method_of("tk-slt", 32000, {"gamma": 5})
    assert method.length(Seen(), costs(1e6)) == 5, "nothing is known in the first round"
    found = [method.length(seen(0.8), costs(rate)) for rate in (1e3, 3e4, 1e5, 1e6, 1e9)]
    assert found == sorted(found) and found[0] == 0
    free = brute(estimate(seen(0.8).judged, seen(0.8).accepted), 0.005, 0.07)
    assert found[-1] == max(range(65), key=free.__getitem__)
    fixed = method_of("tk-slt", 32000, {"gamma": 5, "adapt": False})
    assert fixed.length(seen(0.1), costs(1e3)) == 5


def test_tk_slt_drafts_nothing_where_it_gains_nothing() -> None:
    """At no latency and a free downlink, exactly where S(g*) <= 1."""
    method = method_of("tk-slt", 32000, {"K": 32})
    sent = 33 * 2 + 32 * 2
    for alpha in (0.2, 0.5, 0.8):
        for load in (0.05, 0.3, 0.6, 0.9):
            given_costs = Costs(draft=0.0, verify=2.0, up=2.0 * load / sent, down=0.0, round=0.0)
            believed = estimate(seen(alpha).judged, seen(alpha).accepted)
            g = method.length(seen(alpha), given_costs)
            gains = speed(believed, best(believed, load), load) > 1
            assert g == (best(believed, load) if gains else 0)
            assert gains == (load < believed)


def test_free_verification_needs_no_draft() -> None:
    method = method_of("tk-slt", 32000)
    assert method.length(seen(0.9), Costs(draft=0.01, verify=0.0)) == 0
    assert method.length(seen(0.9), Costs(0.0, 0.0, 0.0, 0.0, 0.0)) == 0
    assert method_of("dssd", 32000, {"adapt": True}).length(seen(0.9), Costs(0.01, 0.0)) == 1


def test_one_unlucky_round_does_not_end_drafting() -> None:
    method = method_of("tk-slt", 32000)
    assert method.length(Seen(1, 1, 0), costs(1e6)) >= 1
    assert method.length(Seen(300, 300, 0), costs(1e5)) == 0


def test_dssd_weighs_the_row_that_comes_down() -> None:
    method = method_of("dssd", 32000, {"gamma": 3, "adapt": True})
    assert method.length(Seen(), costs(1e6)) == 3
    assert method_of("dssd", 32000, {"gamma": 3}).length(seen(0.8), costs(1e6)) == 3
    for rate, down in ((1e5, 1e6), (1e6, 1e7), (1e6, 1e9)):
        given_costs = costs(rate, down)
        alpha = estimate(seen(0.8).judged, seen(0.8).accepted)
        load = 0.005 + 4 * 8 / rate
        found = brute(alpha, load, 0.05 + 0.02 + 3 * 8 / down, 64000 * 8 / down)
        assert method.length(seen(0.8), given_costs) == max(range(1, 65), key=found.__getitem__)
