"""The asynchronous engine: identities with FedAvg, batches of pending visits, faults, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from tests.federated.schedulers.played import play

from isthmus.errors import InputError
from isthmus.federated.asynchronous import Asynchronous
from isthmus.federated.method import Method
from isthmus.federated.schedule import staleness
from isthmus.federated.schedulers.fedasync import FedAsync
from isthmus.federated.schedulers.fedbuff import FedBuff
from isthmus.run import checkpoint

SIZES = (16, 16, 16, 16)
UNEQUAL: dict[str, Any] = {"speeds": "1,1.7,2.9,5.3", "link": "wifi", "epochs": 2}


@pytest.mark.parametrize("rule", ["polynomial", "hinge", "constant"])
def test_staleness_never_raises_a_weight(rule: str) -> None:
    factors = [staleness(rule, 0.7, 3.0, u) for u in range(12)]
    assert factors[0] == 1.0 and all(a >= b > 0 for a, b in pairwise(factors))


def test_fedbuff_of_all_at_equal_speeds_is_fedavg() -> None:
    """K = n, one speed, clients of one size: round after round the weights of FedAvg."""
    task = tiny.task(SIZES)
    plain = tiny.federation("fedavg", task)
    buffered = tiny.federation("fedavg", task, schedule="fedbuff:k=4", cohort=4)
    plain.step()
    buffered.step()
    assert buffered.round == 1 and buffered.now == pytest.approx(plain.now, rel=1e-12)
    # The batches are drawn with other keys: equality is checked on the same uploads.
    keyed(buffered, plain)


def keyed(buffered: Any, plain: Any) -> None:
    """Three more mixes, each equal to the uniform mean of the changes that went in."""
    for _ in range(3):
        before = {name: x.clone() for name, x in buffered.state["shared"].items()}
        seen: list[Any] = []
        inner = buffered.path.reduce

        def reduce(
            method: Method, state: Any, updates: Any, ctx: Any, weights: Any = None,
            inner: Any = inner, seen: list[Any] = seen,
        ) -> Any:  # fmt: skip
            seen.append((updates, weights))
            return inner(method, state, updates, ctx, weights)

        buffered.path.reduce = reduce
        report = buffered.step()
        buffered.path.reduce = inner
        ((updates, weights),) = seen
        assert sorted(updates.clients) == [0, 1, 2, 3] and report.round == buffered.round
        assert {m.version for m in updates.meta} == {buffered.round - 1}
        torch.testing.assert_close(weights, torch.full((4,), 0.25, dtype=torch.float64))
        for name, x in buffered.state["shared"].items():
            mean = before[name] + updates.delta[name].mean(0)
            torch.testing.assert_close(x, mean, rtol=1e-12, atol=1e-14)


def test_fedasync_mixes_the_model_that_arrives() -> None:
    """w <- (1 - a) w + a w_i: with alpha 1 the model is that of the newest client."""
    task = tiny.task(SIZES)
    fed = tiny.federation("fedavg", task, schedule="fedasync:alpha=1.0,rule=constant", **UNEQUAL)
    for _ in range(7):
        landed = dict(fed.flights) if fed.round else {}
        report = fed.step()
        (client,) = report.clients
        if client in landed and landed[client].landed is not None:
            flight = landed[client]
            for name, x in fed.state["shared"].items():
                theirs = flight.down[name] + flight.landed.updates.delta[name][0]
                torch.testing.assert_close(x, theirs, rtol=1e-12, atol=1e-14)


def test_weights_and_order_of_fedasync() -> None:
    """Seconds 2 and 5: mixes at 2, 4, 5, 6, 8, 10 with ages counted by hand; ties go by order."""
    trace = play(FedAsync(2, 2, 0, alpha=0.5, a=1.0), lambda c, *_: (2.0, 5.0)[c], 10.5)
    assert [(m.time, m.clients[0], m.staleness[0]) for m in trace] == [
        (2.0, 0, 0), (4.0, 0, 0), (5.0, 1, 2), (6.0, 0, 1), (8.0, 0, 0), (10.0, 1, 2), (10.0, 0, 1),
    ]  # fmt: skip
    assert [m.weights[0] for m in trace] == pytest.approx(
        [0.5 / (1 + m.staleness[0]) for m in trace]
    )


def test_fedbuff_keeps_its_concurrency() -> None:
    """4 of 10 work at any time, three uploads make a mix, and idle clients get their turn."""
    schedule = FedBuff(10, 4, 1, k=3)
    trace = play(schedule, lambda c, _, visit: 1.0 + 0.1 * c + 0.01 * visit, 40.0)
    assert all(len(m.clients) == 3 for m in trace) and len(schedule.working) == 4
    assert {c for m in trace for c in m.clients} == set(range(10))


@pytest.mark.parametrize("schedule", ["fedasync", "fedbuff:k=3", "fedcompass:qmin=2,qmax=6"])
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_pending_visits_together_are_visits_alone(schedule: str, method: str) -> None:
    """Vectorised in batches of whatever is pending, or one after the other: the same numbers,
    rows and times; and batches there are."""
    task = tiny.task((5, 16, 9, 12), dropout=0.3)
    one = tiny.federation(method, task, schedule=schedule, **UNEQUAL)
    many = tiny.federation(method, task, schedule=schedule, executor="vectorised", **UNEQUAL)
    sizes: list[int] = []
    run = many.executor.run

    def counted(method: Any, ground: Any, cohort: Any) -> Any:
        sizes.append(len(cohort))
        return run(method, ground, cohort)

    many.executor.run = counted  # type: ignore[method-assign]
    for _ in range(12):
        a, b = one.step(), many.step()
        assert (a.clients, a.now) == (b.clients, b.now)
    assert tiny.apart(tiny.state(one), tiny.state(many)) <= 1e-9
    assert list(one.ledger.rows()) == list(many.ledger.rows())
    assert max(sizes) == 4 and np.mean(sizes) > 1.5


@pytest.mark.parametrize(
    "schedule", ["fedasync", "fedbuff:k=3,rule=hinge", "fedcompass:qmin=2,qmax=6"]
)
def test_resumed_between_any_two_mixes(schedule: str, tmp_path: Any) -> None:
    """A federation rebuilt from a checkpoint goes on with the same bits, times and rows."""
    task = tiny.task((5, 16, 9, 12))
    keys = {**UNEQUAL, "schedule": schedule, "executor": "vectorised", "jitter": 0.2}
    keys |= {"dropout": 0.2, "codec": "int8"}
    whole = tiny.federation("scaffold", task, **keys)
    reports = [whole.step() for _ in range(9)]
    first = tiny.built("scaffold", task, store=tmp_path / "a.bin", **keys).federation
    for _ in range(4):
        first.step()
    checkpoint.write(tmp_path, first, {})
    rows = len(first.ledger)
    second = tiny.built("scaffold", task, store=tmp_path / "a.bin", **keys).federation
    checkpoint.restore(second, *checkpoint.read(tmp_path))
    for report in reports[4:]:
        again = second.step()
        assert (again.clients, again.now, again.loss) == (report.clients, report.now, report.loss)
    for name, x in tiny.state(whole).items():
        assert torch.equal(x, tiny.state(second)[name])
    for name, x in tiny.kept(whole).items():
        assert torch.equal(x, tiny.kept(second)[name])
    told = [json.dumps({**row, "id": 0}) for row in list(whole.ledger.rows())[rows:]]
    assert [json.dumps({**row, "id": 0}) for row in second.ledger.rows()] == told


def test_times_follow_devices_and_links() -> None:
    """One client: every mix takes download, work and upload, each from its own model."""
    task = tiny.task((16,))
    fed = tiny.federation("fedavg", task, schedule="fedasync", speeds="3", link="lte", cohort=1)
    fed.step()
    rows = list(fed.ledger.rows())
    assert [row["kind"] for row in rows] == ["model", "train", "update"]
    work = rows[1]["flops"] / 1e10 * 3
    assert rows[1]["seconds"] == pytest.approx(work, rel=1e-12)
    sent = rows[0]["bytes"] * 8 / 20e6 + rows[2]["bytes"] * 8 / 5e6 + 2 * 3e-2
    assert fed.now == pytest.approx(work + sent, rel=1e-9)


def test_lost_clients_are_replaced() -> None:
    """Vanished clients and lost uploads leave no trace in the model, and training goes on."""
    task = tiny.task(SIZES)
    keys: dict[str, Any] = {**UNEQUAL, "dropout": 0.4, "link": "wifi,loss=0.6,attempts=2"}
    for schedule in ("fedasync", "fedbuff:k=2", "fedcompass:qmin=2,qmax=6"):
        fed = tiny.federation("fedavg", task, schedule=schedule, **keys)
        for _ in range(8):
            fed.step()
        assert any(row["note"] == "lost" for row in fed.ledger.rows())
        assert all(torch.isfinite(x).all() for x in tiny.state(fed).values())


def test_diverged_client_is_dropped() -> None:
    task = tiny.task(SIZES)
    for codec in ("dense", "int8"):
        keys = {**UNEQUAL, "guard": "drop", "codec": codec}
        fed = tiny.federation("fedavg", task, schedule="fedbuff:k=2", **keys)
        run = fed.executor.run

        def diverged(method: Any, ground: Any, cohort: Any, run: Any = run) -> Any:
            done = run(method, ground, cohort)
            for row in np.flatnonzero(cohort.clients == 1):
                for x in done.updates.delta.values():
                    x[row] = float("nan")
            return done

        fed.executor.run = diverged  # type: ignore[method-assign]
        clients = {c for _ in range(6) for c in fed.step().clients}
        assert clients == {0, 2, 3}
        assert all(torch.isfinite(x).all() for x in tiny.state(fed).values())


def test_what_cannot_be_asynchronous_is_refused() -> None:
    task = tiny.task(SIZES)
    with pytest.raises(InputError, match="async schedule: with method that changes the backbone"):
        tiny.federation("fedmomentum", task, schedule="fedasync")
    with pytest.raises(InputError, match="central noise"):
        keys = {"clip": 1.0, "privacy": "central", "noise": 1.0, "public": ("examples",)}
        tiny.federation("fedavg", task, schedule="fedasync", **keys)
    with pytest.raises(InputError, match=r"deadline: 3\.0 given"):
        tiny.federation("fedavg", task, schedule="fedasync", deadline=3.0)
    with pytest.raises(InputError, match="nearest: fedbuff"):
        tiny.federation("fedavg", task, schedule="fedbufff")


def test_nobody_left_is_one_line() -> None:
    task = tiny.task(SIZES)
    fed = tiny.federation("fedavg", task, schedule="fedasync", battery=1e-12)
    assert isinstance(fed, Asynchronous)
    with pytest.raises(InputError, match="schedule: nobody left to train"):
        for _ in range(9):
            fed.step()
    assert replace(fed.fleet, battery=None).opens(0.0, 1) == 0.0
