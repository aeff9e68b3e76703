"""The package as a whole: names on first use, one version, repository hygiene."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import isthmus
from isthmus import catalogue, errors

ROOT = Path(__file__).resolve().parent.parent


def test_import_is_light_and_names_resolve_on_first_use() -> None:
    program = (
        "import sys, isthmus; before = {m for m in sys.modules if m.startswith('isthmus')};"
        "isthmus.InputError; after = {m for m in sys.modules if m.startswith('isthmus')};"
        "print(sorted(before), sorted(after - before), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.stdout.strip() == "['isthmus'] ['isthmus.errors'] False"


def test_public_names() -> None:
    assert isthmus.systems is catalogue.systems
    assert isthmus.InputError is errors.InputError
    assert set(isthmus.__all__) <= set(dir(isthmus))
    with pytest.raises(AttributeError, match="trian"):
        isthmus.trian  # noqa: B018


@pytest.mark.parametrize("name", isthmus.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(isthmus, name) is not None


def test_constraints_satisfy_the_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = {**project["optional-dependencies"], "core": project["dependencies"]}
    untested = {"ray", "settlement"}  # large or platform-bound: bounded below, not pinned
    for extra in extras.keys() - untested:
        for requirement in extras[extra]:
            found = re.fullmatch(r"([A-Za-z0-9-]+)(?:\[.*\])?>=([0-9.]+)", requirement)
            assert found is not None, f"{requirement} needs a lower bound"
            assert _numbers(pins[found[1]]) >= _numbers(found[2]), requirement


def test_the_installed_version_is_the_declared_one() -> None:
    try:
        installed = metadata.version("isthmus")
    except metadata.PackageNotFoundError:
        pytest.skip("isthmus is not installed here")
    assert installed == isthmus.__version__


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
