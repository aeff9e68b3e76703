"""Devices: how long, how much, when, and whether they come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.federated.fleet import Fleet, hours, slowness
from isthmus.wire.device import Device

PHONE = Device.named("phone")


def test_speeds_multiply_seconds_and_joules() -> None:
    who, flops = np.array([0, 1, 4]), np.array([1e10, 1e10, 2e10])
    keys = seeds.keys(0, who)
    plain = Fleet([PHONE], 5).spend(who, flops, keys)
    slow = Fleet([PHONE], 5, slowness=slowness("1,2,4", 5, 0)).spend(who, flops, keys)
    np.testing.assert_allclose(slow.seconds, plain.seconds * [1, 2, 2])
    np.testing.assert_allclose(slow.joules, plain.joules * [1, 2, 2])


def test_jitter_and_lognormal_speeds_have_their_law() -> None:
    """Means and spreads of the logarithms, within four standard errors."""
    n = 4000
    speeds = slowness("lognormal:0.5", n, 3)
    assert speeds is not None
    logs = np.log(speeds)
    assert abs(logs.mean()) < 4 * 0.5 / n**0.5 and abs(logs.std() - 0.5) < 4 * 0.5 / (2 * n) ** 0.5
    fleet = Fleet([PHONE], n, jitter=0.2)
    who = np.arange(n)
    base = Fleet([PHONE], n).spend(who, np.full(n, 1e10), who).seconds
    first, again, other = (
        np.log(fleet.spend(who, np.full(n, 1e10), seeds.keys(k, who)).seconds / base)
        for k in (0, 0, 1)
    )
    assert (
        abs(first.std() - 0.2) < 4 * 0.2 / (2 * n) ** 0.5 and abs(first.mean()) < 4 * 0.2 / n**0.5
    )
    assert np.array_equal(first, again) and abs(np.corrcoef(first, other)[0, 1]) < 4 / n**0.5


def test_vanishing_has_its_rate() -> None:
    keys = seeds.keys(5, np.arange(5000))
    share = Fleet([PHONE], 1, dropout=0.3).vanishes(keys).mean()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 5000) ** 0.5
    assert not Fleet([PHONE], 1).vanishes(keys).any()


def test_hours() -> None:
    """Each is awake a third of the time, its own third; `opens` names the first moment of it."""
    fleet = Fleet([PHONE], 50, seed=1, awake=hours("8/24"))
    times = np.linspace(0, 2 * 86400, 97)
    there = np.stack([fleet.reachable(t) for t in times])
    assert np.allclose(there[:96].mean(0), 1 / 3, atol=0.02) and len(set(map(tuple, there.T))) > 20
    for client in range(50):
        opens = fleet.opens(1000.0, client)
        assert opens is not None and opens >= 1000.0 and fleet.reachable(opens + 1e-6)[client]
        if opens > 1000.0:
            assert not fleet.reachable(opens - 1.0)[client]
    with pytest.raises(InputError, match="awake: 9/8 given"):
        hours("9/8")


def test_asleep_clients_are_not_asked_and_the_clock_goes_on() -> None:
    task = tiny.task((8,) * 6)
    fed = tiny.federation("fedavg", task, awake="1/24", link="ideal")
    for _ in range(8):
        before = fed.now
        report = fed.step()
        begun = min(row["t"] for row in fed.ledger.rows() if row["round"] == fed.round)
        assert begun >= before and fed.fleet.reachable(begun + 1e-6)[report.clients].all()
        assert len(report.clients) < 6
        fed.now += 3600.0


def test_a_flat_battery_ends_a_client() -> None:
    """Two rounds' joules in the battery: everybody takes part twice, then nobody is left."""
    task = tiny.task((8,) * 3)
    once = tiny.play("fedavg", task, 1, speeds="1,2,4")
    spent = [
        sum(row["joules"] for row in once.ledger.rows() if row["from"] == f"client/{i:03d}")
        for i in range(3)
    ]
    battery = 1.5 * max(spent)
    fed = tiny.federation("fedavg", task, speeds="1,2,4", battery=battery)
    for rounds in range(1, 3):
        assert fed.step().clients == [0, 1, 2]
        np.testing.assert_allclose(fed.fleet.spent, rounds * np.array(spent), rtol=1e-9)
    assert not (fed.fleet.spent < battery).all()
    with pytest.raises(InputError, match="battery: every device is flat"):
        for _ in range(100):
            fed.step()


def test_a_deadline_leaves_stragglers_out() -> None:
    """The slow client's upload comes too late: the round ends at the deadline without it."""
    task = tiny.task((8,) * 3)
    free = tiny.play("fedavg", task, 1, speeds="1,1,1000000")
    fed = tiny.federation("fedavg", task, speeds="1,1,1000000", deadline=free.now / 2)
    report = fed.step()
    assert report.accepted == [0, 1] and fed.now == pytest.approx(free.now / 2)
    everybody = tiny.play("fedavg", task, 1)
    assert tiny.apart(tiny.state(fed), tiny.state(everybody)) > 1e-6


def test_who_vanishes_changes_nothing_but_time() -> None:
    """A round that everybody leaves: the model stays, work is paid, the next round goes on."""
    task = tiny.task((8,) * 3)
    keys: dict[str, Any] = {"dropout": 0.999999}
    fed = tiny.federation("scaffold", task, **keys)
    before = {name: x.clone() for name, x in tiny.state(fed).items()}
    report = fed.step()
    assert report.clients == [] and fed.now > 0
    assert all(torch.equal(x, before[name]) for name, x in tiny.state(fed).items())
    assert not any(x.any() for name, x in tiny.kept(fed).items() if name.startswith("control/"))
    assert [row["kind"] for row in fed.ledger.rows()] == ["model"] * 3 + ["train"] * 3
