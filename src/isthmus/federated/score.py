"""How good the models are: the shared one, or each client's own, on test items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from isthmus import seeds, tree
from isthmus.federated.cohort import Cohort
from isthmus.federated.round import Federation
from isthmus.learn.recalibrate import recalibrate
from isthmus.models.bind import bind
from isthmus.tasks.contract import Items, Task
from isthmus.tree import Tree

Moment = Literal["mixed", "trained"]
"""When a model is scored: just after the server has mixed, or just after local training."""

CROWD = 64
"""Clients whose own models are in memory at a time."""

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


def personal(fed: Federation, moment: Moment = "mixed") -> bool:
    """True when clients predict with models of their own."""
    method = fed.method
    if method.gathers:  # clients train nothing
        return False
    return bool(moment == "trained" or method.names.local or fed.apart or method.phases("score"))


def models_of(
    fed: Federation, clients: np.ndarray, kept: Tree, moment: Moment = "mixed"
) -> Iterator[Tree]:
    """All tensors of the model with which each of these clients predicts.

    Just after the server has mixed (`mixed`), these come from what the server would send, what the
    client keeps and the method's `score` phases; or (`trained`) from the local training with which
    the next round would begin. Measuring is not part of the protocol: nothing is entered in the
    ledger, and neither server nor client is changed.
    """
    method = fed.method
    fixed = {**fed.ground.base, **method.base(fed.state)}
    if moment == "mixed" and not method.phases("score") and not fed.apart:
        yield from (model_of(fed, tree.row(kept, i)) for i in range(len(clients)))
        return
    key = seeds.key(fed.seed, "visit" if moment == "trained" else "score", fed.round + 1)
    fed.ground.base.update(method.base(fed.state))
    cohort = Cohort(
        clients=clients,
        keys=seeds.keys(key, clients),
        ranks=fed.ranks[clients],
        versions=np.full(len(clients), fed.round),
        round=fed.round + 1,
        lr=fed.lr(fed.round + 1),
        downs=fed.downloads(clients),
        kept=kept,
        purpose="train" if moment == "trained" else "score",
    )
    params = fed.executor.params(method, fed.ground, cohort)
    yield from ({**fixed, **tree.row(params, i)} for i in range(len(clients)))


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
    fed: Federation,
    task: Task,
    items: Items,
    parts: Sequence[np.ndarray] | None,
    split: str,
    moment: Moment = "mixed",
) -> Iterator[dict[str, Any]]:
    """Rows of metrics: `global` over everything, and `client/i` where clients have test items.

    Where clients predict with models of their own, each is scored on its own items (on all items
    when these have no owners); `global` is then the sum over the clients.
    """
    where = {"round": fed.round, "t": fed.now, "split": split}
    own = personal(fed, moment)
    everyone = np.arange(len(fed.ground.owned))
    if parts is not None:
        everyone = everyone[[len(part) > 0 for part in parts]]
    total = task.metric.init()
    rows: list[dict[str, Any]] = []

    def enter(client: int, tensors: Tree, kept: Tree) -> None:
        nonlocal total
        mine = items if parts is None else items.take(parts[client])
        sums = evaluate(task, fed.method, fed.ground.module, tensors, mine, kept)
        total = task.metric.merge(total, sums)
        scope = fed.named(np.array([client]))[0]
        rows.append({**where, "scope": scope, **task.metric.finish(sums)})

    if own:
        for some in np.array_split(everyone, max(1, -(-len(everyone) // CROWD))):
            kept = fed.store.get(some)
            models = models_of(fed, some, kept, moment)
            for i, (client, tensors) in enumerate(zip(some.tolist(), models, strict=True)):
                enter(client, recalibrated(fed, task, tensors, [client]), tree.row(kept, i))
    else:
        shared = recalibrated(fed, task, model_of(fed, {}), range(len(fed.ground.owned)))
        for client in everyone.tolist() if parts is not None else ():
            enter(client, shared, {})
        if not rows:
            total = evaluate(task, fed.method, fed.ground.module, shared, items, {})
    yield {**where, "scope": "global", **task.metric.finish(total)}
    yield from rows
