"""Sums over a ledger's rows, by any of its columns and by direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import numpy as np

from isthmus.errors import unknown
from isthmus.wire.columns import INTS, WORD, WORDS, Array, Columns

HEIGHT: Mapping[str, int] = {"edge": 1, "server": 2, "cloud": 3}
"""How high a party stands, by the first word of its name; any other party is a device, at 0."""

DIRECTIONS = ("across", "up", "down", "local")
QUANTITIES = ("bytes", "values", "seconds", "joules", "money", "flops", "rows")


def direction(sender: str, receiver: str) -> str:
    """`up` towards the edge, the server or the cloud, `down` away from it, else `across`.

    >>> direction("client/3", "server"), direction("server", "edge/1"), direction("a", "b")
    ('up', 'down', 'across')
    """
    if sender == receiver:
        return "local"
    return DIRECTIONS[int(np.sign(_height(receiver) - _height(sender))) % 3]


def tally(
    table: Columns, quantity: str, by: str | Sequence[str], start: int, where: Mapping[str, Any]
) -> dict[Any, int | float]:
    """Sums of `quantity` over the rows from `start` on where `where` holds, for every value of
    `by`; see `Ledger.sums`."""
    if quantity not in QUANTITIES:
        raise unknown("quantity", quantity, QUANTITIES)
    cells = (np.ones(table.rows, np.int64) if quantity == "rows" else table[quantity])[start:]
    keep = np.ones(len(cells), bool)
    for name, wanted in where.items():
        codes, names = _labels(table, name, start)
        keep &= np.isin(codes, [i for i, label in enumerate(names) if _meets(label, wanted)])
    columns: list[tuple[Array, Sequence[Any]]] = []
    group = np.zeros(int(keep.sum()), np.int64)
    for name in (by,) if isinstance(by, str) else by:
        codes, names = _labels(table, name, start)
        columns.append((codes[keep], names))
        group = np.unique(group * len(names) + codes[keep], return_inverse=True)[1]
    if not len(group):
        return {}
    order = np.argsort(group, kind="stable")
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    sums: list[int | float] = np.add.reduceat(cells[keep][order], first).tolist()
    keys: list[tuple[Any, ...]] = [
        tuple(names[int(codes[i])] for codes, names in columns) for i in order[first].tolist()
    ]
    found = sorted(zip(keys, sums, strict=True))
    return {key[0] if isinstance(by, str) else key: value for key, value in found}


def _labels(table: Columns, name: str, start: int) -> tuple[Array, Sequence[Any]]:
    """A column from row `start` on as small codes, and what each code stands for."""
    name = {"sender": "from", "receiver": "to"}.get(name, name)
    if name == "direction":
        height = np.array([_height(word) for word in table.words])
        sender, receiver = table["from"][start:], table["to"][start:]
        rise = np.sign(height[receiver] - height[sender]) % 3
        return np.where(sender == receiver, DIRECTIONS.index("local"), rise), DIRECTIONS
    if name in WORD:
        return table[name][start:], table.words
    if name in INTS:
        values, codes = np.unique(table[name][start:], return_inverse=True)
        return codes, values.tolist()
    raise unknown("column", name, (*WORDS, *INTS, "sender", "receiver", "direction"))


def _height(party: str) -> int:
    return HEIGHT.get(party.partition("/")[0], 0)


def _meets(label: Any, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return fnmatchcase(str(label), wanted) if "*" in wanted else label == wanted
    if isinstance(wanted, int):
        return label == wanted
    return any(_meets(label, one) for one in cast("Sequence[Any]", wanted))
