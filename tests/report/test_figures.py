from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from isthmus.errors import InputError
from isthmus.report import account, figures, read_all, theme
from isthmus.report.marks import spread
from isthmus.report.serving import ORIGINS


def _data(chart: Any) -> list[list[dict[str, Any]]]:
    spec = chart.to_dict()
    layers = [spec, *spec["layer"]]
    data = [layer["data"] for layer in layers if "data" in layer]
    return [d["values"] if "values" in d else spec["datasets"][d["name"]] for d in data]


def test_stacked_bytes_are_all_the_bytes(three: list[Path]) -> None:
    runs = read_all(three)
    chart = figures.bytes_by_kind(runs)
    bars = next(rows for rows in _data(chart) if "part" in rows[0])
    for run in runs:
        total = account.totals(run)
        drawn = {b["lane"]: b["value"] for b in bars if b["run"] == run.title}
        expected = {"up": total.bytes_up, "down": total.bytes_down}
        assert drawn == {lane: count for lane, count in expected.items() if count}
    assert {(b["lane"], b["part"]) for b in bars} == {("up", "update"), ("down", "model")}


def test_time_and_joules_are_all_of_them(three: list[Path]) -> None:
    runs = read_all(three)
    for chart, column in ((figures.time_split(runs), "seconds"), (figures.joules(runs), "joules")):
        bars = next(rows for rows in _data(chart) if "part" in rows[0])
        shares = [
            sum(b["value"] for b in bars if b["run"] == run.title) / float(run.ledger[column].sum())
            for run in runs
        ]
        assert shares == pytest.approx([shares[0]] * 3)
        assert shares[0] == pytest.approx(1 / 60 if column == "seconds" else 1)


def test_quality_against_bytes_has_only_bytes(three: list[Path]) -> None:
    runs = read_all(three)
    quality = account.qualities(runs)[0]
    flat, *rest = _data(figures.quality_bytes(runs, quality))
    assert [row["run"] for row in flat] == ["Local only"]
    points = next(rows for rows in rest if "said" in rows[0])
    assert {p["run"] for p in points} == {"FedMomentum", "FedIT"}
    ends = {p["run"]: p["x"] for p in points}
    for run in runs[:2]:
        assert ends[run.title] == account.totals(run).bytes_up + account.totals(run).bytes_down


def test_a_run_keeps_its_colour(three: list[Path]) -> None:
    runs = read_all(three)

    def colour_of(chart: Any, title: str) -> str:
        scales: list[dict[str, Any]] = []

        def walk(node: Any) -> None:
            if isinstance(node, dict):
                if node.get("field") == "run" and "range" in (node.get("scale") or {}):
                    scales.append(node["scale"])
                for child in node.values():
                    walk(child)
            elif isinstance(node, list):
                for child in node:
                    walk(child)

        walk(chart.to_dict())
        found = {dict(zip(s["domain"], s["range"], strict=True)).get(title) for s in scales} - {
            None
        }
        assert len(found) == 1
        return str(found.pop())

    quality = account.qualities(runs)[0]
    charts = [figures.over_rounds(runs, quality), figures.before_after(runs, quality)]
    charts.append(figures.quality_bytes(runs, quality))
    for i, run in enumerate(runs):
        assert {colour_of(chart, run.title) for chart in charts} == {f"var(--run-{i + 1})"}


def test_the_worst_devices_are_drawn_and_ringed_among_many(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    rng = np.random.default_rng(3)
    bad, good = rng.permutation(300) / 10.0 + 20, rng.permutation(300) / 100.0 + 5
    folders = [write_run(tmp_path / "bad", "fedit"), write_run(tmp_path / "good", "fedmomentum")]
    for folder, after in zip(folders, (bad, good), strict=True):
        rows = [
            {
                "round": r,
                "t": r,
                "scope": f"client/{i}",
                "split": "test",
                "perplexity": value + 9 - 9 * r,
            }
            for r in (0, 1)
            for i, value in enumerate(after.tolist())
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = read_all(folders)
    chart = figures.before_after(runs, account.qualities(runs)[0])
    drawn = next(rows for rows in _data(chart) if "device" in rows[0])
    kept = {row["device"] for row in drawn}
    assert len(drawn) == 2 * len(kept) and 5 <= len(kept) <= 40
    ringed = {row["run"]: row["device"] for row in drawn if row["worst"]}
    outlier = f"client {int(good.argmax())}"
    assert ringed == {"fedit": f"client {int(bad.argmax())}", "fedmomentum": outlier}
    worst = [f"client {i}" for i in np.argsort(-bad)]
    assert outlier not in worst[: len(kept)]
    assert kept == {outlier, *worst[: len(kept) - 1]}


def test_epsilon_is_the_worst_party_of_each_round(three: list[Path]) -> None:
    events = [
        {"round": r, "party": p, "epsilon": e}
        for r, p, e in ((1, "a", 0.5), (1, "b", 0.75), (2, "a", 1.25))
    ]
    (three[0] / "privacy.json").write_text(json.dumps({"delta": 1e-5, "epsilon": events}))
    chart = figures.epsilon(read_all(three))
    points = next(rows for rows in _data(chart) if "said" in rows[0])
    assert [(p["run"], p["x"], p["y"]) for p in points] == [
        ("FedMomentum", 1, 0.75),
        ("FedMomentum", 2, 1.25),
    ]
    (three[0] / "privacy.json").write_text('{"epsilon": 3}')
    with pytest.raises(InputError, match=r"privacy\.json"):
        figures.epsilon(read_all(three))


def test_values_that_are_not_finite_are_left_out(three: list[Path]) -> None:
    with (three[0] / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6, "t": 99, "scope": "global", "split": "test", "perplexity": NaN}\n')
        file.write(
            '{"round": 6, "t": 99, "scope": "client/2", "split": "test", "perplexity": Infinity}\n'
        )
    for chart in figures.every(read_all(three)).values():
        json.dumps(chart.to_dict(), allow_nan=False)


def test_every_chart_compiles_and_says_what_it_shows(three: list[Path]) -> None:
    charts = figures.every(read_all(three))
    quality = {"perplexity-over-rounds", "loss-over-rounds", "quality-bytes", "devices"}
    assert set(charts) == quality | {"bytes", "time", "joules"}
    for chart in charts.values():
        spec = chart.to_dict()
        assert "FedMomentum" in spec["description"] and spec["title"]["subtitle"]
        assert vl_convert.vegalite_to_vega(spec)["marks"]


def test_nothing_to_draw(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: fedavg\n")
    assert figures.every(read_all([tmp_path])) == {}


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.01, 2))
def test_spread_is_the_least_move(values: list[float], gap: float) -> None:
    moved = spread(values, gap)
    order = sorted(range(len(values)), key=lambda i: values[i])
    target = np.array([values[i] - place * gap for place, i in enumerate(order)])
    expected = isotonic_regression(target).x + gap * np.arange(len(values))
    assert [moved[i] for i in order] == pytest.approx(expected.tolist(), abs=1e-9)
    inside = spread(values, gap, -6.0, -6.0 + gap * len(values))
    assert min(inside) >= -6.0 - 1e-9 and max(inside) <= -6.0 + gap * len(values) + 1e-9
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(inside[i] for i in order))


# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", IEEE TVCG 2009: full protanopia, deuteranopia, tritanopia, in linear sRGB.
SEEN_BY = {
    "all cones": np.eye(3),
    "protan": np.array([
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]),
    "deutan": np.array([
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]),
    "tritan": np.array([
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ]),
}  # fmt: skip


def _linear(colour: str) -> np.ndarray:
    part = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ linear.clip(0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _contrast(a: str, b: str) -> float:
    weights = np.array([0.2126, 0.7152, 0.0722])
    low, high = sorted(float(weights @ _linear(c)) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_keep_apart_for_every_eye_and_stand_out(scheme: theme.Scheme) -> None:
    paper = theme.resolve("var(--paper)", scheme)
    families = [theme.colours("run", 6), theme.colours("part", 6), list(map(theme.token, ORIGINS))]
    for names in families:
        shown = theme.resolve(names, scheme)
        assert len(set(shown)) == len(names) and min(_contrast(c, paper) for c in shown) >= 3
        for seen in SEEN_BY.values():
            labs = [_lab(seen @ _linear(colour)) for colour in shown]
            assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)) > 13
    for text in ("ink", "quiet", "link"):
        assert _contrast(theme.resolve(f"var(--{text})", scheme), paper) >= 4.5
