"""Documents with owners, from the package, from jsonl, from plays and from plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from isthmus.errors import InputError
from isthmus.models.embedded import corpus
from isthmus.tasks.contract import data_file, data_root

FOLDER = "text"
KNOWN = ("tinyshakespeare.txt", "dolly_4k.jsonl")
LEAST = 10
"""Speakers with fewer speeches are left out: there is nothing to divide."""


class Document(NamedTuple):
    """A text, its owner, and the prompt before it (empty: the whole text is learned)."""

    text: str
    owner: str
    prompt: str = ""


def shipped() -> list[Document]:
    """The texts of the corpus's eight clients."""
    clients = corpus.load().clients.items()
    return [Document(text, owner) for owner, texts in clients for text in texts]


def read(root: str | Path | None, file: str | None = None) -> list[Document]:
    """The documents of `file` under `root`, else of the folder `text`, else of a known file.

    Raises `InputError` naming the relative path that is missing, or the line that cannot be read.
    """
    if file is not None:
        return list(_documents(data_file(root, file)))
    folder = data_root(root)
    names = sorted(p for p in (folder / FOLDER).glob("*") if p.suffix in (".jsonl", ".txt"))
    paths = names or [path for name in KNOWN if (path := folder / name).is_file()][:1]
    if not paths:
        raise InputError(
            "data-dir", folder, f"a folder that holds {FOLDER}/*.jsonl, {FOLDER}/*.txt, "
            + ", ".join(KNOWN)
        )  # fmt: skip
    return [document for path in paths for document in _documents(path)]


def _documents(path: Path) -> Iterator[Document]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise InputError(path.name, "bytes that are no UTF-8", "UTF-8 text") from None
    if path.suffix == ".jsonl":
        yield from _jsonl(path.name, text)
        return
    speeches = [speech for block in _blocks(text) if (speech := _speech(block))]
    if len(speeches) * 2 > len(_blocks(text)):
        counts: dict[str, int] = {}
        for speech in speeches:
            counts[speech.owner] = counts.get(speech.owner, 0) + 1
        yield from (s for s in speeches if counts[s.owner] >= LEAST)
    else:
        yield from (Document(block, path.stem) for block in _blocks(text))


def _blocks(text: str) -> list[str]:
    return [block.strip() for block in re.split(r"\n[ \t]*\n", text) if block.strip()]


def _speech(block: str) -> Document | None:
    """A block whose first line is `Name:` and nothing else."""
    name, _, words = block.partition("\n")
    if not words or not re.fullmatch(r"[A-Z][\w' .-]{0,40}:", name):
        return None
    return Document(words.strip(), name[:-1])


def _jsonl(name: str, text: str) -> Iterator[Document]:
    """Rows `{"text", "group"}`, or `{"instruction", "context", "response", "category"}`."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError:
            row = None
        kinds = (("text",), ("instruction", "response"))
        if not isinstance(row, dict) or not any(
            all(isinstance(row.get(field), str) for field in kind) for kind in kinds
        ):
            allowed = "an object with text, or with instruction and response"
            raise InputError(f"{name} line {number}", line[:40], allowed)
        owner = str(row.get("group") or row.get("category") or Path(name).stem)
        if "text" in row:
            yield Document(row["text"], owner)
        else:
            parts = [row["instruction"], str(row.get("context") or "")]
            prompt = "\n".join(part.strip() for part in parts if part.strip())
            yield Document(row["response"].strip(), owner, f"Question: {prompt}\nAnswer: ")


def write(documents: list[Document], root: str | Path) -> Path:
    """Write documents without prompts as jsonl in the folder `text`; returns the file."""
    path = Path(root) / FOLDER / "clients.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": each.text, "group": each.owner}) for each in documents]
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return path
