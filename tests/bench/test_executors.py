"""The figures of the executors: ratios of rounds that really ran, and shares between 0 and 1."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from isthmus.bench import executors
from isthmus.federated.executors.sequential import Sequential
from isthmus.federated.executors.vectorised import Vectorised
from isthmus.federated.round import Federation


def test_each_method_has_a_ratio_and_all_together_a_median_and_a_least() -> None:
    found = executors.over_sequential(["fedavg", "local-only"], turns=1, ways=("eager",))
    ratios = {figure.cell[1]: figure.value for figure in found if figure.cell}
    assert set(ratios) == {"fedavg", "local-only"} and min(ratios.values()) > 0
    middle, least = found[-2:]
    assert middle.value == pytest.approx(sum(ratios.values()) / 2)
    assert least.value == min(ratios.values())
    assert (middle.goal, least.goal) == ("at least 5 x", "at least 2 x")


def test_the_ways_compute_the_same_round() -> None:
    feds = [executors.federation("fedavg", way) for way in ("sequential", "eager")]
    for fed in feds:
        fed.step()
    one, many = feds
    assert isinstance(one.executor, Sequential) and isinstance(many.executor, Vectorised)
    for name, x in one.state["shared"].items():
        torch.testing.assert_close(many.state["shared"][name], x, rtol=1e-4, atol=1e-6)
    assert len(one.ledger) == len(many.ledger) == 3 * executors.CLIENTS


def test_what_is_not_training_is_a_part_of_the_round() -> None:
    fed = executors.federation("fedavg", "eager")
    assert 0.0 < executors.outside(fed, 2) < 1.0
    assert 0.0 < executors.outside(fed, 2, recorded=True) < 1.0
    graphs, executor = fed.executor.graphs, fed.executor
    with executors.timed(executor, "run") as visits, executors.timed(graphs, "call") as inside:
        fed.step()
    assert len(visits) == len(inside) == 1  # one recorded visit of all clients
    assert 0.0 < inside[0] < visits[0]
    assert "run" not in vars(executor) and "call" not in vars(graphs)


def test_visits_are_counted_by_their_uploads() -> None:
    fed = executors.federation("fedavg", "eager", schedule="fedbuff:k=5", speeds="lognormal:0.5")
    executors.visits(fed, 10)()
    arrived = fed.ledger.total("rows", kind="update")
    assert 10 <= fed.uploads <= arrived and fed.uploads % 5 == 0


def test_a_crowd_plays_when_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(executors, "COHORT", 20)
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\ngo\n"))
    steps: list[int] = []
    step = Federation.step

    def watched(fed: Federation) -> object:
        steps.append(fed.round)
        return step(fed)

    monkeypatch.setattr(Federation, "step", watched)
    executors.crowd(100)
    (first, early), (_, late) = (
        map(float, line.split()) for line in capsys.readouterr().out.splitlines()
    )
    assert steps == list(range(2 * executors.ROUNDS))
    assert first > 0 and 0 < early <= late


@pytest.mark.slow
def test_two_crowds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "REGISTERED", (1_000, 2_000))
    monkeypatch.setattr(executors, "BLOCKS", 2)
    seconds, over, most, least, gained = executors.crowds()
    assert seconds.value > 0 and over.value > 0
    assert min(most.value, least.value) > 0.2  # each has torch and a thousand models in memory
    assert gained.value == 0 and gained.holds  # from round 10, which here is the last, to the last
