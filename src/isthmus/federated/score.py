"""How good the models are: the shared one, or each client's own, on test items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from isthmus import tree
from isthmus.federated.round import Federation
from isthmus.learn.recalibrate import recalibrate
from isthmus.models.bind import bind
from isthmus.tasks.contract import Items, Task
from isthmus.tree import Tree

BATCH = 256
"""Items scored at a time; language models see fewer (see `rows_at_once`)."""
TOKENS = 4096


def rows_at_once(items: Items) -> int:
    """How many items a scoring batch holds: fewer where an item is a row of tokens."""
    first = next(iter(items.columns.values()))
    tokens = first.shape[1] if first.ndim == 2 and not first.is_floating_point() else 1
    return max(1, min(BATCH, TOKENS // tokens))


def model_of(fed: Federation, kept: Tree) -> Tree:
    """All tensors of the model that counts for a client that keeps `kept`."""
    own = {name: kept[name] for name in fed.method.names.local}
    return {**fed.ground.base, **fed.method.base(fed.state), **fed.method.served(fed.state), **own}


def recalibrated(fed: Federation, task: Task, tensors: Tree, clients: Iterable[int]) -> Tree:
    """`tensors` with the statistics that the training items of `clients` give for these weights.

    Every client adds the sums of its own batches. This belongs to measuring a model, not to the
    protocol, so nothing is entered in the ledger.
    """
    names = fed.method.names.recalibrate
    if not names:
        return tensors

    def batches() -> Iterator[tuple[Tree, int]]:
        for client in clients:
            rows = fed.ground.owned.rows(client)
            for part in np.array_split(rows, max(1, -(-len(rows) // BATCH))):
                index = torch.from_numpy(part)
                columns = {name: x[index] for name, x in fed.ground.columns.items()}
                yield task.inputs(columns), len(part)

    fresh = recalibrate(fed.ground.module, tensors, names, task.predict, batches())
    return {**tensors, **fresh}


def personal(fed: Federation) -> bool:
    """True when clients predict with models of their own."""
    return bool(fed.method.names.local)


def evaluate(
    task: Task, method: Any, module: nn.Module, tensors: Tree, items: Items, kept: Tree
) -> Tree:
    """The sums of the task's metric for one model over all `items`."""
    bound = bind(module, tensors).eval()
    state = task.metric.init()
    step = rows_at_once(items)
    with torch.no_grad():
        for start in range(0, len(items), step):
            batch = {name: x[start : start + step] for name, x in items.columns.items()}
            outputs = method.predict(task, bound, task.inputs(batch), None, kept)
            weight = torch.ones(len(next(iter(batch.values()))))
            state = task.metric.update(state, outputs, task.targets(batch), weight)
    return state


def score(
    fed: Federation, task: Task, items: Items, parts: Sequence[np.ndarray] | None, split: str
) -> Iterator[dict[str, Any]]:
    """Rows of metrics: `global` over everything, and `client/i` where clients have test items.

    A method whose clients keep tensors of their own is scored with each client's own model, on
    its own items (on all items when these have no owners); `global` is then the sum over the
    clients.
    """
    where = {"round": fed.round, "t": fed.now, "split": split}
    own = personal(fed)
    everyone = range(len(fed.ground.owned))
    shared = {} if own else recalibrated(fed, task, model_of(fed, {}), everyone)
    clients = everyone if own or parts is not None else ()
    total = task.metric.init()
    rows: list[dict[str, Any]] = []
    for client in clients:
        mine = items if parts is None else items.take(parts[client])
        if not len(mine):
            continue
        kept = tree.row(fed.store.get(np.array([client])), 0) if own else {}
        model = recalibrated(fed, task, model_of(fed, kept), [client]) if own else shared
        sums = evaluate(task, fed.method, fed.ground.module, model, mine, kept)
        total = task.metric.merge(total, sums)
        rows.append(
            {**where, "scope": fed.named(np.array([client]))[0], **task.metric.finish(sums)}
        )
    if not rows:
        total = evaluate(task, fed.method, fed.ground.module, shared, items, {})
    yield {**where, "scope": "global", **task.metric.finish(total)}
    yield from rows
