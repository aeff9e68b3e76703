"""`isthmus bench`: figures as lines, as tables, and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus import bench, cli
from isthmus.cli import bench as verb

TABLE = """
import math
from isthmus.bench.figure import Figure, at_most

def figures():
    return [
        at_most("plain", 3.25, 2.0, "x"),
        Figure("a at 1", 12.5, "tokens/s", note="slow here", cell=("Speeds [all]", "a", "at 1")),
        Figure("a at 2", 4321.0, "tokens/s", "at least 9", True, "", ("Speeds [all]", "a", "at 2")),
        Figure("b at 2", math.inf, "tokens/s", note="never", cell=("Speeds [all]", "b", "at 2")),
        Figure("a up", 0.5, "B", cell=("Bytes", "a", "up")),
    ]
"""


@pytest.fixture(autouse=True)
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One table, `made`, beside a module that has no figures."""
    (tmp_path / "made.py").write_text(TABLE)
    (tmp_path / "other.py").write_text("def nothing():\n    pass\n")
    monkeypatch.setattr(bench, "__path__", [str(tmp_path), *bench.__path__])
    yield
    sys.modules.pop("isthmus.bench.made", None)


def test_only_modules_with_figures_are_tables() -> None:
    assert verb.tables() == ["made"]


def test_figures_with_a_cell_are_tables_and_goals_are_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["bench", "made"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line.split() for line in lines if not set(line.strip()) <= {"─"}] == [
        ["Speeds", "[all]"],
        ["at", "1", "at", "2"],
        ["tokens/s", "tokens/s"],
        ["a", "12.5", "*", "4321"],
        ["b", "–", "+"],
        ["*", "slow", "here", "+", "never"],
        ["Bytes"],
        ["up"],
        ["B"],
        ["a", "0.500"],
        ["plain:", "3.25", "x", "(at", "most", "2", "x:", "MISSED)"],
        ["a", "at", "2:", "4.32e+03", "tokens/s", "(at", "least", "9:", "holds)"],
    ]


def test_json_has_every_figure_and_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "made", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["plain", "a at 1", "a at 2", "b at 2", "a up"]
    assert rows[0] == {
        "name": "plain",
        "value": 3.25,
        "unit": "x",
        "goal": "at most 2 x",
        "holds": False,
        "note": "",
    }
    assert rows[1]["note"] == "slow here" and rows[3]["value"] is None


def test_an_unknown_table_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "mode"]) == 2
    assert "made" in capsys.readouterr().err
