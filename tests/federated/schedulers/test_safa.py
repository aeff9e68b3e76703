"""SAFA: its trace and its cache by hand, FedAvg where all are picked, faults and resuming."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tests.federated import tiny
from tests.federated.schedulers.played import play

from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.asynchronous import Asynchronous
from isthmus.federated.schedule import Renew
from isthmus.federated.schedulers.safa import Safa
from isthmus.run import checkpoint
from isthmus.tree import Tree

SIZES = (5, 16, 9, 12)
SECONDS = (1.0, 2.0, 3.0, 10.0)
UNEQUAL: dict[str, Any] = {"speeds": "1,2.1,3.3,19", "link": "ideal", "batch": 0, "epochs": 2}


def test_a_trace_by_hand() -> None:
    """C n = 2, tau = 1, rounds of at most 4 seconds: all four kinds of clients."""
    schedule = Safa(4, SIZES, c=0.5, tau=1, limit=4.0)
    trace = play(schedule, lambda c, *_: SECONDS[c], 14.5)
    assert [(m.time, m.clients, m.staleness, m.reset, m.later) for m in trace] == [
        (2.0, (0, 1), (0, 0), (), ()),  # the quota ends the round; 2 and 3 go on
        (6.0, (2, 0), (1, 0), (), (1,)),  # 0 and 1 were picked last time: 0 fills up, 1 bypasses
        (10.0, (1, 0), (0, 0), (3,), (2,)),  # 3 was two versions behind: sent w(2), entry reset
        (14.0, (2, 0), (0, 0), (), (1,)),  # 3 has worked on w(2), one version behind: tolerable
    ]
    assert all(m.weights == tuple(n / 42 for n in SIZES) for m in trace)
    assert schedule.deprecated == [3] and schedule.working == {0: 4, 1: 4, 2: 4, 3: 4}


def test_without_a_limit_it_waits_for_the_quota_of_new_ones() -> None:
    trace = play(Safa(4, SIZES, c=0.5, tau=9), lambda c, *_: SECONDS[c], 12.5)
    assert [(m.time, m.clients, m.staleness, m.later) for m in trace] == [
        (2.0, (0, 1), (0, 0), ()),
        (10.0, (2, 3), (1, 1), (0, 1)),
        (12.0, (0, 1), (0, 0), ()),
    ]


def test_lost_clients_start_with_the_next_round() -> None:
    """The third visit is lost; then everybody's; a round whose time is over awaits an arrival."""
    trace = play(
        Safa(3, (1, 1, 1), c=1.0), lambda c, *_: (1.0, 2.0, 3.0)[c], 6.5, lambda visit: visit == 3
    )
    assert [(m.time, m.clients) for m in trace] == [(3.0, (0, 1)), (6.0, (2, 0, 1))]
    trace = play(Safa(2, (1, 1), c=1.0), lambda c, *_: 1.0 + c, 4.5, lambda visit: visit < 3)
    assert [(m.time, m.clients) for m in trace] == [(4.0, (0, 1))]
    trace = play(Safa(2, (1, 1), c=1.0, limit=2.0), lambda c, *_: 3.0 + c, 3.5)
    assert [(m.time, m.clients) for m in trace] == [(3.0, (0,))]


def test_of_all_clients_it_is_fedavg() -> None:
    """Full batches, so that nothing depends on keys: weighted by items, round after round."""
    task = tiny.task(SIZES)
    keys: dict[str, Any] = {"batch": 0, "epochs": 3}
    plain = tiny.federation("fedavg", task, **keys)
    ours = tiny.federation("fedavg", task, schedule="safa:c=1.0", **keys)
    for _ in range(4):
        plain.step()
        assert sorted(ours.step().clients) == [0, 1, 2, 3]
        assert tiny.apart(tiny.state(plain), tiny.state(ours)) < 1e-13
    assert ours.now == pytest.approx(plain.now, rel=1e-9)


def test_the_model_is_the_mean_of_the_cache() -> None:
    """Equations of the cache, kept by hand beside the engine, with resets and bypasses in it."""
    task = tiny.task(SIZES)
    fed = tiny.federation("fedavg", task, schedule="safa:c=0.25,tau=1", **UNEQUAL)
    assert isinstance(fed, Asynchronous)
    cache: list[Tree] = [fed.state["shared"]] * 4
    p = torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)
    act, seen = fed._act, []

    def watched(actions: Any) -> Any:
        for action in actions:
            if isinstance(action, Renew):
                now = fed.state["shared"]
                for client in action.reset:
                    cache[client] = now
                after: dict[int, Tree] = {}
                for number in (*action.picked, *action.later):
                    flight = fed.waiting[number]
                    assert flight.landed is not None
                    delta = flight.landed.updates.delta
                    model = {n: x + delta[n][0] for n, x in flight.down.items()}
                    if number in action.picked:
                        cache[flight.client] = model
                    else:
                        after[flight.client] = model
                seen.append((action, tree.weighted_mean(tree.stack(cache), p)))
                for client, model in after.items():
                    cache[client] = model
        return act(actions)

    fed._act = watched  # type: ignore[method-assign]
    for _ in range(12):
        fed.step()
        assert tiny.apart(fed.state["shared"], seen[-1][1]) < 1e-13
    assert any(a.reset for a, _ in seen) and any(a.later for a, _ in seen)


@pytest.mark.parametrize("after", [3, 7])
def test_resumed(after: int, tmp_path: Any) -> None:
    task = tiny.task(SIZES)
    keys = {**UNEQUAL, "schedule": "safa:c=0.25,tau=1", "executor": "vectorised", "dropout": 0.2}
    keys |= {"codec": "int8", "jitter": 0.2}
    whole = tiny.federation("fedprox", task, **keys)
    reports = [whole.step() for _ in range(10)]
    first = tiny.federation("fedprox", task, **keys)
    for _ in range(after):
        first.step()
    checkpoint.write(tmp_path, first, {})
    rows = len(first.ledger)
    second = tiny.federation("fedprox", task, **keys)
    checkpoint.restore(second, *checkpoint.read(tmp_path))
    for report in reports[after:]:
        again = second.step()
        assert (again.clients, again.now, again.loss) == (report.clients, report.now, report.loss)
    assert tree.equal(tiny.state(whole), tiny.state(second))
    told = [json.dumps({**row, "id": 0}) for row in list(whole.ledger.rows())[rows:]]
    assert [json.dumps({**row, "id": 0}) for row in second.ledger.rows()] == told


def test_pending_visits_together_are_visits_alone() -> None:
    task = tiny.task(SIZES, dropout=0.3)
    keys = {**UNEQUAL, "schedule": "safa:c=0.25,tau=1", "batch": 4}
    one, many = (tiny.federation("ditto", task, executor=e, **keys)
                 for e in ("sequential", "vectorised"))  # fmt: skip
    for _ in range(10):
        a, b = one.step(), many.step()
        assert (a.clients, a.now) == (b.clients, b.now)
    assert tiny.apart(tiny.state(one), tiny.state(many)) <= 1e-9
    assert list(one.ledger.rows()) == list(many.ledger.rows())


def test_bad_options_are_one_line() -> None:
    task = tiny.task(SIZES)
    for option, words in (("c=0", "c: 0"), ("tau=-1", "tau: -1"), ("limit=0", "limit: 0")):
        with pytest.raises(InputError, match=words):
            tiny.federation("fedavg", task, schedule=f"safa:{option}")
    with pytest.raises(InputError, match="schedule with a cache: with method with a server"):
        tiny.federation("scaffold", task, schedule="safa")
