"""`isthmus claim`: verdicts, exit status, JSON, and one line for names that lead nowhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus import claims, cli
from isthmus.claims import claim
from isthmus.cli import claim as verb

CLAIM = """
from isthmus.claims.claim import Check

def claim(progress):
    progress("half way")
    return [
        Check("order", "a < b", "a 1.0, b 2.0", True),
        Check("size", "2 times", "{here}", {holds}),
    ]
"""


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Claims of two systems that are registered as verified: one that holds, one that does not."""
    (tmp_path / "fedprox.py").write_text(CLAIM.format(here="2.1 times", holds=True))
    (tmp_path / "scaffold.py").write_text(CLAIM.format(here="[0.9] times", holds=False))
    monkeypatch.setattr(claims, "__path__", [str(tmp_path)])
    yield tmp_path
    for name in ("fedprox", "scaffold"):
        sys.modules.pop(f"isthmus.claims.{name}", None)


def test_a_claim_that_holds(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claim", "FedProx"]) == 0
    said = capsys.readouterr()
    assert said.err == "FedProx: half way\n"
    assert said.out.splitlines() == [
        "holds  order | paper: a < b | here: a 1.0, b 2.0",
        "holds  size | paper: 2 times | here: 2.1 times",
        "fedprox: 2 of 2 checks hold; status verified",
    ]


def test_a_claim_that_does_not_hold(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claim", "scaffold"]) == 1
    *_, size, total = capsys.readouterr().out.splitlines()
    assert size == "FAILS  size | paper: 2 times | here: [0.9] times"
    contradiction = "status verified, but 1 of 2 checks does not hold"
    assert total == f"scaffold: 1 of 2 checks holds; CONTRADICTION: {contradiction}"


def test_json_of_one_and_of_all(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["claim", "fedprox", "--json", "-"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row == {
        "system": "fedprox",
        "status": "verified",
        "checks": [
            {"name": "order", "paper": "a < b", "here": "a 1.0, b 2.0", "holds": True},
            {"name": "size", "paper": "2 times", "here": "2.1 times", "holds": True},
        ],
    }
    file = tmp_path / "claims.json"
    assert cli.main(["claim", "--all", "--json", str(file)]) == 1
    rows = json.loads(file.read_text())
    assert [r["system"] for r in rows] == claim.names()
    assert {r["system"] for r in rows} == {"fedprox", "scaffold"}
    assert row in rows
    assert "fedprox: 2 of 2 checks hold" in capsys.readouterr().out


def test_the_table_of_a_terminal_shows_every_word(
    stubs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    verb._table(claim.run("scaffold"))
    said = capsys.readouterr().out
    for word in ("order", "a < b", "a 1.0, b 2.0", "[0.9] times", "fails", "CONTRADICTION"):
        assert word in said


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["fedproxx"], "nearest: fedprox\n"),
        (["ffa-lora"], "ffa-lora (verified, no claim yet) given"),
        (["dash"], "dash (planned, no claim yet) given"),
        ([], "nothing given"),
        (["fedprox", "--all"], "a name and --all given"),
    ],
)
def test_names_that_lead_nowhere(
    stubs: Path, options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["claim", *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and line in said.err
