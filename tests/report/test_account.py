from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.report import RunData, account, closing_table, read_all, units
from isthmus.report.account import Point, Quality


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def test_closing_table_is_the_brute_force_sum_of_the_files(three: list[Path]) -> None:
    table = closing_table(read_all(three))
    assert [row.run for row in table] == ["FedMomentum", "FedIT", "Local only"]
    for folder, row in zip(three, table, strict=True):
        ledger = [r for r in _rows(folder, "ledger") if r["what"] == "crossing"]
        assert row.bytes_up == sum(r["bytes"] for r in ledger if r["to"] == "server")
        assert row.bytes_down == sum(r["bytes"] for r in ledger if r["from"] == "server")
        assert row.values_up == sum(r["values"] for r in ledger if r["to"] == "server")
        everything = _rows(folder, "ledger")
        assert row.joules == pytest.approx(math.fsum(r["joules"] for r in everything), rel=1e-12)
        metrics = _rows(folder, "metrics")
        assert row.seconds == max(r["t"] for r in everything + metrics)
        final = [r for r in metrics if r["round"] == 5 and r["scope"].startswith("client/")]
        worst = max(final, key=lambda r: r["perplexity"])
        assert row.worst == worst["perplexity"]
        assert row.worst_device == account.device_name(worst["scope"].removesuffix("/personal"))
        assert row.joules_source == "modelled"
    whole = [r for r in _rows(three[0], "metrics") if r["scope"] == "global"]
    assert (table[0].before, table[0].after) == (whole[0]["perplexity"], whole[-1]["perplexity"])
    assert table[2].bytes_up == table[2].bytes_down == 0


def test_without_a_global_model_the_devices_are_averaged(three: list[Path]) -> None:
    row = closing_table(read_all(three))[2]
    final = [r["perplexity"] for r in _rows(three[2], "metrics") if r["round"] == 5]
    assert row.scope == "mean of devices"
    assert row.after == pytest.approx(sum(final) / 8, rel=1e-12)
    assert row.after != pytest.approx(float(np.median(final)), rel=1e-3)


def test_devices_add_up_to_the_totals(three: list[Path]) -> None:
    run = read_all(three)[0]
    quality = account.qualities([run])[0]
    found = account.devices(run, quality)
    assert [device.name for device in found][-2:] == ["client 6", "anna"]
    total = account.totals(run)
    assert sum(d.bytes_up for d in found) == total.bytes_up
    assert sum(d.bytes_down for d in found) == total.bytes_down
    rows = _rows(three[0], "ledger")
    for device, party in zip(
        found, [f"client/{i}" for i in range(7)] + ["client/anna"], strict=True
    ):
        work = [r for r in rows if r["from"] == r["to"] == party]
        assert device.seconds == pytest.approx(math.fsum(r["seconds"] for r in work))
        mine = [r for r in rows if party in (r["from"], r["to"])]
        assert device.joules == pytest.approx(math.fsum(r["joules"] for r in mine))
        assert device.bytes_down == sum(r["bytes"] for r in mine if r["from"] == "server")
    server = sum(r["joules"] for r in rows if r["from"] == r["to"] == "server")
    assert sum(d.joules for d in found) + server == pytest.approx(total.joules)


def test_bytes_moved_grow_round_by_round(three: list[Path]) -> None:
    run = read_all(three)[1]
    rows = _rows(three[1], "ledger")
    points = account.curve(run, account.qualities([run])[0]).points
    crossings = [(r["round"], r["bytes"]) for r in rows if r["what"] == "crossing"]
    expected = [sum(count for r, count in crossings if r <= point.round) for point in points]
    assert account.moved(run, points) == expected and len(set(expected)) == 6


def _run(folder: Path, metrics: list[dict[str, Any]], ledger: list[dict[str, Any]]) -> RunData:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("method: fedavg\n")
    for name, rows in (("metrics", metrics), ("ledger", ledger)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return RunData.read(folder)


def test_entries_without_a_round_count_by_their_time(tmp_path: Path) -> None:
    crossing = {"what": "crossing", "from": "client/1", "to": "server"}
    ledger = [crossing | {"t": 1.0, "bytes": 5}, crossing | {"t": 4.0, "bytes": 11}]
    ledger += [crossing | {"t": 9.0, "bytes": 100, "round": 2}]
    run = _run(tmp_path / "run", [], ledger)
    points = [Point(r, t, 0.0) for r, t in ((1, 3.0), (1, 4.0), (2, 3.0))]
    assert account.moved(run, points) == [5, 16, 105]


def test_a_personal_model_is_the_one_that_counts(tmp_path: Path) -> None:
    def line(r: int, scope: str, accuracy: float) -> dict[str, Any]:
        return {"round": r, "t": r, "scope": scope, "split": "test", "accuracy": accuracy}

    run = _run(
        tmp_path / "run",
        [line(0, "client/1", 0.25), line(0, "client/2", 0.5), line(3, "client/1", 0.75),
         line(3, "client/2", 0.625), line(3, "client/1/personal", 0.5), line(3, "global", 0.7),
         line(0, "global", 0.375)],
        [],
    )  # fmt: skip
    quality = account.qualities([run])[0]
    assert quality == Quality("accuracy", "test") and quality.better == "higher"
    found = account.devices(run, quality)
    assert [(d.before, d.after, d.personal) for d in found] == [
        (0.25, 0.5, True),
        (0.5, 0.625, False),
    ]
    row = closing_table([run])[0]
    assert (row.worst_device, row.worst, row.before, row.after) == ("client 1", 0.5, 0.375, 0.7)


def test_the_best_split_and_the_shared_metric_are_chosen(tmp_path: Path) -> None:
    def lines(**metrics: float) -> list[dict[str, Any]]:
        return [
            {"round": 1, "t": 1, "scope": "global", "split": s, **metrics} for s in ("train", "val")
        ]

    a = _run(tmp_path / "a", lines(loss=1.0, accuracy=0.5), [])
    b = _run(tmp_path / "b", lines(loss=2.0, perplexity=9.0, accuracy=0.5), [])
    chosen = account.qualities([a, b])
    assert chosen == [Quality(m, "val") for m in ("accuracy", "loss", "perplexity")]


def test_one_score_before_training_is_no_result(tmp_path: Path) -> None:
    start = [{"round": 0, "t": 0, "scope": "global", "split": "test", "loss": 2.5}]
    row = closing_table([_run(tmp_path / "run", start, [])])[0]
    assert (row.before, row.after, row.worst) == (2.5, None, None)


def test_peers_and_measured_joules(tmp_path: Path) -> None:
    ledger = [
        {"what": "crossing", "from": "client/1", "to": "client/2", "bytes": 7, "joules": 2.0},
        {"what": "work", "from": "client/1", "to": "client/1", "joules": 3.0, "source": "rapl"},
    ]
    row = closing_table([_run(tmp_path / "run", [], ledger)])[0]
    assert (row.bytes_up, row.bytes_down, row.bytes_across) == (0, 0, 7)
    assert (row.joules, row.joules_source) == (5.0, "modelled, rapl")


def test_what_is_not_finite_is_worst() -> None:
    assert Quality("loss", "test").worst([1.0, float("nan"), 9.0]) == 1
    assert Quality("accuracy", "test").worst([0.5, 0.2, 0.9]) == 1


@given(st.integers(0, 10**15))
def test_bytes_are_said_within_half_a_percent(count: int) -> None:
    value, unit = units.bytes_text(count).split()
    power = ["B", "kB", "MB", "GB", "TB", "PB"].index(unit)
    assert float(value) * 1000**power == pytest.approx(count, rel=5.1e-3)
    assert float(value) < 1000
