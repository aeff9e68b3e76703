"""The frozen text behind the embedded language models, split once, by file, into three parts.

`pretraining` is what the target was trained on, `clients` are eight private sources (the
devices of the demo and of the `text` task, non-IID by source), and `heldout` is text that
nothing was trained on. No paragraph, and no run of 50 characters (case and spacing
disregarded), is in two parts. The text is prose from the documentation and docstrings of
one CPython release; `NOTICE.md` beside this file holds its licence.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

OVERLAP = 50
FILE = Path(__file__).with_name("corpus.json.xz")
DIGEST = "018fefbf4b82bd3ee38af21734c582e462afdccc6328021c166ae8fa5df49b95"
"""SHA-256 of the shipped text, see `digest`."""

CLIENTS: dict[str, tuple[str, ...]] = {
    "logging": ("logging/",),
    "decimal": ("_pydecimal.py",),
    "unittest": ("unittest/",),
    "http": ("http/",),
    "xml": ("xml/",),
    "processes": ("multiprocessing/", "concurrent/"),
    "text": ("difflib.py", "textwrap.py"),
    "archives": ("tarfile.py", "zipfile.py", "shutil.py"),
}
_NEVER_HELD_OUT = frozenset({"test", "tests", "idle_test", "pydoc_data"})


class Corpus(NamedTuple):
    """The three parts; a document is a string, its paragraphs one a line."""

    pretraining: list[str]
    clients: dict[str, list[str]]
    heldout: list[str]


class Source(NamedTuple):
    """One file's documents; `part` is `pretraining`, `heldout` or the name of a client."""

    part: str
    file: str
    documents: list[str]


@cache
def sources() -> tuple[Source, ...]:
    """Every source file with its part and documents, in the order of the files."""
    content = json.loads(lzma.decompress(FILE.read_bytes()))
    return tuple(Source(*row) for row in content["sources"])


def load() -> Corpus:
    """The shipped corpus."""
    parts: dict[str, list[str]] = {name: [] for name in ("pretraining", *CLIENTS, "heldout")}
    for source in sources():
        parts[source.part].extend(source.documents)
    pretraining, heldout = parts.pop("pretraining"), parts.pop("heldout")
    return Corpus(pretraining, parts, heldout)


def digest(rows: Iterable[Source]) -> str:
    """SHA-256 of parts, files and texts in canonical form."""
    text = json.dumps([list(row) for row in rows], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def client_of(file: str) -> str | None:
    """The client that owns a file, if any.

    >>> client_of("xml/sax/handler.py"), client_of("json/decoder.py")
    ('xml', None)
    """
    for name, prefixes in CLIENTS.items():
        if file.startswith(prefixes):
            return name
    return None


def part_of(file: str) -> str:
    """The part of a file: its client's, or one in twenty held out by the hash of the name."""
    if owner := client_of(file):
        return owner
    *folders, name = file.split("/")
    library = name.endswith(".py") and not _NEVER_HELD_OUT.intersection(folders)
    word = int.from_bytes(hashlib.sha256(file.encode()).digest()[:4], "big")
    return "heldout" if library and word % 20 == 0 else "pretraining"


def normalise(text: str) -> str:
    """Case and spacing removed, as the comparisons between parts see a text."""
    return " ".join(text.casefold().split())


def shingles(text: str, width: int = OVERLAP) -> set[str]:
    """All runs of `width` characters of the normalised text (none when it is shorter)."""
    text = normalise(text)
    return {text[i : i + width] for i in range(len(text) - width + 1)}


def separate(rows: Iterable[Source]) -> list[Source]:
    """Remove repeated paragraphs, and whatever two parts share.

    Clients are served first, then the held-out text, then pre-training: a paragraph that is
    in two parts stays in the first of them, and so does a run of `OVERLAP` characters. The
    eight clients are one part here.
    """
    order = sorted(rows, key=lambda row: {"pretraining": 2, "heldout": 1}.get(row.part, 0))
    seen: set[str] = set()
    taken: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    kept: list[Source] = []
    for row in order:
        rank = {"pretraining": 2, "heldout": 1}.get(row.part, 0)
        foreign = [taken[r] for r in range(rank)]
        texts: list[str] = []
        for text in row.documents:
            lines = []
            for line in text.split("\n"):
                plain = normalise(line)
                grams = shingles(line)
                if plain not in seen and all(grams.isdisjoint(other) for other in foreign):
                    lines.append(line)
                    seen.add(plain)
            joined = "\n".join(lines)
            grams = shingles(joined)  # a run may also cross the border of two paragraphs
            if joined and all(grams.isdisjoint(other) for other in foreign):
                texts.append(joined)
                if rank < 2:
                    taken[rank] |= grams
        if texts:
            kept.append(Source(row.part, row.file, texts))
    return sorted(kept, key=lambda row: row.file)
