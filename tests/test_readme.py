"""README.md and the catalogue page say what the catalogue says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from isthmus import catalogue

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def update() -> ModuleType:
    path = ROOT / "scripts" / "update_readme.py"
    spec = importlib.util.spec_from_file_location("update_readme", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_up_to_date(update: ModuleType) -> None:
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    assert front == update.readme(front), "run: make readme"
    page = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")
    assert page == update.catalogue_page(), "run: make readme"


def test_every_line_of_the_catalogue_is_in_exactly_one_table(update: ModuleType) -> None:
    page = update.catalogue_page()
    for system in catalogue.systems(all=True):
        row = f"| `{system.name}` | {system.status} | {system.title} | {system.paper} |"
        assert page.count(row) == 1


def test_only_what_stands_between_the_markers_changes(update: ModuleType) -> None:
    text = "a <!-- x:begin -->\nold\n<!-- x:end --> b <!-- y:begin -->kept<!-- y:end -->"
    once = update.between(text, "x", "new")
    assert once.startswith("a ") and once.endswith(" b <!-- y:begin -->kept<!-- y:end -->")
    assert "new" in once and "old" not in once
    assert update.between(once, "x", "new") == once
    with pytest.raises(ValueError, match="z:begin"):
        update.between(text, "z", "new")
