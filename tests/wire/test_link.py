"""Links: closed forms for times, queues, losses and energy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import PROFILES, Energy, Link
from isthmus.wire.rate import Sampled, Trace


def test_one_message_takes_what_the_formula_says() -> None:
    link = Link(up=1e6, down=4e6, latency=0.02, per_message=0.003, energy=Energy(2.0, 0.5, 0.01))
    up = link.send(1000, "up", now=5.0)
    assert up.done == pytest.approx(5.0 + 0.003 + 8000 / 1e6 + 0.02)
    assert up.joules == pytest.approx(2.0 * 0.008 + 0.01)
    down = link.send(1000, "down", now=5.0)  # the directions do not share a queue
    assert down.seconds == pytest.approx(0.003 + 8000 / 4e6 + 0.02)
    assert down.joules == pytest.approx(0.5 * 0.002 + 0.01)
    assert (up.bytes, up.lost, up.delivered) == (1000, 0, True)


@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(0, 5000)), min_size=1, max_size=12),
    st.floats(0, 0.1),
)
def test_senders_share_a_link_first_come_first_served(
    arrivals: list[tuple[float, int]], per_message: float
) -> None:
    """Lindley's recursion in closed form: done_i = max_j<=i (a_j + sum_j..i service)."""
    link = Link(up=2e4, latency=0.5, per_message=per_message)
    arrivals = sorted(arrivals)
    service = [per_message + 8 * size / 2e4 for _, size in arrivals]
    for i, (now, size) in enumerate(arrivals):
        expected = max(arrivals[j][0] + sum(service[j : i + 1]) for j in range(i + 1)) + 0.5
        assert link.send(size, "up", now).done == pytest.approx(expected)


def test_a_trace_is_integrated_exactly() -> None:
    trace = Trace([0.0, 2.0, 3.0, 5.0], [100.0, 0.0, 300.0, 50.0])
    # 100 bits/s to t=2, nothing to t=3, 300 bits/s to t=5, then 50 for ever.
    assert trace.finish(150.0, 1.0) == pytest.approx(3.0 + 50 / 300)
    assert trace.finish(100.0, 1.0) == pytest.approx(2.0)  # just before the silence
    assert trace.finish(1.0, 2.5) == pytest.approx(3.0 + 1 / 300)
    assert trace.finish(0.0, 2.5) == 2.5
    assert trace.finish(800.0, 0.0) == pytest.approx(5.0)
    assert trace.finish(900.0, 0.0) == pytest.approx(7.0)
    many = trace.finish(np.array([150.0, 100.0, 1.0, 0.0, 900.0]), np.array([1, 1, 2.5, 2.5, 0]))
    np.testing.assert_allclose(many, [3.0 + 50 / 300, 2.0, 3.0 + 1 / 300, 2.5, 7.0])


def test_a_periodic_trace_starts_again() -> None:
    trace = Trace([0.0, 1.0], [10.0, 30.0], period=2.0)  # 40 bits each turn
    assert trace.finish(40.0, 0.0) == pytest.approx(2.0)
    assert trace.finish(405.0, 0.0) == pytest.approx(20.5)
    assert trace.finish(60.0, 1.5) == pytest.approx(
        4.5
    )  # 15, then 10 and 30, then 5 of the next turn
    assert trace.carried(7.5) == pytest.approx(3 * 40 + 10 + 15)


@given(
    st.lists(st.tuples(st.floats(0.01, 2), st.floats(0, 50)), min_size=1, max_size=6),
    st.booleans(),
    st.floats(0, 20),
    st.floats(0, 500),
)
def test_finish_inverts_carried(
    pieces: list[tuple[float, float]], periodic: bool, start: float, bits: float
) -> None:
    times = np.concatenate([[0.0], np.cumsum([length for length, _ in pieces])])
    rates = [rate for _, rate in pieces]
    trace = (
        Trace(times[:-1].tolist(), [*rates[:-1], rates[-1] + 1], period=float(times[-1]))
        if periodic
        else Trace(times.tolist(), [*rates, 7.0])
    )
    end = trace.finish(bits, start)
    assert end >= start
    assert trace.carried(end) - trace.carried(start) == pytest.approx(bits, abs=1e-6)
    if bits > 1e-3:  # and no earlier time would do
        assert trace.carried(end - 1e-6) - trace.carried(start) < bits


def test_a_position_gives_the_rate() -> None:
    """1 km away at 10 m/s and the rate falls with distance: sum of held steps by hand."""
    rate = Sampled(lambda t: 1000.0 / (1.0 + 10.0 * t), step=0.5)
    # From t = 0.25: 0.25 s at 1000, 0.5 s at 1000/6, then 1000/11.
    assert rate.finish(250.0 + 1000 / 12 + 1000 / 22, 0.25) == pytest.approx(1.5)
    assert rate.finish(125.0, 0.25) == pytest.approx(0.375)
    two = rate.finish(np.array([125.0, 0.0]), 0.25)
    np.testing.assert_allclose(two, [0.375, 0.25])
    assert Link(up=rate).send(10, "up", 0.25).done == pytest.approx(0.25 + 80 / 1000)
    with pytest.raises(InputError, match="rate"):
        Sampled(lambda t: 0.0, step=1.0, most=10).finish(1.0, 0.0)


def test_a_lost_transmission_costs_its_time_and_a_round_trip() -> None:
    link = Link(
        up=8e3, latency=0.1, per_message=0.05, loss=0.5, seed=3, energy=Energy(2.0, 0.0, 0.25)
    )
    seen = set()
    now = 0.0
    for _ in range(60):
        got = link.send(500, "up", now)
        seen.add(got.lost)
        assert got.seconds == pytest.approx((got.lost + 1) * 0.55 + got.lost * 0.2 + 0.1)
        assert got.joules == pytest.approx((got.lost + 1) * (2.0 * 0.5 + 0.25))
        assert got.bytes == 500 * (got.lost + 1)
        assert sum(got.attempts.seconds) == pytest.approx(got.seconds)
        assert got.attempts.lost == [True] * got.lost + [False]
        now = got.done
    assert {0, 1, 2} <= seen


def test_losses_are_geometric() -> None:
    p, n = 0.3, 40_000
    lost = Link(loss=p).send_many(np.ones(n, int), "up", 0.0, key=11).lost
    for k in range(4):
        share, expected = (lost == k).mean(), p**k * (1 - p)
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


def test_a_sender_gives_up() -> None:
    link = Link(up=8e3, latency=0.1, loss=0.9, seed=1, attempts=2)
    got = [link.send(1000, "up", 1000.0 * i) for i in range(40)]
    failed = [delivery for delivery in got if not delivery.delivered]
    assert 20 < len(failed) < 40  # 0.81 of 40 expected
    assert all(d.lost == 2 and d.bytes == 2000 for d in failed)
    assert failed[0].seconds == pytest.approx(2 * 1.2)
    ledger = Ledger()
    for delivery in got:
        delivery.enter(ledger, sender="c", receiver="server", kind="update", values=900)
    assert ledger.total("values") == 900 * (40 - len(failed))
    assert ledger.total("bytes") == sum(d.bytes for d in got)


@pytest.mark.parametrize("loss", [0.0, 0.6])
@pytest.mark.parametrize("changing", [False, True])
def test_a_cohort_is_its_links_one_by_one(loss: float, changing: bool) -> None:
    up = Trace([0.0, 1.0, 2.0], [9e3, 2e3, 5e3], period=3.0) if changing else 8e3
    settings = {"latency": 0.05, "per_message": 0.01, "loss": loss, "energy": Energy(1.5, 1, 0.1)}
    sizes, starts = np.array([100, 900, 0, 2500, 400]), np.array([0.0, 0.5, 3.25, 1.0, 7.0])
    many = Link(up=up, **settings).send_many(
        sizes, "up", starts, key=seeds.key(9, "up"), index=np.zeros(5, int)
    )
    cohort, single = Ledger(), Ledger()
    for i in range(5):
        one = Link(up=up, seed=9, **settings).send(int(sizes[i]), "up", float(starts[i]))
        for name in ("sent", "done", "seconds", "bytes", "joules", "lost", "delivered"):
            assert getattr(many, name)[i] == pytest.approx(getattr(one, name)), name
        one.enter(single, sender=f"client/{i}", receiver="server", kind="update",
                  values=int(sizes[i]), round=2, sequence=i)  # fmt: skip
    many.enter(cohort, sender=[f"client/{i}" for i in range(5)], receiver="server", kind="update",
               values=sizes, round=2, sequence=list(range(5)))  # fmt: skip
    assert len(cohort) == int(many.lost.sum()) + 5
    assert bool(many.lost.any()) == (loss > 0)
    for name, column in single.table().items():
        found = cohort.table()[name]
        if column.dtype.kind == "f":
            np.testing.assert_allclose(found, column, atol=2e-12)
        else:
            assert (found == column).all(), name


def test_losses_of_a_cohort_belong_to_its_clients() -> None:
    link, sizes = Link(loss=0.5), np.ones(6, int)
    all_six = link.send_many(sizes, "up", 0.0, key=5, index=np.arange(6)).lost
    some = link.send_many(sizes[:3], "up", 0.0, key=5, index=np.array([4, 0, 2])).lost
    assert some.tolist() == all_six[[4, 0, 2]].tolist()
    rounds = {tuple(link.send_many(sizes, "up", 0.0, key=k).lost) for k in range(8)}
    assert len(rounds) > 1


def test_a_cohort_of_nobody() -> None:
    got = Link(loss=0.5, up=1e3).send_many(np.zeros(0, int), "up", 0.0)
    ledger = Ledger()
    assert got.enter(ledger, sender=[], receiver="server", kind="update") == range(0)
    assert len(got.done) == 0


def test_a_link_goes_on_where_it_was() -> None:
    a, b = (Link(up=1e4, latency=0.1, loss=0.4, seed=2) for _ in range(2))
    for i in range(5):
        a.send(1000, "up", 0.1 * i)
    b.restore(a.state())
    assert [a.send(700, "up", 1.0) for _ in range(5)] == [b.send(700, "up", 1.0) for _ in range(5)]


def test_links_are_parsed() -> None:
    link = Link.parse("up=5e6,down=20e6, latency=0.02,loss=0.1,send=2", seed=4)
    assert link.rates == {"up": 5e6, "down": 20e6}
    assert (link.latency, link.loss, link.energy.send, link.seed) == (0.02, 0.1, 2.0, 4)
    slow = Link.parse("wifi,up=1000")
    assert slow.rates == {"up": 1000.0, "down": PROFILES["wifi"]["down"]}
    for name in PROFILES:
        assert Link.parse(name).send(100, "up", 0.0).delivered


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wify", "nearest: wifi"),
        ("wifi,lattency=1", "nearest: latency"),
        ("up=fast", "link.up: fast given"),
        ("up=", "a number"),
        ("up=0", "more than 0"),
        ("up=nan", "more than 0"),
        ("loss=1", "below 1"),
        ("latency=-1", "0 or more"),
        ("attempts=2.5", "whole"),
        ("", "link"),
    ],
)
def test_bad_links_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Link.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ([0.0, 1.0], [1.0]),
        ([0.5], [1.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([0.0], [0.0]),
        ([0.0, 1.0], [-1.0, 1.0]),
        ([0.0, 1.0], [1.0, 1.0], 1.0),
        ([0.0, 1.0], [0.0, 0.0], 2.0),
    ],
)
def test_bad_traces_are_refused(arguments: tuple) -> None:
    with pytest.raises(InputError, match="trace"):
        Trace(*arguments)
