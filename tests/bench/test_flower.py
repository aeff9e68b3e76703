"""The bench of the in-process grid: an app that gives equal bits however it is run."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from isthmus.bench import flower

pytest.importorskip("flwr")


def test_figures_compare_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(flower, "ROUNDS", 4)
    calls: list[flower.Trace] = []

    def other(rounds: int) -> flower.Trace:
        calls.append(flower.in_process(rounds))
        return calls[-1]

    *_, faster, same = flower.figures(other)
    assert same.holds and same.value == 1.0 and len(calls[0].ends) == 4
    assert faster.goal == "at least 10 x"
    assert np.abs(calls[0].weights[0]).max() > 0.01

    def wrong(rounds: int) -> flower.Trace:
        trace = flower.in_process(rounds)
        trace.weights[0][3, 4] = np.nextafter(trace.weights[0][3, 4], 9.0)
        return trace

    assert not flower.figures(wrong)[-1].holds


def test_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_ray(name: str) -> Any:
        return None if name == "ray" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_ray)
    (figure,) = flower.figures()
    assert figure.holds is None and "ray is not installed (extra ray)" in figure.name


@pytest.mark.slow
def test_bits_are_those_of_flowers_simulation() -> None:
    pytest.importorskip("ray")
    own, ray = flower.in_process(3), flower.on_ray(3)
    assert all(map(np.array_equal, own.weights, ray.weights))
