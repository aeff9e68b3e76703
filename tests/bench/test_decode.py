"""`isthmus bench decode`: every figure has its place and its unit, and none contradicts another."""

from __future__ import annotations

import math

import pytest

from isthmus.bench import decode
from isthmus.bench.figure import Figure

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> dict[str, Figure]:
    figures = decode.figures(texts=1, new=24, turns=2, sessions=2)
    assert len({figure.name for figure in figures}) == len(figures)
    return {figure.name: figure for figure in figures}


def test_every_figure_is_a_finite_number_with_a_unit(found: dict[str, Figure]) -> None:
    for figure in found.values():
        assert figure.unit and (math.isfinite(figure.value) or figure.note == "at no rate")
    goals = [figure for figure in found.values() if figure.goal]
    assert len(goals) == 11 and all(figure.holds is not None for figure in goals)


def test_ours_and_hugging_faces_greedy_answers_are_equal(found: dict[str, Figure]) -> None:
    for attention in ("eager", "sdpa"):
        same = found[f"greedy answers equal to generate's, {attention} attention"]
        assert same.value == 1 and same.holds


def test_slower_than_cloud_only_is_said_exactly_where_it_is(found: dict[str, Figure]) -> None:
    marked = {True: 0, False: 0}
    for title in ("the embedded models", "as if of 68 M and 7 B parameters"):
        for rate in decode.RATES:
            at = f"at {rate:g} Mbit/s, {title}"
            base = found[f"cloud-only {at}"].value
            for method in ("full-row", "tk-slt", "dssd"):
                figure = found[f"{method} {at}"]
                assert (figure.note == decode.SLOWER) == (figure.value < base)
                marked[figure.note == decode.SLOWER] += 1
    assert all(marked.values())


def test_full_rows_go_up_where_dssd_sends_scalars(found: dict[str, Figure]) -> None:
    up, down = (
        {name: found[f"{name}: {way}"].value for name in decode.METHODS} for way in ("up", "down")
    )
    assert up["full-row"] > 10 * up["tk-slt"] > 10 * up["dssd"] > 0 == up["device-only"]
    assert down["dssd"] > 10 * down["full-row"] and down["cloud-only"] > 0
    for name in ("full-row", "tk-slt", "dssd"):
        assert found[f"{name}: up, on paper"].value < up[name]
