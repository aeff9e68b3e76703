"""The ledger: an append-only table of what crossed, what was computed and what was revealed.

A row is a *crossing* (a message that left a party), *work* (a party's own computation), a
*privacy* event, or a *confirm* (what receiving a crossing cost its receiver; it has no bytes).
Two counts stand side by side: `bytes` is honest (everything really sent: framing, indices,
retransmissions), `values` is paper-style (the values alone, once).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from isthmus.errors import InputError
from isthmus.wire.columns import LINE, WORD, Array, Columns, canonical, union
from isthmus.wire.tally import tally

BLOCK = 1 << 13
WAITING = 1 << 10
"""Rows that may wait to be written together."""

Words = str | Sequence[str]
Numbers = float | Sequence[float] | Array


class Ledger:
    """A table in memory (104 bytes a row) and, with a `path`, a JSONL file as it goes.

    Rows are entered one at a time (`cross`, `work`) or as one block (`cross_many`,
    `work_many`), each with one buffered write; `flush` makes all of them readable. A file
    that exists is continued by `resume` or looked at by `read`, never overwritten.

    >>> ledger = Ledger()
    >>> ledger.cross_many(
    ...     sender=["client/0", "client/1"],
    ...     receiver="server",
    ...     kind="update",
    ...     bytes=[40, 50],
    ...     values=[32, 40],
    ... )
    range(0, 2)
    >>> ledger.total("bytes", to="server"), ledger.total("values")
    (90, 72)
    >>> ledger.sums("bytes", by=("kind", "direction"))
    {('update', 'up'): 90}
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self._held = Columns()
        self._later: list[tuple[int, Mapping[str, Any]]] = []
        self._waiting = 0
        self._file: BinaryIO | None = None
        if path is not None:
            if os.path.exists(path) and os.path.getsize(path):
                raise InputError("ledger", path, "a new file; Ledger.resume continues an old one")
            self._file = open(path, "ab", buffering=1 << 16)  # noqa: SIM115

    def __len__(self) -> int:
        return self._held.rows + self._waiting

    @property
    def _columns(self) -> Columns:
        """The table with every row in it."""
        if self._later:
            blocks, self._later, self._waiting = self._later, [], 0
            self._write(self._held.settle(blocks))
        return self._held

    def cross(self, *, sender: str, receiver: str, kind: str, **cells: Any) -> int:
        """Enter one crossing, with the cells of `cross_many`; its id."""
        return self.cross_many(sender=sender, receiver=receiver, kind=kind, **cells).start

    def cross_many(
        self,
        *,
        sender: Words,
        receiver: Words,
        kind: Words,
        t: Numbers = 0.0,
        bytes: Numbers = 0,
        values: Numbers = 0,
        seconds: Numbers = 0.0,
        joules: Numbers = 0.0,
        money: Numbers = 0.0,
        round: Numbers = 0,
        session: Numbers = 0,
        sequence: Numbers = 0,
        note: Words = "",
    ) -> range:
        """Enter a block of crossings: sequences of one length n; a scalar stands for all n.

        `bytes` are those really sent, `values` the paper-style count (bytes of values alone);
        `t` and `seconds` in seconds. A lost or repeated transmission is a row of its own with
        the note `lost` or `repeat` and no `values`. Returns the ids. Raises `InputError` for
        a negative or non-finite cell, or a fraction where whole numbers are counted.
        """
        again = {"lost", "repeat"}.intersection([note] if isinstance(note, str) else note)
        if again:
            notes = np.broadcast_to(np.asarray(note), np.broadcast(note, values).shape)
            if np.any(np.isin(notes, ["lost", "repeat"]) & (np.asarray(values) != 0)):
                raise InputError("values", "more than 0", f"0 in a row noted {again.pop()}")
        return self._enter(
            {"what": "crossing", "from": sender, "to": receiver, "kind": kind, "t": t}
            | {"bytes": bytes, "values": values, "seconds": seconds, "joules": joules}
            | {"money": money, "round": round, "session": session, "sequence": sequence}
            | {"note": note}
        )

    def work(self, *, party: str, kind: str, **cells: Any) -> int:
        """Enter one piece of a party's own work, with the cells of `work_many`; its id."""
        return self.work_many(party=party, kind=kind, **cells).start

    def work_many(
        self,
        *,
        party: Words,
        kind: Words,
        t: Numbers = 0.0,
        seconds: Numbers = 0.0,
        joules: Numbers = 0.0,
        money: Numbers = 0.0,
        flops: Numbers = 0.0,
        round: Numbers = 0,
        session: Numbers = 0,
        note: Words = "",
    ) -> range:
        """Enter a block of local work (from == to); a scalar stands for all rows. The ids."""
        return self._enter(
            {"what": "work", "from": party, "to": party, "kind": kind, "t": t}
            | {"seconds": seconds, "joules": joules, "money": money, "flops": flops}
            | {"round": round, "session": session, "note": note}
        )

    def privacy(self, t: float, party: str, event: Mapping[str, Any], round: int = 0) -> int:
        """Enter what a party revealed, as an event that an accountant composes later.

        `event` has `unit` and `adjacency` (words) and either `mechanism` (a word) with
        `parameters`, or `pair`, the dominating pair of distributions; all of it JSON. An
        epsilon is never an event: it is what composing events gives.
        """
        for field in ("unit", "adjacency"):
            if not isinstance(event.get(field), str):
                raise InputError(f"event.{field}", event.get(field), "a word")
        if ("pair" in event) == (isinstance(event.get("mechanism"), str) and "parameters" in event):
            raise InputError("event", sorted(event), "a mechanism with parameters, or a pair")
        if event.keys() & {"epsilon", "delta"}:
            raise InputError("event", sorted(event), "no epsilon or delta; they are composed")
        try:
            text = canonical(dict(event))
        except (TypeError, ValueError):
            raise InputError("event", event, "finite JSON values") from None
        cells = {"what": "privacy", "from": party, "to": party, "t": t, "round": round}
        return self._enter(cells | {"kind": event.get("mechanism", "pair"), "event": text}).start

    def confirm(
        self,
        session: int,
        sequence: int,
        *,
        seconds: float = 0.0,
        joules: float = 0.0,
        sender: str | None = None,
        receiver: str | None = None,
        kind: str = "",
        t: float = 0.0,
        round: int = 0,
        note: str = "",
    ) -> int:
        """Enter what receiving a crossing cost its receiver: seconds and joules, never bytes.

        The row, a `confirm`, stands under the crossing's (session, sequence). Without `sender`
        and `receiver` these, kind and round are those of this ledger's own crossing.
        """
        if sender is None or receiver is None:
            table = self._columns
            mine = (table["session"] == session) & (table["sequence"] == sequence)
            found = np.flatnonzero(mine & (table["what"] == table.code("crossing")))
            if not len(found):
                allowed = "those of a crossing in this ledger, or sender and receiver as well"
                raise InputError("(session, sequence)", (session, sequence), allowed)
            row = table.row(int(found[-1]))
            sender, receiver, kind, round = row["from"], row["to"], row["kind"], row["round"]
        return self._enter(
            {"what": "confirm", "from": sender, "to": receiver, "kind": kind, "t": t}
            | {"seconds": seconds, "joules": joules, "round": round}
            | {"session": session, "sequence": sequence, "note": note}
        ).start

    def _enter(self, cells: Mapping[str, Any]) -> range:
        ids = self._columns.put(cells)
        self._write(ids)
        return ids

    def later(self, n: int, what: str, **cells: Any) -> None:
        """Enter n rows of `what` (crossing, work) that the caller knows to be sound.

        Cells as in `cross_many` and `work_many`, with `from` and `to` as `sender` and `receiver`;
        arrays may not change afterwards. Such blocks are checked, rounded and written together,
        a thousand rows at a time, and before anything is read or another row is entered.
        """
        cells["from"], cells["to"] = cells.pop("sender"), cells.pop("receiver")
        self._later.append((n, {"what": what, **cells}))
        self._waiting += n
        if self._waiting >= WAITING:
            _ = self._columns

    def _write(self, ids: range) -> None:
        if self._file is not None and ids:
            self._file.write(self._held.text(ids).encode("ascii"))

    def total(self, quantity: str, *, start: int = 0, **where: Any) -> int | float:
        """The sum of a quantity over the rows where the filters hold, as in `sums`."""
        return self.sums(quantity, (), start=start, **where).get((), 0)

    def sums(
        self, quantity: str, by: str | Sequence[str], *, start: int = 0, **where: Any
    ) -> dict[Any, int | float]:
        """Sums over the rows from id `start` on, for every value of the columns `by`.

        `quantity`: bytes, values, seconds, joules, money, flops, or rows (how many). `by`: one
        column (its values are the keys) or several (tuples are): what, sender or from,
        receiver or to, kind, note, round, session, sequence, direction. `where` filters by
        the same names: a value, a pattern with `*`, or a sequence of them.
        """
        return tally(self._columns, quantity, by, start, where)

    def rows(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """The rows from id `start` on, as the objects of the file's lines."""
        return (self._columns.row(i) for i in range(start, len(self)))

    def table(self) -> dict[str, Array]:
        """The columns as arrays; words as objects, a privacy event as its JSON text."""
        words = np.array(self._columns.words, dtype=object)
        columns: dict[str, Array] = {"id": np.arange(len(self))}
        for name in (*LINE, "event"):
            cells = self._columns[name]
            columns[name] = words[cells] if name in WORD else cells.copy()
        return columns

    def flush(self) -> None:
        """Hand everything entered so far to the operating system."""
        _ = self._columns
        if self._file is not None:
            self._file.flush()

    def length(self) -> int:
        """Bytes of the file with everything entered so far (flushed); 0 without a file."""
        self.flush()
        return self._file.tell() if self._file is not None else 0

    def close(self) -> None:
        """Flush and close the file."""
        _ = self._columns
        if self._file is not None:
            self._file.close()
            self._file = None

    @classmethod
    def read(cls, path: Path | str) -> Ledger:
        """A copy in memory of the file at `path`, also while it is being written.

        A last line without its end (a writer was killed, or still writes) is left out. Raises
        `InputError`, naming the line, for anything else that is not the next row.
        """
        ledger = cls()
        with open(path, "rb") as file:
            while lines := file.readlines(BLOCK << 8):
                ledger._columns.parse([line for line in lines if line.endswith(b"\n")])
        return ledger

    @classmethod
    def resume(cls, path: Path | str, length: int) -> Ledger:
        """Cut the file to `length` bytes, as `length()` gave them, and continue it."""
        size = os.path.getsize(path)
        if not 0 <= length <= size:
            raise InputError("length", length, f"0 to {size}, the length of the file")
        with open(path, "r+b") as file:
            file.seek(max(length - 1, 0))
            if length and file.read(1) != b"\n":
                raise InputError("length", length, "the end of a line")
            file.truncate(length)
        ledger = cls.read(path)
        ledger._file = open(path, "ab", buffering=1 << 16)  # noqa: SIM115
        return ledger

    @classmethod
    def merge(cls, *ledgers: Ledger, path: Path | str | None = None) -> Ledger:
        """One ledger of what several processes entered, in order of time.

        A row held by several counts once (as often as the one holding it most often has it),
        so merging is idempotent and its order does not matter. Bytes are entered by senders
        alone, so none is counted twice.
        """
        merged = cls(path)
        merged._held = union([ledger._columns for ledger in ledgers])
        for start in range(0, len(merged), BLOCK):
            ids = range(start, min(start + BLOCK, len(merged)))
            merged._write(ids)
        merged.flush()
        return merged
