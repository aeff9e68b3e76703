"""The catalogue: what is listed, what is registered, and how names are found."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus import catalogue
from isthmus.catalogue import key, register, scan
from isthmus.errors import InputError

LISTED = catalogue.systems(all=True)
NAMES = [system.name for system in LISTED]
ENTRIES = catalogue.entries()


def test_every_registered_name_is_listed() -> None:
    listed = {key(name) for name in NAMES}
    strangers = [f"{e.module}: {e.name}" for e in ENTRIES if key(e.name) not in listed]
    assert not strangers, "add a line to systems.toml for: " + ", ".join(strangers)


def test_registered_names_are_spelt_as_listed() -> None:
    assert [e.name for e in ENTRIES if e.name not in NAMES] == []


def test_no_name_is_listed_or_registered_twice() -> None:
    assert [n for n, count in Counter(map(key, NAMES)).items() if count > 1] == []
    slots = Counter((e.place, key(e.name)) for e in ENTRIES)
    assert [slot for slot, count in slots.items() if count > 1] == []


def test_registrations_use_known_places_and_statuses() -> None:
    assert {e.place for e in ENTRIES} <= set(catalogue.PLACES)
    assert {e.status for e in ENTRIES} <= set(catalogue.STATUSES)


def test_a_registration_stands_in_a_folder_of_its_place() -> None:
    for entry in ENTRIES:
        folders = {f"isthmus.{f.replace('/', '.')}" for f in catalogue.PLACES[entry.place]}
        alsos = [e for e in ENTRIES if e.module == entry.module and e.place != entry.place]
        fits = any(entry.module.startswith(folder) for folder in folders)
        assert fits or alsos, f"{entry.module} registers a {entry.place}"


def test_the_listing_is_complete_and_in_order() -> None:
    systems = catalogue.systems()
    assert {s.kind for s in systems} == {"system"}
    assert [s.family for s in systems] == sorted(
        (s.family for s in systems), key=catalogue.FAMILIES.index
    )
    for system in LISTED:
        assert system.family in catalogue.FAMILIES
        assert system.kind in catalogue.KINDS
        assert system.title and "\n" not in system.title
        assert system.name == system.name.lower() and "_" not in system.name
    assert [s.name for s in systems if not s.paper] == []


def test_status_is_planned_exactly_where_nothing_is_registered() -> None:
    registered = {key(entry.name) for entry in ENTRIES}
    for system in LISTED:
        assert (system.status == "planned") == (key(system.name) not in registered)
        assert bool(system.modules) == (key(system.name) in registered)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.place}:{e.name}")
def test_every_registered_name_is_found_by_any_spelling(entry: catalogue.Entry) -> None:
    spellings = (entry.name, entry.name.replace("-", "_"), entry.name.replace("-", "").upper())
    found = {id(catalogue.find(entry.place, spelling)) for spelling in spellings}
    assert len(found) == 1
    assert catalogue.find(entry.place, entry.name).catalogue_name == entry.name


@given(st.sampled_from(NAMES), st.data())
def test_spelling_never_merges_two_names(name: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(name)))
    sign = data.draw(st.sampled_from(["-", "_", " ", ""]))
    spelt = name[:cut].upper() + sign + name[cut:]
    assert [other for other in NAMES if key(other) == key(spelt)] == [name]


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        catalogue.find("reducer", "trimmed-maen")
    assert caught.value.nearest == "trimmed-mean"
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="place: metod given"):
        catalogue.find("metod", "fedavg")


def test_scan_reads_decorators_and_calls_and_refuses_what_is_not_literal(tmp_path: Path) -> None:
    file = tmp_path / "two.py"
    file.write_text(
        "from isthmus import catalogue\n"
        "raise RuntimeError('never run')\n"
        "@catalogue.register('one', place='method', status='verified', vectorise=False)\n"
        "class One: ...\n"
        "two = catalogue.register('two', place='attack', status='miniature')(make('two'))\n"
        "other.register('three')\n"
    )
    one, two = sorted(scan(file, "m.two"), key=lambda entry: entry.name)
    assert (one.name, one.place, one.status, one.module) == ("one", "method", "verified", "m.two")
    assert dict(one.facts) == {"vectorise": False} and two.place == "attack"
    file.write_text("NAME = 'one'\nregister(NAME, place='method', status='verified')(f)\n")
    with pytest.raises(ValueError, match=r"two\.py:2"):
        list(scan(file, "m.two"))
    file.write_text("register('one', place='method')(f)\n")
    with pytest.raises(ValueError, match=r"two\.py:1"):
        list(scan(file, "m.two"))


def test_register_marks_the_object_and_refuses_bad_facts() -> None:
    @register("a-test-name", place="method", status="verified")
    def mine() -> str:
        return "mine"

    assert mine.catalogue_name == "a-test-name"  # type: ignore[attr-defined]
    assert catalogue.find("method", "A test name") is mine
    assert "a-test-name" in catalogue.names("method")
    with pytest.raises(InputError, match="nearest: miniature"):
        register("x", place="method", status="minature")
    with pytest.raises(InputError, match="nearest: method"):
        register("x", place="methods", status="verified")
    with pytest.raises(InputError, match=r"isthmus\.defenses\.krum"):
        register("Krum", place="selector", status="verified")


def test_a_users_own_file(tmp_path: Path) -> None:
    file = tmp_path / "my methods.py"
    file.write_text(
        "from isthmus import catalogue\n"
        "@catalogue.register('my-own-rule', place='method', status='miniature')\n"
        "class Rule: ...\n"
        "class Plain: ...\n"
    )
    rule = catalogue.find("method", f"{file}:Rule")
    assert catalogue.find("method", f"{file}:my_own_rule") is rule
    assert catalogue.find("method", f"{file}:Plain").__name__ == "Plain"
    with pytest.raises(InputError, match="nearest: Plain"):
        catalogue.find("method", f"{file}:Plane")
    with pytest.raises(InputError, match="existing file"):
        catalogue.find("method", f"{tmp_path / 'none.py'}:Rule")


def test_a_users_file_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise KeyError('inside')\n")
    before = set(sys.modules)
    with pytest.raises(KeyError, match="inside"):
        catalogue.find("method", f"{file}:anything")
    assert {name for name in sys.modules if name.startswith("isthmus_own_broken")} <= before


def test_listing_imports_nothing_heavy() -> None:
    program = (
        "import sys; from isthmus import catalogue; catalogue.systems(all=True);"
        "above = [m for m in sys.modules if m.startswith('isthmus.')];"
        "heavy = {'torch', 'numpy', 'transformers', 'pydantic', 'rich'} & set(sys.modules);"
        "print(sorted(above), sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(catalogue.__file__).parent.parent)},
    )
    assert done.stdout.strip() == "['isthmus.catalogue', 'isthmus.errors'] []"
