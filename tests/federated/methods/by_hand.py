"""Hand loops in plain torch over the items that a visit really sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tests.federated import tiny
from torch import Tensor, nn

from isthmus import seeds, tree
from isthmus.contracts import Updates
from isthmus.federated.cohort import Cohort, Done, Executor, Ground
from isthmus.federated.method import Method
from isthmus.federated.round import Federation
from isthmus.federated.score import models_of
from isthmus.learn.plan import shuffled_epochs
from isthmus.models.bind import bind, tensors_of
from isthmus.tree import Tree

TASK = tiny.task()
SIZES = torch.tensor(tiny.RAGGED, dtype=torch.float64)
BODY, HEAD = ("features.lower.weight", "features.lower.bias"), ("head.weight", "head.bias")
ALL = (*BODY, *HEAD)

Loss = Callable[[Tree, Tensor, Tensor], Tensor]


def initial(task: Any = TASK) -> Tree:
    return tree.clone(tensors_of(task.build(seed=0)))


def logits(w: Tree, x: Tensor) -> Tensor:
    """The tiny net, written out."""
    z = torch.tanh(x @ w[BODY[0]].T + w[BODY[1]])
    return z @ w[HEAD[0]].T + w[HEAD[1]]


def entropy(w: Tree, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits(w, x), y)


def gradient(loss: Loss, w: Tree, x: Tensor, y: Tensor, names: Sequence[str] = ()) -> Tree:
    """The gradient for these names (all, where none are given)."""
    names = names or tuple(w)
    leaves = {n: w[n].detach().clone().requires_grad_() for n in names}
    got = torch.autograd.grad(loss({**w, **leaves}, x, y), list(leaves.values()))
    return dict(zip(names, got, strict=True))


def key_of(fed: Federation, round: int, client: int, phase: int = 0, what: str = "visit") -> int:
    visit = int(seeds.keys(seeds.key(fed.seed, what, round), [client])[0])
    return int(seeds.fold(visit, phase))


def batches(
    fed: Federation, key: int, client: int, epochs: int = 1, batch: int = 8
) -> list[tuple[Tensor, Tensor]]:
    """The batches of a phase, from its key alone; `batch` 0 is all items, once an epoch."""
    rows = torch.from_numpy(fed.ground.owned.rows(client))
    x, y = fed.ground.columns["x"], fed.ground.columns["y"]
    if batch == 0:
        return [(x[rows], y[rows])] * epochs
    plan = shuffled_epochs(key, len(rows), epochs, batch)
    parts = [rows[i[w > 0]] for i, w in zip(plan.index, plan.weight, strict=True)]
    return [(x[part], y[part]) for part in parts]


def descend(
    w: Tree,
    parts: Sequence[tuple[Tensor, Tensor]],
    names: Sequence[str] = (),
    lr: float = 0.1,
    loss: Loss = entropy,
) -> Tree:
    """Plain SGD on these names."""
    for x, y in parts:
        g = gradient(loss, w, x, y, names)
        w = {n: t - lr * g[n] if n in g else t for n, t in w.items()}
    return w


def mean(models: Sequence[Tree], weights: Tensor = SIZES) -> Tree:
    return tree.weighted_mean(tree.stack(models), weights / weights.sum())


def only(w: Tree, names: Sequence[str]) -> Tree:
    return {n: w[n] for n in names}


class Watched:
    """An executor that remembers every upload."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.uploads: list[Updates] = []

    def params(self, method: Method, ground: Ground, cohort: Cohort) -> Tree:
        return self.inner.params(method, ground, cohort)

    def run(self, method: Method, ground: Ground, cohort: Cohort) -> Done:
        done = self.inner.run(method, ground, cohort)
        self.uploads.append(done.updates)
        return done


def crossed(fed: Federation, rounds: int) -> tuple[set[str], set[str], list[Updates]]:
    """Play some rounds: the names that went down and up, and the uploads."""
    fed.executor = watched = Watched(fed.executor)
    down: set[str] = set()
    send = fed.path.down

    def spy(sent: Sequence[Tree], *rest: Any) -> Any:
        down.update(name for one in sent for name in one)
        return send(sent, *rest)

    fed.path.down = spy  # type: ignore[method-assign]
    for _ in range(rounds):
        fed.step()
    up: set[str] = set()
    for u in watched.uploads:
        up |= {*u.delta, *u.values, *u.buffers, *u.scalars}
    return down, up, watched.uploads


def bytes_of(w: Tree, names: Sequence[str]) -> int:
    return tree.nbytes(only(w, names))


def each(fed: Federation, moment: Any = "mixed") -> list[Tree]:
    """All tensors of the model with which each client predicts."""
    everyone = torch.arange(len(fed.ground.owned)).numpy()
    return list(models_of(fed, everyone, fed.store.get(everyone), moment))


def said(fed: Federation, client: int, tensors: Tree, x: Tensor, task: Any = TASK) -> Tensor:
    """What a client's model predicts."""
    bound = bind(fed.ground.module, tensors).eval()
    kept = tree.row(tiny.kept(fed), client)
    return fed.method.predict(task, bound, {"x": x}, None, kept)


def alike(clients: int = 3, items: int = 12) -> Any:
    """A task in which all clients hold the same items."""
    x, y = tiny.data((items,), torch.float64)
    data = (x.repeat(clients, 1), y.repeat(clients))
    return tiny.task((items,) * clients, data=data)
