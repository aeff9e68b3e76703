"""Write the catalogue's tables into README.md and docs/catalogue.md.

python scripts/update_readme.py            rewrite both
python scripts/update_readme.py --check    only say whether they are up to date (status 1: not)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from isthmus import catalogue
from isthmus.catalogue import System
from isthmus.cli.systems import summary

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    "federation": "Federation: personalised, decentralised and local training",
    "llm": "Language models: tuning and agents",
    "inference": "Inference between device, edge and cloud",
    "compression": "Compression",
    "trust": "Trust: attacks, defences, privacy, ownership, settlement",
    "workloads": "Workloads",
}


def table(systems: Iterable[System]) -> str:
    """A Markdown table of catalogue lines."""
    rows = [f"| `{s.name}` | {s.status} | {s.title} | {s.paper} |" for s in systems]
    return "\n".join(["| name | status | what it is | paper |", "|---|---|---|---|", *rows])


def by_family(systems: list[System], level: str) -> str:
    """One table under one heading for each family that has lines."""
    parts = []
    for family, title in FAMILIES.items():
        members = [system for system in systems if system.family == family]
        if members:
            parts += [f"{level} {title}", table(members)]
    return "\n\n".join(parts)


def between(text: str, mark: str, content: str) -> str:
    """`text` with what stands between the markers of `mark` replaced.

    >>> print(between("a <!-- x:begin -->old<!-- x:end --> b", "x", "new"))
    a <!-- x:begin -->
    new
    <!-- x:end --> b
    """
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the text needs one {begin} and one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def readme(text: str) -> str:
    """README.md with the current table of systems."""
    systems = catalogue.systems()
    return between(text, "systems", f"{summary(systems)}.\n\n{by_family(systems, '###')}")


def catalogue_page() -> str:
    """docs/catalogue.md: systems, baselines and parts."""
    listing = catalogue.systems(all=True)
    parts = ["# Catalogue", "Generated from the catalogue: `make readme` writes it again."]
    for kind, title in (("system", "Systems"), ("baseline", "Baselines"), ("part", "Parts")):
        members = [system for system in listing if system.kind == kind]
        parts += [f"## {title}", f"{summary(members)}.", by_family(members, "###")]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Rewrite the files, or with `--check` say which are out of date."""
    page, front = ROOT / "docs" / "catalogue.md", ROOT / "README.md"
    wanted = {front: readme(front.read_text(encoding="utf-8")), page: catalogue_page()}
    stale = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        print(f"{path.name} {'is out of date' if '--check' in sys.argv else 'written'}")
        if "--check" not in sys.argv:
            path.write_text(wanted[path], encoding="utf-8")
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
