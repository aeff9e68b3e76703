"""Extract the corpus of the embedded language models from this interpreter's library.

    python scripts/extract_corpus.py --out build/corpus

writes `corpus.json.xz` and `NOTICE.md`. The package ships one such extract, frozen; running
this under another release of CPython gives another text and another hash, so the shipped
models are never retrained on what happens to be installed.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import lzma
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from isthmus.models.embedded.corpus import CLIENTS, Source, digest, part_of, separate
from isthmus.models.embedded.prose import document, documents, topics

ROOT = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = ("site-packages", "encodings", "ensurepip", "turtledemo", "__pycache__", "lib-dynload")
GENERATED = re.compile(r"(?:_sysconfigdata|config-|sre_constants|stringprep|lib2to3/tests/data)")
# Tests of the clients' modules tell the clients' story in other words.
CLIENT_TESTS = re.compile(
    r"test/(?:.*/)?[^/]*(?:logging|decimal|unittest|http|xml|sax|minidom|pulldom|multiprocessing"
    r"|concurrent|difflib|textwrap|tarfile|zipfile|shutil)|unittest/test/"
)
COMPILED = re.findall(
    r"\w+",
    """
    builtins _abc _ast _asyncio _bisect _codecs _collections _contextvars _csv _ctypes _curses
    _datetime _functools _hashlib _heapq _imp _io _json _locale _lzma _opcode _operator _pickle
    _queue _random _signal _socket _sqlite3 _sre _ssl _statistics _string _struct _symtable
    _thread _tracemalloc _uuid _warnings _weakref _zoneinfo array atexit audioop binascii cmath
    errno faulthandler fcntl gc grp itertools marshal math mmap posix pwd pyexpat readline
    resource select sys syslog termios time unicodedata zlib
    """,
)


def library() -> Iterator[Source]:
    """Docstrings, comments and help topics of the library's Python files."""
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if any(part in LEFT_OUT for part in path.relative_to(ROOT).parts):
            continue
        if GENERATED.match(file) or CLIENT_TESTS.match(file):
            continue
        try:
            with tokenize.open(path) as handle:
                text = handle.read()
            read = topics if file == "pydoc_data/topics.py" else documents
            yield Source(part_of(file), file, read(text))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # the test suite holds files that are wrong on purpose


def compiled() -> Iterator[Source]:
    """Docstrings of a fixed list of compiled modules, of their functions, classes and members."""
    for name in COMPILED:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found = [module.__doc__]
        for _, value in sorted(vars(module).items()):
            if inspect.isroutine(value) or inspect.isclass(value):
                found.append(value.__doc__)
            if inspect.isclass(value):
                members = sorted(vars(value).items())
                found.extend(getattr(member, "__doc__", None) for _, member in members)
        texts = [document(text) for text in found if isinstance(text, str)]
        yield Source("pretraining", f"compiled/{name}", [text for text in texts if text])


def notices() -> Iterator[tuple[str, list[str]]]:
    """Files that carry a copyright line of their own, with those lines."""
    pattern = re.compile(r"^[#\s\"']*((?:\(c\) )?Copyright\b.*?\d{4}.*)$", re.I | re.M)
    for source in library():
        text = (ROOT / source.file).read_text("utf-8", errors="ignore")
        if source.documents and (lines := [line.strip() for line in pattern.findall(text)]):
            yield source.file, sorted(set(lines))


def notice(version: str, hashed: str) -> str:
    """The text of the licence notice."""
    rows = "\n".join(f"- `{file}`: {'; '.join(lines)}" for file, lines in notices())
    licence = (ROOT / "LICENSE.txt").read_text("utf-8")
    psf = licence[licence.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2") :]
    psf = psf[: psf.index("BEOPEN.COM LICENSE AGREEMENT")].rstrip()
    return f"""# Notice for the embedded corpus and language models

`corpus.json.xz` is prose taken from the docstrings, comments and help topics of CPython
{version}: paragraphs were selected, unwrapped and freed of markup, and repetitions removed.
The models in `target/` and `draft/` were trained on its part `pretraining`. The text is
Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved, and is used under
the licence below. SHA-256 of the extracted text: `{hashed}`.

## Files with notices of their own

{rows}

## Licence

```
{psf}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    out: Path = parser.parse_args().out
    version = platform.python_version()
    rows = separate([*library(), *compiled()])
    hashed = digest(rows)
    content = {"cpython": version, "sha256": hashed, "sources": [list(row) for row in rows]}
    out.mkdir(parents=True, exist_ok=True)
    packed = lzma.compress(json.dumps(content, separators=(",", ":")).encode(), preset=9)
    (out / "corpus.json.xz").write_bytes(packed)
    (out / "NOTICE.md").write_text(notice(version, hashed))
    for part in ("pretraining", *CLIENTS, "heldout"):
        texts = [text for row in rows if row.part == part for text in row.documents]
        files = sum(row.part == part for row in rows)
        print(f"{part:12} files {files:5} documents {len(texts):6} bytes {sum(map(len, texts)):8}")
    print(f"CPython {version}, sha256 {hashed}, {len(packed)} bytes compressed")


if __name__ == "__main__":
    main()
