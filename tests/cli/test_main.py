"""The command: help without weight, one line for bad input, honest exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from isthmus import __version__, catalogue, cli
from isthmus.errors import InputError, MissingExtra


def _verb(monkeypatch: pytest.MonkeyPatch, command: object) -> None:
    module = types.ModuleType("isthmus.cli.systems")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "isthmus.cli.systems", module)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == 0
    twice = capsys.readouterr().out
    assert twice == 2 * (cli.overview() + "\n")
    for rows in cli.verbs().values():
        assert all(f"  {verb}" in twice and line in twice for verb, line in rows.items())
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"isthmus {__version__}\n"


def test_only_verbs_that_exist_are_shown_and_every_module_has_its_line() -> None:
    folder = Path(cli.__file__).parent
    verbs = {verb for rows in cli.VERBS.values() for verb in rows}
    shown = {verb for rows in cli.verbs().values() for verb in rows}
    assert shown == {verb for verb in verbs if (folder / f"{verb.replace('-', '_')}.py").is_file()}
    text = {path: path.read_text() for path in folder.glob("[!_]*.py")}
    modules = {path.stem.replace("_", "-") for path in text if "def command(" in text[path]}
    assert modules == shown


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from isthmus.cli import main; main(['--help']);"
        "print({'torch', 'numpy', 'rich', 'tyro', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(catalogue.__file__).parent.parent)},
    )
    assert done.stdout.splitlines()[-1] == "set()"


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sytems"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.endswith("nearest: systems\n")


@pytest.mark.parametrize("options", [["--foo"], ["--family"], ["--al"], ["stray"]])
def test_bad_options_are_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["systems", *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("isthmus: ") and options[0] in said.err


def test_a_verbs_help_is_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["systems", "--help"]) == 0
    said = capsys.readouterr()
    assert "--family" in said.out and said.err == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("clients", 0, "1 or more"), "clients: 0 given, allowed: 1 or more"),
        (MissingExtra("x is not installed"), "x is not installed"),
    ],
)
def test_our_errors_are_one_line(
    error: Exception,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command() -> int:
        raise error

    _verb(monkeypatch, command)
    assert cli.main(["systems"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"isthmus: {line}\n"


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> int:
        raise ZeroDivisionError("a defect")

    _verb(monkeypatch, command)
    with pytest.raises(ZeroDivisionError):
        cli.main(["systems"])


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(number: int = 7) -> int:
        if number < 0:
            raise KeyboardInterrupt
        return number

    _verb(monkeypatch, command)
    assert cli.main(["systems"]) == 7
    assert cli.main(["systems", "--number", "3"]) == 3
    assert cli.main(["systems", "--number=-1"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_systems_plain_lines_name_every_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["systems"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [s.name for s in catalogue.systems()]
    assert [line.split()[2] for line in lines] == [s.status for s in catalogue.systems()]
    assert total.startswith(f"{len(lines)} systems: ")


def test_systems_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["systems", "--all", "--family", "trust", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    wanted = [s for s in catalogue.systems(all=True) if s.family == "trust"]
    assert [row["name"] for row in rows] == [s.name for s in wanted]
    assert {row["kind"] for row in rows} >= {"system", "baseline"}
    assert set(rows[0]) == {"name", "title", "family", "kind", "status", "paper"}
    file = tmp_path / "systems.json"
    assert cli.main(["systems", "--all", "--family", "trust", "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == rows


def test_systems_refuses_an_unknown_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["systems", "--family", "trsut"]) == 2
    assert capsys.readouterr().err.endswith("nearest: trust\n")
