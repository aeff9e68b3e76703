"""The columns under a ledger: rows in memory, their JSON lines, and the union of several tables.

A row is 104 bytes in memory: five float64, five int64 and six int32 codes of interned words.
Its line is one JSON object of about 230 bytes. Seconds, joules and money below 8192 are kept to
1e-12 and FLOPs to 1, so that a fixed format (several times faster than the shortest one) reads
back to the same bits: below 8192 = 2^13 a multiple of 1e-12 is a quotient of integers under
2^53, above it doubles lie further apart than twelve decimals can blur.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import InputError

FLOATS = ("t", "seconds", "joules", "money", "flops")
INTS = ("round", "bytes", "values", "session", "sequence")
WORDS = ("what", "from", "to", "kind", "note", "event")
PIECES = (
    ("t",),
    ("what",),
    ("from", "to"),
    ("kind", "round"),
    ("bytes", "values", "seconds", "joules", "money", "flops"),
    ("session", "sequence", "note"),
)
"""The columns of a line, in order; those together vary together."""
LINE = tuple(name for names in PIECES for name in names)
FLOAT, INT, WORD = ({name: i for i, name in enumerate(c)} for c in (FLOATS, INTS, WORDS))

FORMATS = {"flops": "%.0f"}
EXACT = 8192.0
Array = NDArray[Any]


def canonical(value: object) -> str:
    """The one JSON text of a value: ASCII, keys in order, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Columns:
    """A growing table whose columns are the fields of a ledger's row."""

    def __init__(self) -> None:
        self.rows = 0
        self.floats: Array = np.zeros((len(FLOATS), 0))
        self.ints: Array = np.zeros((len(INTS), 0), np.int64)
        self.codes: Array = np.zeros((len(WORDS), 0), np.int32)
        self.words: list[str] = []
        self._quoted: list[str] = []
        self._known: dict[str, int] = {}
        self.code("")

    def __getitem__(self, name: str) -> Array:
        """A column's cells (a view); words as their codes."""
        if name in WORD:
            return self.codes[WORD[name], : self.rows]
        if name in FLOAT:
            return self.floats[FLOAT[name], : self.rows]
        return self.ints[INT[name], : self.rows]

    def code(self, word: str) -> int:
        """The number that stands for a word."""
        code = self._known.get(word)
        if code is None:
            code = self._known[word] = len(self.words)
            self.words.append(word)
            self._quoted.append(json.dumps(word))
        return code

    def encode(self, name: str, cell: str | Sequence[str]) -> int | list[int]:
        """The code of a word, or of each of a sequence of words."""
        known = self._known
        try:
            return known[cell] if isinstance(cell, str) else [known[word] for word in cell]
        except (KeyError, TypeError):
            one = isinstance(cell, str) or not isinstance(cell, Iterable)  # pyright: ignore
            for word in (cell,) if one else cell:
                if not isinstance(word, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                    raise InputError(name, word, "a word") from None
                self.code(word)
        return self.encode(name, cell)

    def put(self, cells: Mapping[str, Any]) -> range:
        """Add a block of rows, all or nothing: scalars stand for all rows. Their numbers."""
        varying: set[str] = set()
        n = 1
        for name, cell in cells.items():
            if not isinstance(cell, str | int | float) and getattr(cell, "ndim", 1):
                if not hasattr(cell, "__len__"):
                    raise InputError(name, cell, "a value, or one for each row")
                if varying and len(cell) != n:
                    raise InputError(name, f"{len(cell)} cells", f"{n}, as the rest of the block")
                n = len(cell)
                varying.add(name)
        return self.settle([(n, cells)])

    def settle(self, blocks: Sequence[tuple[int, Mapping[str, Any]]]) -> range:
        """Add many blocks `(n, cells)` at once, all or nothing; see `put` for the cells, of which
        an array has n."""
        start, stop = self.rows, self.rows + sum([n for n, _ in blocks])
        self._reserve(stop)
        floats, ints = self.floats[:, start:stop], self.ints[:, start:stop]
        try:
            at, coded = start, dict[int, Any]()
            for n, cells in blocks:
                self._fill(slice(at, at + n), cells, coded)
                at += n
            _check(floats, FLOATS)
            _check(ints, INTS)
        except BaseException:
            floats[:], ints[:], self.codes[:, start:stop] = 0, 0, 0
            raise
        _round(floats)
        self.rows = stop
        return range(start, stop)

    def _fill(self, rows: slice, cells: Mapping[str, Any], coded: dict[int, Any]) -> None:
        for name, cell in cells.items():
            if name in WORD:
                code = coded.get(id(cell))  # blocks often share their lists of names
                if code is None:
                    code = coded[id(cell)] = np.array(self.encode(name, cell), np.int32)
                self.codes[WORD[name], rows] = code
            elif not (isinstance(cell, int | float) and cell == 0):  # new rows hold zeros
                held = self.floats[FLOAT[name]] if name in FLOAT else self.ints[INT[name]]
                _fill(held[rows], name, cell)

    def _reserve(self, rows: int) -> None:
        have = self.floats.shape[1]
        if rows > have:
            more = max(rows, 2 * have, 64)
            self.floats, self.ints, self.codes = (
                np.concatenate([old, np.zeros((len(old), more - have), old.dtype)], axis=1)
                for old in (self.floats, self.ints, self.codes)
            )

    def text(self, ids: range) -> str:
        """The lines of some rows: one template for all of them, filled once, column by column."""
        rows = slice(ids.start, ids.stop)
        template = '{"id":%d'
        columns: list[Sequence[Any]] = [ids]
        for names in PIECES:
            piece, own = self._piece(names, rows)
            template += piece
            columns += own
        events = self.codes[WORD["event"], rows]
        if events.any():
            template += "%s"
            texts = [self.words[int(code)] for code in events]
            columns.append([f',"event":{text}' if text else "" for text in texts])
        flat: list[Any] = [None] * (len(columns) * len(ids))
        for i, column in enumerate(columns):
            flat[i :: len(columns)] = column
        return (template + "}\n") * len(ids) % tuple(flat)

    def _piece(self, names: Sequence[str], rows: slice) -> tuple[str, list[list[Any]]]:
        """The template of columns that stand side by side, and what it is filled with.

        A cell is written one way, whoever stands beside it: a file does not depend on when its
        rows were written. Rows of a block are often alike, and those are written once.
        """
        piece, varying = "", list[str]()
        for name in names:
            spec = "%s" if name in WORD else FORMATS.get(name, "%.12f" if name in FLOAT else "%d")
            cells = self[name][rows]
            if (cells == cells[0]).all():
                (text,) = self._filling(name, cells[:1])
                spec = (spec % text).replace("%", "%%")
            else:
                varying.append(name)
            piece += f',"{name}":{spec}'
        if not varying:
            return piece, []
        first = np.flatnonzero(_changes([self[name][rows] for name in varying]))
        n = rows.stop - rows.start
        if 2 * len(first) > n:
            return piece, [self._filling(name, self[name][rows]) for name in varying]
        columns = [self._filling(name, self[name][rows][first]) for name in varying]
        told = list(zip(*columns, strict=True))
        texts = {cells: piece % cells for cells in set(told)}
        often = np.diff(first, append=n).tolist()
        lines = map(repeat, map(texts.__getitem__, told), often)
        return "%s", [list(chain.from_iterable(lines))]

    def _filling(self, name: str, cells: Array) -> list[Any]:
        column = cells.tolist()
        return [self._quoted[code] for code in column] if name in WORD else column

    def row(self, i: int) -> dict[str, Any]:
        """Row i as the object of its line."""
        line: dict[str, Any] = {"id": i}
        for name in LINE:
            cell = self[name][i].item()
            line[name] = self.words[cell] if name in WORD else cell
        if event := self.words[int(self.codes[WORD["event"], i])]:
            line["event"] = json.loads(event)
        return line

    def parse(self, lines: Sequence[bytes]) -> None:
        """Add the rows of whole lines; `InputError` names the line that is not the next row."""
        start, stop = self.rows, self.rows + len(lines)
        try:
            rows: list[dict[str, Any]] = json.loads(b"[" + b",".join(lines) + b"]")
            good = len(rows) == len(lines)
        except ValueError:
            rows, good = [], False
        if not good:
            rows = [_parse(line, f"line {start + i + 1}") for i, line in enumerate(lines)]
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or row.get("id") != start + i:  # pyright: ignore
                raise InputError(f"line {start + i + 1}", row, f"a row with id {start + i}")
        self._reserve(stop)
        try:
            for held, names in ((self.floats, FLOATS), (self.ints, INTS)):
                for i, name in enumerate(names):
                    _fill(held[i, start:stop], name, [row[name] for row in rows])
                if rows:
                    _check(held[:, start:stop], names)
            for i, name in enumerate(WORDS[:-1]):
                self.codes[i, start:stop] = self.encode(name, [row[name] for row in rows])
            texts = [canonical(row["event"]) if "event" in row else "" for row in rows]
            self.codes[-1, start:stop] = self.encode("event", texts)
        except KeyError as missing:
            where = f"lines {start + 1} to {stop}"
            raise InputError(where, f"a row without {missing}", ", ".join(LINE)) from None
        self.rows = stop


def union(tables: Sequence[Columns]) -> Columns:
    """The rows of several tables, in order of time and then of all other columns.

    A row that several tables hold is kept as often as the one with most copies of it has it,
    which makes the union idempotent, commutative and associative.
    """
    words = sorted({word for table in tables for word in table.words})
    code = {word: i for i, word in enumerate(words)}
    parts: list[list[Array]] = []
    for table in tables:
        codes = np.array([code[word] for word in table.words])[table.codes[:, : table.rows]]
        columns = _ordered([*table.floats[:, : table.rows], *table.ints[:, : table.rows], *codes])
        first = np.flatnonzero(_changes(columns))
        copy = np.arange(table.rows) - np.repeat(first, np.diff(first, append=table.rows))
        parts.append([*columns, copy])
    out = Columns()
    if parts:
        columns = _ordered([np.concatenate(same) for same in zip(*parts, strict=True)])
        keep = _changes(columns)
        columns = [column[keep] for column in columns]
        recode = np.array([out.code(word) for word in words], np.int32)
        f, i, w = len(FLOATS), len(FLOATS) + len(INTS), len(FLOATS) + len(INTS) + len(WORDS)
        out.floats, out.ints = np.stack(columns[:f]), np.stack(columns[f:i])
        out.codes, out.rows = recode[np.stack(columns[i:w])], int(keep.sum())
    return out


def _fill(row: Array, name: str, cell: Any) -> None:
    try:
        np.copyto(row, cell, casting="same_kind")
    except (TypeError, ValueError, OverflowError):
        kind = "a number" if row.dtype.kind == "f" else "a whole number below 2^63"
        given = cell if isinstance(cell, str | int | float) else "something else"
        raise InputError(name, given, f"{kind}, or one for each row") from None


def _round(floats: Array) -> None:
    """Keep what the file's fixed format reads back to the same bits."""
    floats += 0.0  # no -0.0, which would be written otherwise than 0.0
    measured = floats[:4]
    np.copyto(measured, np.rint(measured * 1e12) / 1e12, where=measured < EXACT)
    np.rint(floats[4], out=floats[4])


def _check(block: Array, names: Sequence[str]) -> None:
    if not block.size or (block.min() >= 0 and block.max() <= 1e290):
        return
    bad = ~((block >= 0) & (block <= 1e290))
    i, j = (int(k) for k in np.argwhere(bad)[0])
    raise InputError(names[i], block[i, j].item(), "a finite number, 0 or more")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(line))
    except ValueError:
        raise InputError(where, repr(line[:40]), "a JSON object") from None


def _ordered(columns: list[Array]) -> list[Array]:
    order = np.lexsort(columns[::-1])
    return [column[order] for column in columns]


def _changes(columns: list[Array]) -> NDArray[np.bool_]:
    """Where a row of sorted columns differs from the one before it."""
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return new
