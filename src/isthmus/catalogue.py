"""Every system the project knows, and where each one that exists is found.

`systems.toml` lists names, titles and papers; the code that implements a name registers itself:

    @catalogue.register("fedprox", place="method", status="verified")
    class FedProx(Method): ...

What is registered is read from the source text, so listing systems imports none of them; `find`
imports one module, the one that holds the name.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

from isthmus.errors import InputError, unknown

T = TypeVar("T")

HERE = Path(__file__).parent

OWN = "isthmus_own_"
"""How the names of modules begin that were loaded from a path."""

PLACES: dict[str, tuple[str, ...]] = {
    "method": ("federated/methods", "federated/adapters"),
    "schedule": ("federated/schedulers",),
    "selector": ("defenses",),
    "reducer": ("defenses",),
    "guard": ("defenses",),
    "attack": ("attacks",),
    "mechanism": ("privacy",),
    "privacy": ("privacy",),
    "codec": ("wire/codecs",),
    "task": ("tasks",),
    "serving": ("inference/methods",),
    "compression": ("compression",),
    "agent": ("agents",),
    "ownership": ("ownership",),
    "settlement": ("settlement",),
    "device": ("devices",),
}
"""What a registered name can be, and the folders that hold such modules."""

FAMILIES = ("federation", "llm", "inference", "compression", "trust", "workloads")
KINDS = ("system", "baseline", "part")
STATUSES = ("not-reproduced", "reconstructed", "miniature", "verified")
"""From the weakest to the strongest; a listed name that nothing registers is `planned`."""


@dataclass(frozen=True)
class Entry:
    """One registration, as it stands in the source."""

    name: str
    place: str
    status: str
    module: str
    facts: MappingProxyType[str, Any]


@dataclass(frozen=True)
class System:
    """One line of the catalogue.

    `kind` is `system` (a published system), `baseline` (what systems are measured against) or
    `part` (a codec, task or schedule without a paper). A name registered in several places, like
    a system with a method and a schedule, has the weakest of their statuses.
    """

    name: str
    title: str
    family: str
    kind: str
    paper: str
    home: str
    status: str
    modules: tuple[str, ...] = ()


def key(name: str) -> str:
    """The one spelling of a name: case, `-`, `_` and spaces do not matter.

    >>> key("TK-SLT") == key("tk_slt") == key("tk slt")
    True
    """
    return "".join(name.split()).replace("-", "").replace("_", "").lower()


def register(name: str, *, place: str, status: str, **facts: Any) -> Callable[[T], T]:
    """Put the decorated class or function into the catalogue.

    All arguments are literals, because they are also read without running the module. Sets
    `catalogue_name` on the object. Raises `InputError` for an unknown place or status, and for a
    name that another object already has in this place.
    """
    if place not in PLACES:
        raise unknown("place", place, PLACES)
    if status not in STATUSES:
        raise unknown("status", status, STATUSES)
    slot, module = (place, key(name)), sys._getframe(1).f_globals["__name__"]
    written = _index().get(slot)
    taken = written.module if written else _registered_by.get(slot)
    if taken not in (None, module):
        raise InputError(place, name, f"a name that {taken} does not hold already")

    def enter(thing: T) -> T:
        _registered[slot], _registered_by[slot] = thing, module
        thing.catalogue_name = name  # type: ignore[attr-defined]
        return thing

    return enter


def find(place: str, name: str) -> Any:
    """The object registered as `name`, in any spelling, or `path.py:name` for a user's own.

    Raises `InputError` with the nearest name when there is none.
    """
    if place not in PLACES:
        raise unknown("place", place, PLACES)
    if ".py:" in name:
        return _own(place, name)
    slot = (place, key(name))
    if slot not in _registered:
        entry = _index().get(slot)
        if entry is None:
            raise unknown(place, name, names(place))
        importlib.import_module(entry.module)
    return _registered[slot]


def names(place: str) -> list[str]:
    """The registered names of one place, sorted."""
    if place not in PLACES:
        raise unknown("place", place, PLACES)
    written = {slot: entry.name for slot, entry in _index().items()}
    live = {slot: str(thing.catalogue_name) for slot, thing in _registered.items()}
    return sorted(name for slot, name in (written | live).items() if slot[0] == place)


def entries() -> list[Entry]:
    """Every registration in the package, read from the source."""
    return [entry for path in _sources(HERE) for entry in scan(path, _dotted(path))]


@cache
def systems(all: bool = False) -> list[System]:
    """The catalogue in its written order; `all` adds baselines and parts.

    >>> fedit = next(s for s in systems() if s.name == "fedit")
    >>> fedit.family, fedit.kind
    ('llm', 'system')
    """
    built: dict[str, list[Entry]] = {}
    for entry in entries():
        built.setdefault(key(entry.name), []).append(entry)
    listing = []
    for kind, family, name, facts in _listed():
        if not all and kind != "system":
            continue
        here = built.get(key(name), [])
        status = min((entry.status for entry in here), key=STATUSES.index, default="planned")
        modules = tuple(dict.fromkeys(entry.module for entry in here))
        listing.append(
            System(name, family=family, kind=kind, status=status, modules=modules, **facts)
        )
    return listing


def scan(path: Path, module: str) -> Iterator[Entry]:
    """The registrations written in one file, without running it.

    Raises `ValueError` with file and line when an argument is not a literal.
    """
    text = path.read_text(encoding="utf-8")
    if "register(" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or _called(node.func) != "register":
            continue
        keywords = {word.arg: word.value for word in node.keywords if word.arg}
        if "place" not in keywords:
            continue
        try:
            name = ast.literal_eval(node.args[0])
            facts = {word: ast.literal_eval(value) for word, value in keywords.items()}
            place, status = facts.pop("place"), facts.pop("status")
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"{path.name}:{node.lineno}: register needs a name, place and status as literals"
            ) from error
        yield Entry(name, place, status, module, MappingProxyType(facts))


_registered: dict[tuple[str, str], Any] = {}
_registered_by: dict[tuple[str, str], str] = {}
_own_files: dict[Path, ModuleType] = {}


def _called(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")


@cache
def _index() -> dict[tuple[str, str], Entry]:
    return {(entry.place, key(entry.name)): entry for entry in entries()}


def _sources(root: Path) -> list[Path]:
    folders = sorted({folder for places in PLACES.values() for folder in places})
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def _dotted(path: Path) -> str:
    parts = path.relative_to(HERE).with_suffix("").parts
    return ".".join(("isthmus", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _listed() -> Iterator[tuple[str, str, str, dict[str, str]]]:
    tables = tomllib.loads((HERE / "systems.toml").read_text(encoding="utf-8"))
    for kind in KINDS:
        for family, rows in tables.get(kind, {}).items():
            for name, facts in rows.items():
                yield kind, family, name, {"paper": "", "home": "", **facts}


def _own(place: str, where: str) -> Any:
    """The object `name` of the user's file in `path.py:name`: an attribute or a registered name."""
    file, _, name = where.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise InputError(place, where, "path.py:name of an existing file")
    module = _own_files.get(path) or _load(path)
    if hasattr(module, name):
        return getattr(module, name)
    things = [thing for thing in vars(module).values() if hasattr(thing, "catalogue_name")]
    for thing in things:
        if key(thing.catalogue_name) == key(name):
            return thing
    public = [word for word in vars(module) if not word.startswith("_")]
    raise unknown(f"{place} in {path.name}", name, public)


def _load(path: Path) -> ModuleType:
    name = f"{OWN}{path.stem}_{len(_own_files)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _own_files[path] = module
    return module
