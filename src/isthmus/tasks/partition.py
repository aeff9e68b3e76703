"""Who owns which item: the divisions of a data set among n clients.

Every scheme gives each index to exactly one client, in a list of sorted int64 arrays, and is a
pure function of its arguments. `dirichlet` is the label skew of Hsu, Qi and Brown ("Measuring
the effects of non-identical data distribution", arXiv:1909.06335, section 3, in the variant that
divides each class over the clients); `shards` that of McMahan et al. ("Communication-efficient
learning of deep networks from decentralized data", AISTATS 2017, section 3).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from isthmus import seeds
from isthmus.errors import InputError, unknown

Parts = list[np.ndarray]

REDRAWS = 100
"""Dirichlet draws tried before the smallest clients are topped up."""


def iid(n: int, seed: int, *, size: int, minimum: int = 1) -> Parts:
    """A random order cut into n parts whose sizes differ by at most 1."""
    _possible(size, n, minimum)
    return _sorted(np.array_split(seeds.rng(seed, "iid", n).permutation(size), n))


def dirichlet(
    n: int, seed: int, *, labels: np.ndarray, alpha: float = 0.3, minimum: int = 1
) -> Parts:
    """Each class is divided over the clients in proportions from Dirichlet(alpha, ..., alpha).

    Redrawn until every client has `minimum` items; after 100 draws the smallest client takes
    one random item after the other from the largest. Raises `InputError` when n * minimum
    exceeds the number of items.
    """
    if not alpha > 0:
        raise InputError("alpha", alpha, "above 0")
    _possible(len(labels), n, minimum)
    rng = seeds.rng(seed, "dirichlet", n)
    owner = np.empty(len(labels), dtype=np.int64)
    for _ in range(REDRAWS):
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            ends = np.cumsum(rng.dirichlet(np.full(n, alpha))) * len(members)
            owner[members] = np.minimum(np.searchsorted(ends, np.arange(len(members)) + 0.5), n - 1)
        if np.bincount(owner, minlength=n).min() >= minimum:
            break
    sizes = np.bincount(owner, minlength=n)
    while sizes.min() < minimum:
        poor, rich = sizes.argmin(), sizes.argmax()
        owner[rng.choice(np.flatnonzero(owner == rich))] = poor
        sizes[poor], sizes[rich] = sizes[poor] + 1, sizes[rich] - 1
    return _by_owner(owner, n)


def shards(
    n: int, seed: int, *, labels: np.ndarray, per_client: int = 2, minimum: int = 1
) -> Parts:
    """The items sorted by class, cut into n * per_client shards, per_client of them to each.

    Items of one class are shuffled first, so most clients see about `per_client` classes.
    """
    if per_client < 1:
        raise InputError("per_client", per_client, "1 or more")
    _possible(len(labels), n, minimum)
    smallest = len(labels) // (n * per_client) * per_client
    if smallest < minimum:
        raise InputError("minimum", minimum, f"{smallest} or less with {per_client} shards each")
    rng = seeds.rng(seed, "shards", n)
    shuffled = rng.permutation(len(labels))
    pieces = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], n * per_client)
    hands = rng.permutation(n * per_client).reshape(n, per_client)
    return _sorted([np.concatenate([pieces[i] for i in hand]) for hand in hands])


def natural(n: int, seed: int, *, groups: Sequence[str], minimum: int = 1) -> Parts:
    """One client per group, in the order of first appearance when n equals their number.

    With fewer clients than groups, whole groups are dealt out: in random order of equals,
    largest first, each to the client with the fewest items. `minimum` is checked, not repaired:
    a group is never divided.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if n > len(names):
        raise InputError("clients", n, f"{len(names)} or fewer, the number of groups")
    _possible(len(groups), n, minimum)
    counts = np.bincount(index)
    if n == len(names):
        first = np.unique(index, return_index=True)[1]
        client = np.empty(n, dtype=np.int64)
        client[np.argsort(first)] = np.arange(n)
    else:
        client, load = np.empty(len(names), dtype=np.int64), np.zeros(n, dtype=np.int64)
        order = seeds.rng(seed, "natural", n).permutation(len(names))
        for group in order[np.argsort(-counts[order], kind="stable")]:
            client[group] = load.argmin()
            load[client[group]] += counts[group]
    parts = _by_owner(client[index], n)
    smallest = min(len(part) for part in parts)
    if smallest < minimum:
        raise InputError("minimum", minimum, f"{smallest} or less, the smallest client's items")
    return parts


SCHEMES = {"iid": iid, "dirichlet": dirichlet, "shards": shards, "natural": natural}
_FIRST = {"iid": "minimum", "dirichlet": "alpha", "shards": "per_client", "natural": "minimum"}


class Scheme(NamedTuple):
    """A scheme's name and its options."""

    name: str
    options: dict[str, float]


def parse(text: str) -> Scheme:
    """A scheme in one word, its first option with or without a name.

    >>> parse("dirichlet:0.3,minimum=12")
    Scheme(name='dirichlet', options={'alpha': 0.3, 'minimum': 12})
    >>> parse("iid")
    Scheme(name='iid', options={})
    """
    name, _, rest = text.strip().partition(":")
    if name not in SCHEMES:
        raise unknown("partition", name, SCHEMES)
    signature = inspect.signature(SCHEMES[name]).parameters
    allowed = [k for k, p in signature.items() if p.default is not inspect.Parameter.empty]
    options: dict[str, float] = {}
    for place, part in enumerate(filter(None, rest.split(","))):
        left, equals, right = (side.strip() for side in part.partition("="))
        key, value = (left, right) if equals else (_FIRST[name], left)
        if key not in allowed or (place and not equals):
            raise unknown(f"option of {name}", key, allowed)
        try:
            options[key] = float(value) if key == "alpha" else int(value)
        except ValueError:
            raise InputError(key, value, "a number" if key == "alpha" else "an integer") from None
    return Scheme(name, options)


def partition(
    n: int,
    scheme: str,
    seed: int,
    *,
    labels: np.ndarray | None = None,
    groups: Sequence[str] = (),
    **options: float,
) -> Parts:
    """The parts of n clients by `scheme`: a name, or a text for `parse`; `options` go first.

    Raises `InputError` for impossible demands and for label skew without one class per item.
    """
    if n < 1:
        raise InputError("clients", n, "1 or more")
    name, parsed = parse(scheme)
    given: dict[str, Any] = {**parsed, **options}
    if name in ("dirichlet", "shards"):
        if labels is None:
            raise InputError("partition", name, "iid, natural: items have no single class")
        given["labels"] = np.asarray(labels)
    elif name == "natural":
        given["groups"] = groups
    else:
        given["size"] = len(groups)
    allowed = inspect.signature(SCHEMES[name]).parameters
    for key in given:
        if key not in allowed:
            raise unknown(f"option of {name}", key, [k for k in allowed if k not in ("n", "seed")])
    return SCHEMES[name](n, seed, **given)


def _possible(size: int, n: int, minimum: int) -> None:
    if n * minimum > size:
        raise InputError("minimum", minimum, f"{size // n} or less: {size} items over {n} clients")


def _sorted(parts: Sequence[np.ndarray]) -> Parts:
    return [np.sort(part).astype(np.int64) for part in parts]


def _by_owner(owner: np.ndarray, n: int) -> Parts:
    return [np.flatnonzero(owner == client) for client in range(n)]
