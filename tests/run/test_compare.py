"""A comparison: fair by construction, resumable, and its numbers by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import InputError
from isthmus.report import comparison
from isthmus.run import compare as module
from isthmus.run.compare import Grid, compare, entry
from isthmus.run.config import Config

TINY: dict[str, Any] = {"model": "tiny", "clients": 4, "rounds": 3, "executor": "sequential"}


def fake(job: Any) -> dict[str, Any]:
    """A run whose scores follow from its keys: best at lr 0.3 for fedavg, 0.03 for fedprox."""
    best = 0.3 if job["method"] == "fedavg" else 0.03
    end = 0.9 if job["method"] == "fedavg" else 0.8
    end -= 0.1 * (job["lr"] != best) - 0.02 * job["seed"] + (0.3 if job["split"] == "val" else 0)
    if job["lr"] == 0.1 and job["method"] == "fedprox":
        return {"curve": [], "clients": [], "bytes": 0, "seconds": 0.0, "joules": 0.0}
    curve = [[r, 100 * r, 2.0 * r, end * (r + 1) / 4] for r in range(4)]
    return {"curve": curve, "clients": [end - 0.1, end, end + 0.1], "bytes": 300, "seconds": 6.0,
            "joules": 5.0}  # fmt: skip


def test_numbers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is chosen on validation, the score is the last round's on test, the target is what
    the first method ends with, and a diverged rate is never chosen."""
    monkeypatch.setattr(module, "play", fake)
    found = compare(["fedavg", "fedprox"], seeds=3, jobs=1, rates=(0.03, 0.1, 0.3), **TINY)
    a, b = found.lines
    assert (a.lr, b.lr) == (0.3, 0.03)
    assert a.score == pytest.approx(0.92) and b.score == pytest.approx(0.82)
    assert a.seeds == pytest.approx(0.02) and a.worst == pytest.approx(0.82)
    assert a.clients == pytest.approx((0.02 / 3) ** 0.5)
    assert found.target == pytest.approx(0.62)
    assert (a.rounds, a.bytes, a.seconds) == (3, 300, 6.0) and b.rounds is None
    assert b.rates[0.1] != b.rates[0.1]  # NaN
    assert found.notes[-2:] == (
        "The best rate is the largest that was tried: fedavg.",
        "The best rate is the smallest that was tried: fedprox.",
    )


def test_words_of_a_command_line_are_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "play", fake)
    words = {"holdout": "0.25", "partition": "iid"}
    found = compare(["fedavg"], seeds=1, jobs=1, rates=(0.3,), **{**TINY, **words})
    assert found.notes[0].startswith("Scored on 25% of each client's own items, just after mixing")


def test_the_target_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "play", fake)
    found = compare(["fedprox", "fedavg"], seeds=1, jobs=1, rates=(0.03, 0.3), target=0.3, **TINY)
    assert [line.rounds for line in found.lines] == [2, 1]
    assert "the target is what" not in found.notes[1]


def test_test_items_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs on test items score before and after, with one learning rate each; all that choose see
    validation items only."""
    jobs: list[Any] = []
    monkeypatch.setattr(module, "play", lambda job: jobs.append(job) or fake(job))
    compare(["fedavg", "fedprox"], seeds=2, jobs=1, rates=(0.03, 0.3), **TINY)
    test = [job for job in jobs if job["split"] == "test"]
    assert len(test) == 4 and all(job["evaluate"] == 0 for job in test)
    assert {(job["method"], job["lr"]) for job in test} == {("fedavg", 0.3), ("fedprox", 0.03)}
    assert len(jobs) == 2 * 2 + 4 + 2  # search, test, validation of the second seed


def test_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut in the middle, only the missing runs are played; a half-written file is played again."""
    jobs: list[Any] = []

    def cut(job: Any) -> Any:
        if len(jobs) == 3:
            raise KeyboardInterrupt
        jobs.append(job)
        return fake(job)

    keys: dict[str, Any] = {**TINY, "jobs": 1, "rates": (0.03, 0.3), "seeds": 2, "out": tmp_path}
    monkeypatch.setattr(module, "play", cut)
    with pytest.raises(KeyboardInterrupt):
        compare(["fedavg", "fedprox"], **keys)
    next(iter(sorted(tmp_path.glob("*.json")))).write_text('{"curve": [[')
    again: list[Any] = []
    monkeypatch.setattr(module, "play", lambda job: again.append(job) or fake(job))
    whole = compare(["fedavg", "fedprox"], **keys)
    assert len(again) == 10 - 3 + 1
    none: list[Any] = []
    monkeypatch.setattr(module, "play", lambda job: none.append(job) or fake(job))
    assert compare(["fedavg", "fedprox"], **keys) == whole and not none


def test_personal_methods_meet_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "play", fake)
    titles = [x.title for x in compare(["local-only"], seeds=1, jobs=1, **TINY).lines]
    assert titles == ["local-only", "fedavg-ft"]
    titles = [x.title for x in compare(["fedavg"], seeds=1, jobs=1, **TINY).lines]
    assert titles == ["fedavg"]


def real(jobs: int, out: Path | None = None) -> tuple[list[str], module.Comparison]:
    keys: dict[str, Any] = {**TINY, "rounds": 2, "seeds": 1, "rates": (0.1,)}
    methods = ["fedavg", "fedavg@fedbuff:k=2"]
    return methods, compare(methods, jobs=jobs, out=out, **keys)


@pytest.mark.slow
def test_side_by_side_is_one_after_the_other() -> None:
    assert real(2) == real(1)


def test_a_real_one(tmp_path: Path) -> None:
    """Real runs, as page and as CSV too."""
    methods, found = real(1, tmp_path / "runs")
    page = comparison.write_page(found, tmp_path / "c.html", "Methods").read_text()
    assert "fedavg@fedbuff:k=2" in page and "after the last round, never the best" in page
    rows = list(csv.DictReader(comparison.write_csv(found, tmp_path / "c.csv").open()))
    assert [row["title"] for row in rows] == methods
    assert float(rows[0]["score"]) == found.lines[0].score
    job = json.loads(next(iter(sorted((tmp_path / "runs").glob("fedavg-test*")))).read_text())[
        "job"
    ]
    assert Config.make(job).split == "test"


def test_bad_input_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grid, "play", None)
    with pytest.raises(InputError, match="nearest: fedprox"):
        compare(["fedavg", "fedproxx"], **TINY)
    with pytest.raises(InputError, match=r"settings\.muu"):
        compare(["fedprox:muu=0.1"], **TINY)
    with pytest.raises(InputError, match="seeds: 0 given"):
        compare(["fedavg"], seeds=0, **TINY)
    assert entry("a/b.py:Mine").keys == {"method": "a/b.py:Mine"}
