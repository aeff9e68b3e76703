"""Who owns what: the training items of each client, and the items on which models are scored."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.run.config import Config
from isthmus.tasks.contract import Items, Splits, Task


class Clients(NamedTuple):
    """The pool of training items and each client's rows of it; the items that are scored, and each
    client's rows of those (None: they belong to nobody); the parties' names in the ledger."""

    train: Items
    parts: list[np.ndarray]
    scored: Items
    tests: list[np.ndarray] | None
    names: list[str]


def clients_of(config: Config, task: Task, splits: Splits) -> tuple[Config, Clients]:
    """Divide a task's items among the clients of a run; `partition` auto is written out.

    Without `holdout` the task's own test items (or those for validation) are scored, by owner where
    the partition is natural. With it the task's splits are put together again, and every
    client is scored on a share of its own items that nobody trains on.
    Raises `InputError` naming the partition when a client is left without items.
    """
    config = _scheme(config, task, splits)
    scheme = config.partition
    if config.holdout is not None:
        return config, _held_out(config, task, joined(splits))
    scored = splits.test if config.split == "test" else splits.val
    parts = task.partition(splits.train, config.clients, scheme, config.seed)
    _somebody(parts, scheme)
    if not scheme.startswith("natural"):
        few = np.arange(min(config.evaluate_items or len(scored), len(scored)))
        return config, Clients(splits.train, parts, scored.take(few), None, [])
    groups = np.array(splits.train.group)
    held = [set(groups[part].tolist()) for part in parts]
    theirs = np.array(scored.group)
    tests = [np.flatnonzero(np.isin(theirs, sorted(own))) for own in held]
    names = [f"client/{'+'.join(sorted(own))}" for own in held]
    if not any(map(len, tests)):
        return config, Clients(splits.train, parts, scored, None, names)
    return config, Clients(splits.train, parts, scored, _few(config, tests), names)


def _scheme(config: Config, task: Task, splits: Splits) -> Config:
    if config.partition != "auto":
        return config
    owners = set(splits.train.group)
    natural = task.card.problem == "language modelling" and config.clients <= len(owners)
    return config.model_copy(update={"partition": "natural" if natural else "iid"})


def _held_out(config: Config, task: Task, items: Items) -> Clients:
    """Every client's items in three: to train on, to choose by, to test on.

    Choosing (`split: val`) takes the same share again of what is not tested, and the test items are
    not touched; testing trains on everything else.
    """
    parts = task.partition(items, config.clients, config.partition, config.seed)
    assert config.holdout is not None  # only called with one
    train, tests = [], []
    for client, part in enumerate(parts):
        order = seeds.rng(config.seed, "holdout", client).permutation(part)
        cut = _share(len(order), config.holdout)
        test, rest = order[:cut], order[cut:]
        if config.split == "val":
            cut = _share(len(rest), config.holdout)
            test, rest = rest[:cut], rest[cut:]
        train.append(np.sort(rest))
        tests.append(np.sort(test))
    _somebody(train, config.partition)
    names: list[str] = []
    if config.partition.startswith("natural"):
        groups = np.array(items.group)
        names = [f"client/{'+'.join(sorted(set(groups[part].tolist())))}" for part in parts]
    return Clients(items, train, items, _few(config, tests), names)


def _share(size: int, share: float) -> int:
    """How many of `size` items are held out: at least one, and never all."""
    return min(max(1, round(size * share)), max(0, size - 1))


def _somebody(parts: list[np.ndarray], scheme: str) -> None:
    empty = [i for i, part in enumerate(parts) if not len(part)]
    if empty:
        allowed = f"one that gives client {empty[0]} some data (minimum=1, say)"
        raise InputError("partition", scheme, allowed)


def _few(config: Config, tests: list[np.ndarray]) -> list[np.ndarray]:
    return [part[: config.evaluate_items] for part in tests]


def joined(splits: Splits) -> Items:
    """All items of a task, training, validation and test in this order."""
    every = (splits.train, splits.val, splits.test)
    columns = {
        name: torch.cat([items.columns[name] for items in every]) for name in splits.train.columns
    }
    return Items(
        columns,
        [group for items in every for group in items.group],
        [domain for items in every for domain in items.domain],
    )
