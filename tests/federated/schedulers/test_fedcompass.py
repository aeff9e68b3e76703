"""FedCompass: its trace by hand, and what holds under any speeds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated import tiny
from tests.federated.schedulers.played import play

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.federated.schedulers.fedcompass import FedCompass


def test_trace_of_three_speeds() -> None:
    """1, 2 and 4 seconds a step, 20 to 100 steps, f = 1.2: every mix, worked out by hand."""
    speeds = (1.0, 2.0, 4.0)
    trace = play(
        FedCompass(3, qmin=20, qmax=100, f=1.2), lambda c, steps, _: speeds[c] * steps, 1000.0
    )
    said = [(mix.time, mix.clients, mix.steps) for mix in trace]
    assert said[:8] == [
        (100.0, (0,), (100,)),
        (200.0, (1,), (100,)),
        (200.0, (0,), (100,)),
        (300.0, (0,), (100,)),
        (320.0, (1, 0), (60, 20)),
        (400.0, (2,), (100,)),
        (420.0, (0, 1), (100, 50)),
        (520.0, (0,), (100,)),
    ]
    assert said[8][0] == 540.0 and sorted(said[8][1]) == [0, 1, 2]
    for i, mix in enumerate(trace[9:]):
        assert mix.time == 640.0 + 100 * i
        assert dict(zip(mix.clients, mix.steps, strict=True)) == {0: 100, 1: 50, 2: 25}
        assert mix.staleness == (0, 0, 0)


def test_weights_fall_with_staleness() -> None:
    """The first mixes: alpha / 3 times 1, 2^-1/2 (one mix since the start), and so on."""
    speeds = (1.0, 2.0, 4.0)
    trace = play(
        FedCompass(3, qmin=20, qmax=100, f=1.2, alpha=0.6, a=0.5),
        lambda c, steps, _: speeds[c] * steps,
        1000.0,
    )
    for mix in trace:
        assert mix.weights == pytest.approx([0.2 * (1 + u) ** -0.5 for u in mix.staleness])
    assert trace[0].staleness == (0,) and trace[1].staleness == (1,)
    assert len({w for mix in trace for w in mix.weights}) > 2


@settings(max_examples=40, deadline=None)
@given(
    speeds=st.lists(st.floats(0.5, 16.0), min_size=1, max_size=7),
    jitter=st.floats(0.0, 0.5),
    lost=st.floats(0.0, 0.3),
    seed=st.integers(0, 10**6),
)
def test_invariants(speeds: list[float], jitter: float, lost: float, seed: int) -> None:
    """Steps stay in their range, nobody is in two groups, every update is mixed once (`play`
    checks that), clocks and groups are monotone, and the state survives JSON at every turn."""
    schedule = FedCompass(len(speeds), f=1.3)
    draw = seeds.rng(seed, "jitter")

    class Resumed:
        """The schedule, rebuilt from its own state before every event."""

        def __getattr__(self, name: str) -> object:
            nonlocal schedule
            fresh = FedCompass(len(speeds), f=1.3)
            fresh.restore(json.loads(json.dumps(schedule.state())))
            schedule = fresh
            in_groups = [m for group in schedule.groups.values() for m in group.members]
            assert len(in_groups) == len(set(in_groups))
            assert all(20 <= q <= 100 for q in schedule.steps.values())
            assert all(g.expected <= g.latest for g in schedule.groups.values())
            return getattr(schedule, name)

    trace = play(
        Resumed(),
        lambda c, steps, _: speeds[c] * (steps or 0) * float(np.exp(jitter * draw.normal())),
        3000.0,
        lambda _: bool(draw.random() < lost),
    )
    times = [mix.time for mix in trace]
    assert times == sorted(times)
    assert all(u >= 0 for mix in trace for u in mix.staleness)


def test_bad_settings_are_one_line() -> None:
    with pytest.raises(InputError, match="qmin: 0 given, allowed: 1 to qmax"):
        FedCompass(3, qmin=0)
    with pytest.raises(InputError, match=r"f: 0\.5 given"):
        FedCompass(3, f=0.5)


def test_one_group_and_full_weight_is_the_uniform_mean() -> None:
    """A mix of everybody from the same start is w + mean_i D_i, to the bit of the weights."""
    task = tiny.task((8, 8, 8))
    keys = {"schedule": "fedcompass:qmin=3,qmax=3,alpha=1.0", "link": "ideal"}
    fed = tiny.federation("fedavg", task, **keys)
    for _ in range(3):
        fed.step()
    start = {name: x.clone() for name, x in fed.state["shared"].items()}
    seen = []
    run = fed.executor.run

    def watched(*given: object) -> object:
        done = run(*given)
        seen.append(done.updates.delta)
        return done

    fed.executor.run = watched  # type: ignore[method-assign]
    fed.step()
    deltas = {name: torch.cat([s[name] for s in seen]) for name in seen[0]}
    for name, x in fed.state["shared"].items():
        torch.testing.assert_close(x, start[name] + deltas[name].mean(0), rtol=1e-12, atol=1e-14)
