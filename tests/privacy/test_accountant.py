from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.privacy.accountant import epsilon, spent
from isthmus.privacy.gaussian import LocalDP
from isthmus.wire.ledger import Ledger

pytest.importorskip("dp_accounting")


def gaussian(sigma, count=1, rate=None, adjacency="add-remove", unit="client", kind="poisson"):
    sampling = {"kind": "none"} if rate is None else {"kind": kind, "rate": rate}
    return {
        "mechanism": "gaussian",
        "parameters": {"noise_multiplier": sigma},
        "sampling": sampling,
        "adjacency": adjacency,
        "unit": unit,
        "count": count,
    }


def closed_form(sigma: float, count: int, delta: float) -> float:
    """min over orders a of T a / (2 sigma^2) + ln((a-1)/a) - (ln delta + ln a)/(a-1)."""

    def bound(a):
        return (
            count * a / (2 * sigma**2)
            + math.log((a - 1) / a)
            - (math.log(delta) + math.log(a)) / (a - 1)
        )

    return min(bound(1 + i / 1000) for i in range(100, 60_000))


def gaussian_delta(epsilon: float, mu: float) -> float:
    """delta(epsilon) of a Gaussian of shift mu (Balle and Wang, ICML 2018, Theorem 8)."""

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


def test_sampled_gaussian_reference_values():
    event = gaussian(1.1, count=10_000, rate=0.01)
    assert epsilon([event], 1e-5, "rdp") == pytest.approx(5.632, abs=5e-4)
    assert epsilon([event], 1e-5, "pld") == pytest.approx(5.193, abs=5e-4)


def test_full_batch_gaussian_equals_its_closed_forms():
    event = gaussian(5.0, count=50)
    assert epsilon([event], 1e-5, "rdp") == pytest.approx(7.077, abs=5e-4)
    assert epsilon([event], 1e-5, "rdp") == pytest.approx(closed_form(5.0, 50, 1e-5), abs=2e-4)
    tight = epsilon([event], 1e-5, "pld")
    assert gaussian_delta(tight, math.sqrt(50) / 5) == pytest.approx(1e-5, rel=2e-3)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_replacing_a_unit_is_adding_one_at_half_the_noise(accountant):
    replace = epsilon([gaussian(4.0, 3, adjacency="replace-one")], 1e-5, accountant)
    assert replace == pytest.approx(epsilon([gaussian(2.0, 3)], 1e-5, accountant), rel=1e-9)
    mu = 2 * math.sqrt(3) / 4.0
    assert gaussian_delta(replace, mu) <= 1e-5 * 1.001  # sound: never below the exact value


def test_sampling_without_replacement_is_bounded_by_no_sampling_and_needs_its_adjacency():
    def at(rate):
        return epsilon(
            [gaussian(8.0, 20, rate, "replace-one", kind="without-replacement")], 1e-5, "rdp"
        )

    whole = epsilon([gaussian(8.0, 20, adjacency="replace-one")], 1e-5, "rdp")
    assert at(0.1) < at(0.3) < at(1.0)
    assert at(1.0) == pytest.approx(whole, rel=1e-9)
    with pytest.raises(InputError, match="replace-one"):
        epsilon([gaussian(8.0, 20, 0.1, kind="without-replacement")], 1e-5, "rdp")
    with pytest.raises(InputError, match="accountant: pld"):
        epsilon([gaussian(8.0, 1, 0.1, "replace-one", kind="without-replacement")], 1e-5, "pld")
    with pytest.raises(InputError, match="add-remove"):
        epsilon([gaussian(8.0, 1, 0.1, "replace-one")], 1e-5, "rdp")


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(
    sigma=st.floats(0.7, 6.0),
    rate=st.floats(0.01, 0.6),
    count=st.integers(1, 40),
    more=st.floats(1.1, 2.0),
)
def test_epsilon_grows_with_steps_rate_and_less_noise(sigma, rate, count, more):
    base = epsilon([gaussian(sigma, count, rate)], 1e-5, "rdp")
    assert epsilon([gaussian(sigma, math.ceil(count * more), rate)], 1e-5, "rdp") >= base
    assert epsilon([gaussian(sigma, count, min(1.0, rate * more))], 1e-5, "rdp") >= base
    assert epsilon([gaussian(sigma / more, count, rate)], 1e-5, "rdp") >= base
    assert epsilon([gaussian(sigma, count, rate)], 1e-7, "rdp") >= base


def test_pld_is_strictly_monotone_too():
    base = epsilon([gaussian(1.5, 20, 0.1)], 1e-5)
    for other in (gaussian(1.5, 21, 0.1), gaussian(1.5, 20, 0.12), gaussian(1.4, 20, 0.1)):
        assert epsilon([other], 1e-5) > base
    assert base < epsilon([gaussian(1.5, 20, 0.1)], 1e-5, "rdp")  # the tighter of the two


def test_many_rows_are_one_row_with_a_count_and_order_is_nothing():
    rows = [gaussian(2.0), gaussian(3.0, rate=0.2), gaussian(2.0), gaussian(2.0, count=3)]
    merged = [gaussian(3.0, rate=0.2), gaussian(2.0, count=5)]
    for accountant in ("rdp", "pld"):
        whole = epsilon(merged, 1e-5, accountant)
        assert epsilon(rows, 1e-5, accountant) == pytest.approx(whole, rel=1e-9)
        parts = [epsilon([e], 1e-5, accountant) for e in merged]
        assert max(parts) < whole < sum(parts)  # composed, not added


def test_no_event_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([gaussian(1.0, count=0)], 1e-5) == 0.0
    assert epsilon([gaussian(2.0, rate=0.0)], 1e-5, "pld") == 0.0
    for accountant in ("rdp", "pld"):
        assert epsilon([gaussian(2.0), gaussian(0.0)], 1e-5, accountant) == math.inf


def flips(keep: float, **more):
    """Randomised response: the true bit with probability `keep`."""
    pair = {"upper": [keep, 1 - keep], "lower": [1 - keep, keep]}
    return {"pair": pair, "adjacency": "add-remove", "unit": "client", **more}


def test_pair_equals_randomised_response_exactly():
    loss = math.log(0.75 / 0.25)
    # delta(eps) = p - e^eps (1 - p) for one release; k releases: the binomial sum.
    assert epsilon([flips(0.75)], 1e-9) == pytest.approx(loss, abs=2e-4)
    delta, k = 0.05, 5

    def exact(eps):
        total = 0.0
        for i in range(k + 1):
            upper = math.comb(k, i) * 0.75**i * 0.25 ** (k - i)
            lower = math.comb(k, i) * 0.25**i * 0.75 ** (k - i)
            total += max(0.0, upper - math.exp(eps) * lower)
        return total

    found = epsilon([flips(0.75, count=k)], delta)
    assert exact(found) <= delta + 1e-12
    assert exact(found - 2e-3) > delta


def test_pair_takes_the_worse_direction():
    """An outcome that only one side has leaks in one direction; swapping the sides is the same."""
    pair = {"upper": [0.5, 0.5, 0.0], "lower": [0.4, 0.55, 0.05]}
    swapped = {"upper": pair["lower"], "lower": pair["upper"]}
    common = {"adjacency": "add-remove", "unit": "client"}
    for delta in (0.01, 0.04, 0.1):
        one = epsilon([{"pair": pair, **common}], delta)
        assert one == epsilon([{"pair": swapped, **common}], delta)
        assert (one == math.inf) == (delta < 0.05)


def test_sampled_pair_is_amplified_and_matches_the_mixture():
    whole = epsilon([flips(0.9)], 1e-6)
    half = epsilon([flips(0.9, sampling={"kind": "poisson", "rate": 0.5})], 1e-6)
    # with the unit half of the time: losses ln(0.5/0.1), ln(0.5/0.9), either direction.
    assert half == pytest.approx(math.log(0.5 / 0.1), abs=2e-4)
    assert half < whole == pytest.approx(math.log(9.0), abs=2e-4)
    none = epsilon([flips(0.9, sampling={"kind": "poisson", "rate": 0.0})], 1e-6)
    assert none == 0.0
    with pytest.raises(InputError, match="accountant: rdp"):
        epsilon([flips(0.9)], 1e-6, "rdp")


def test_pairs_and_gaussians_compose():
    both = epsilon([flips(0.75), gaussian(2.0, 4)], 1e-5)
    assert epsilon([gaussian(2.0, 4)], 1e-5) < both
    assert both <= epsilon([gaussian(2.0, 4)], 1e-5) + math.log(3.0) + 1e-3


def test_unlike_events_are_not_added():
    with pytest.raises(InputError, match="unit: example"):
        epsilon([gaussian(1.0), gaussian(1.0, unit="example")], 1e-5)
    with pytest.raises(InputError, match="adjacency: replace-one"):
        epsilon([gaussian(1.0), gaussian(1.0, adjacency="replace-one")], 1e-5)


def test_spent_reads_a_ledger_and_keeps_parties_units_and_adjacencies_apart(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    own = LocalDP(3.0, 1.0).local({"x": torch.zeros(1, 2)}, seeds.keys(0, [1])).event
    for party, event in (
        ("client/1", own),
        ("server", gaussian(2.0, rate=0.5)),
        ("client/1", own),
        ("server", gaussian(2.0, rate=0.5, unit="example")),
        ("client/2", own),
    ):
        ledger.privacy(0.0, party, event)
        ledger.work(party=party, kind="train", seconds=1.0)
    ledger.close()
    found = spent(Ledger.read(tmp_path / "ledger.jsonl").rows(), 1e-5, "rdp")
    assert set(found) == {
        ("client/1", "replace-one", "client"),
        ("client/2", "replace-one", "client"),
        ("server", "add-remove", "client"),
        ("server", "add-remove", "example"),
    }
    one = found["client/2", "replace-one", "client"]
    assert one == epsilon([gaussian(1.5)], 1e-5, "rdp")
    assert one < found["client/1", "replace-one", "client"] < 2 * one


def test_the_accountant_follows_the_sampling_when_none_is_named():
    fixed = gaussian(8.0, 20, 0.1, "replace-one", kind="without-replacement")
    assert epsilon([fixed], 1e-5) == epsilon([fixed], 1e-5, "rdp")
    poisson = gaussian(8.0, 20, 0.1)
    assert epsilon([poisson], 1e-5) == epsilon([poisson], 1e-5, "pld")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"adjacency": "swap"}, "event.adjacency: swap"),
        ({"unit": None}, "event.unit: None"),
        ({"mechanism": "gausian"}, "nearest: gaussian"),
        ({"parameters": {"noise_multiplier": -1.0}}, "noise_multiplier: -1.0"),
        ({"parameters": {"noise_multiplier": math.inf}}, "noise_multiplier: inf"),
        ({"parameters": {}}, "noise_multiplier: nan"),
        ({"sampling": {"kind": "poison", "rate": 0.1}}, "nearest: poisson"),
        ({"sampling": {"kind": "poisson", "rate": 1.5}}, "event.sampling.rate: 1.5"),
        ({"sampling": {"kind": "poisson"}}, "event.sampling.rate"),
        ({"count": 1.5}, "event.count: 1.5"),
        ({"pair": {"upper": [0.5, 0.6], "lower": [0.5, 0.5]}}, "event.pair.upper"),
        ({"pair": {"upper": [0.5, 0.5], "lower": [1.0]}}, "event.pair: unequal lengths"),
    ],
)
def test_bad_events_are_named(change, names):
    with pytest.raises(InputError, match=names):
        epsilon([gaussian(1.0) | change], 1e-5)


def test_bad_questions_are_named():
    for delta in (0.0, 1.0, -1e-5):
        with pytest.raises(InputError, match="delta"):
            epsilon([gaussian(1.0)], delta)
    with pytest.raises(InputError, match="nearest: rdp"):
        epsilon([gaussian(1.0)], 1e-5, "rdpp")  # type: ignore[arg-type]


def test_notes_on_orders_that_do_not_converge_are_silent_and_other_warnings_are_not(caplog):
    import dp_accounting
    from dp_accounting import rdp

    logger = logging.getLogger("absl")
    with caplog.at_level(logging.WARNING, logger="absl"):
        logger.addHandler(caplog.handler)
        try:
            noisy = rdp.RdpAccountant()
            noisy.compose(
                dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(1.0))
            )
            assert "failed to converge" in caplog.text  # the case is one that does warn
            caplog.clear()
            epsilon([gaussian(1.0, rate=0.5)], 1e-5, "rdp")
            assert caplog.text == ""
            logger.warning("another matter")
            assert "another matter" in caplog.text
        finally:
            logger.removeHandler(caplog.handler)
