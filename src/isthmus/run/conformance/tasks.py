"""The promises of a task."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from isthmus import seeds, tree
from isthmus.models import optim
from isthmus.models.bind import bind, tensors_of, trainable
from isthmus.run.conformance.promise import Line, demand, said
from isthmus.tasks.contract import Batch, Items, Role, Splits, Stage, Task, roles
from isthmus.tree import Tree

STEPS = 60
ITEMS = 96
"""Test items that are looked at."""

Data = Callable[[], Splits]


def task(task: Task) -> list[Line]:
    """Look at the smallest size of a task: its data, model, loss, metric and prediction."""
    data = cache(partial(task.synthesise, 0, "tiny"))
    return [
        said("same seed, same data", same_data, task),
        said("same seed, same model", same_model, task),
        said("every tensor has a role", all_roles, task),
        said("every item has one owner", partition, task, data),
        said("padding does not count", padding, task, data),
        said("one loss for one client and for many", vectorised, task, data),
        said("the loss falls", learns, task, data),
        said("the metric of the parts is that of the whole", merges, task, data),
        said("a bound model predicts as the model does", bound, task, data),
    ]


def same_data(task: Task) -> str:
    """Twice the same items, and the global generator is left alone."""
    before = torch.random.get_rng_state()
    one, two = (task.synthesise(3, "tiny") for _ in range(2))
    for name, a, b in zip(Splits._fields[:3], one[:3], two[:3], strict=True):
        same = tree.equal(a.columns, b.columns) and a.group == b.group and a.domain == b.domain
        demand(same, f"{name} differs between two calls")
    demand(torch.equal(before, torch.random.get_rng_state()), "the global generator was used")
    return ", ".join(f"{len(x)} {n}" for n, x in zip(Splits._fields[:3], one[:3], strict=True))


def same_model(task: Task) -> str:
    """Twice the same weights, and the global generator is left alone."""
    before = torch.random.get_rng_state()
    one, two = (tensors_of(task.build("tiny", 3)) for _ in range(2))
    demand(tree.equal(one, two), "the weights differ between two calls")
    demand(torch.equal(before, torch.random.get_rng_state()), "the global generator was used")
    return f"{sum(x.numel() for x in one.values()):,} numbers"


def all_roles(task: Task) -> str:
    """Each stage names a role for every tensor, and something is shared."""
    tensors = tensors_of(task.build("tiny", 0))
    stages = task.stages()
    demand(stages, "no stage")
    for stage in stages:
        given = roles(stage, tensors)
        demand(given.keys() == tensors.keys(), "the roles are not those of the model's tensors")
        strange = set(given.values()) - set(get_args(Role))
        demand(not strange, f"{', '.join(strange)} is no role")
        demand("shared" in given.values(), f"nothing is shared in stage {stage.name}")
    return f"{len(tensors)} tensors in {len(stages)} {'stage' if len(stages) == 1 else 'stages'}"


def partition(task: Task, data: Data) -> str:
    """Each training item is in exactly one part, and the parts depend on the seed alone."""
    items = data().train
    n = min(5, len(items))
    parts, again = (task.partition(items, n, "iid", seed=7) for _ in range(2))
    demand(len(parts) == n, f"{len(parts)} parts for {n} clients")
    demand(
        all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True)),
        "the same seed gives other parts",
    )
    owned = np.sort(np.concatenate(parts))
    demand(np.array_equal(owned, np.arange(len(items))), "an item has no owner, or several")
    return f"{len(items)} items over {n} clients"


def padding(task: Task, data: Data) -> str:
    """An item of weight 0 changes neither the loss nor the sums of the metric."""
    items, stage, model = data().train, task.stages()[0], task.build("tiny", 0).eval()
    real, padded = items.take(range(4)), items.take([0, 1, 2, 3, 5, 6])
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 0.0])
    found = []
    with torch.no_grad():
        for some, w in ((real, weight[:4]), (padded, weight)):
            found.append(
                (stage.loss(model, Batch(some.columns, w))[0], _sums(task, model, some, w))
            )
    (loss, sums), (padded_loss, padded_sums) = found
    close = partial(torch.allclose, rtol=1e-4, atol=1e-6)
    demand(close(loss, padded_loss), f"loss {float(loss):.6f}, padded {float(padded_loss):.6f}")
    for name, x in sums.items():
        demand(close(x, padded_sums[name]), f"{name} of the metric counts items of weight 0")
    return f"loss {float(loss):.4f} with and without it"


def vectorised(task: Task, data: Data) -> str:
    """The loss under `torch.vmap` is that of each client alone."""
    stage, model, items = task.stages()[0], task.build("tiny", 0), data().train
    held = {n: x for n, x in tensors_of(model).items() if x.is_floating_point()}
    clients = [{n: x * (1.0 + 0.01 * i) for n, x in held.items()} for i in range(3)]
    batches = [items.take(range(4 * i, 4 * i + 4)).columns for i in range(3)]
    weight, keys = torch.tensor([[1.0, 1, 1, 1], [1, 2, 0, 1], [1, 1, 0, 0]]), torch.arange(3)

    def loss(tensors: Tree, columns: Tree, w: Tensor, key: Tensor) -> Tensor:
        return stage.loss(bind(model, tensors, key=key), Batch(columns, w, key))[0]

    with torch.no_grad():
        many = torch.vmap(loss)(tree.stack(clients), tree.stack(batches), weight, keys)
        alone = torch.stack(
            [loss(*given) for given in zip(clients, batches, weight, keys, strict=True)]
        )
    off = float(((many - alone).abs() / alone.abs().clamp_min(1e-6)).max())
    demand(off < 1e-4, f"differs by {off:.1e} of the loss")
    return f"within {off:.0e} for three clients"


def learns(task: Task, data: Data) -> str:
    """Plain training of the first stage brings the loss of the same items down."""
    items, stage, model = data().train, task.stages()[0], task.build("tiny", 0)
    some = _some(items)
    batch = Batch(some.columns, torch.ones(len(some)))

    def loss(tensors: Tree) -> float:
        with torch.no_grad():
            return float(stage.loss(bind(model, tensors, key=batch.key), batch)[0])

    first, last = loss(tensors_of(model)), loss(fit(stage, model, items))
    demand(np.isfinite(last), f"from {first:.4f} to {last} in {STEPS} steps")
    demand(last < first, f"from {first:.4f} to {last:.4f} in {STEPS} steps")
    return f"from {first:.4f} to {last:.4f} in {STEPS} steps"


def fit(stage: Stage, model: nn.Module, items: Items) -> Tree:
    """All tensors after some steps of the stage's own optimiser, on batches of its own size."""
    rule = optim.parse(stage.optimiser, lr=stage.lr)
    tensors = tensors_of(model)
    given, asks = roles(stage, tensors), set(trainable(model))
    mine = [n for n in tensors if n in asks and given[n] in ("shared", "local")]
    state = rule.init({n: tensors[n] for n in mine})
    size = min(stage.batch_size, len(items))
    for step in range(STEPS):
        rows = seeds.permutation(seeds.key(1, "fit", step), len(items))[:size]
        key = torch.tensor(seeds.key(1, "step", step))
        batch = Batch(items.take(rows).columns, torch.ones(size), key)
        leaves = {n: tensors[n].detach().requires_grad_() for n in mine}
        loss, _ = stage.loss(bind(model, {**tensors, **leaves}, key=key), batch)
        got = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        grads = {
            n: torch.zeros_like(leaves[n]) if g is None else g
            for n, g in zip(mine, got, strict=True)
        }
        with torch.no_grad():
            new, state = rule.update(grads, state, {n: tensors[n] for n in mine})
        tensors = {**tensors, **new}
        if stage.follow is not None:
            tensors = {**tensors, **stage.follow(tensors)}
    return tensors


def merges(task: Task, data: Data) -> str:
    """Sums of three parts, merged in every order, finish as one pass over all of them."""
    items, model = _some(data().test), task.build("tiny", 0).eval()
    weight = 0.5 + torch.arange(len(items)) % 3
    cut = np.array_split(np.arange(len(items)), [len(items) // 5, len(items) // 2])
    with torch.no_grad():
        parts = [_sums(task, model, items.take(rows), weight[rows]) for rows in cut]
        whole = task.metric.finish(_sums(task, model, items, weight))
    for a, b, c in itertools.permutations(parts):
        merged = task.metric.finish(task.metric.merge(task.metric.merge(a, b), c))
        demand(merged.keys() == whole.keys(), "the values have other names")
        for name, value in whole.items():
            near = np.isclose(merged[name], value, rtol=1e-5, atol=1e-8, equal_nan=True)
            demand(near, f"{name}: {merged[name]:.6g} merged, {value:.6g} of the whole")
    primary = task.metric.primary
    demand(primary in whole, f"primary is {primary}, which is none of {', '.join(whole)}")
    return f"{primary} {whole[primary]:.4g} before training"


def bound(task: Task, data: Data) -> str:
    """Predicting with named tensors bound to a model is predicting with a model that holds them."""
    inputs = task.inputs(_some(data().test).take(range(4)).columns)
    one, two = task.build("tiny", 0).eval(), task.build("tiny", 1).eval()
    tensors = {n: x * 1.25 if x.is_floating_point() else x for n, x in tensors_of(one).items()}
    with torch.no_grad():
        before = _leaves(task.predict(one, inputs))
        through = _leaves(task.predict(bind(two, tensors), inputs))
        for name, x in tensors_of(one).items():
            x.copy_(tensors[name])
        plain = _leaves(task.predict(one, inputs))
    same = all(torch.equal(a, b) for a, b in zip(through, plain, strict=True))
    demand(plain and same, "the outputs differ: predict must use the model that it is given")
    alike = all(torch.equal(a, b) for a, b in zip(before, plain, strict=True))
    demand(not alike, "the outputs do not depend on the model's tensors")
    return f"outputs {', '.join(str(list(x.shape)) for x in plain)}"


def _some(items: Items) -> Items:
    """Items spread over all of them."""
    return items.take(range(0, len(items), -(-len(items) // ITEMS)))


def _sums(task: Task, model: nn.Module, items: Items, weight: Tensor) -> Tree:
    outputs = task.predict(model, task.inputs(items.columns))
    return task.metric.update(task.metric.init(), outputs, task.targets(items.columns), weight)


def _leaves(outputs: Any) -> list[Tensor]:
    """The tensors of outputs: one, or several in a tuple, list or dict."""
    if isinstance(outputs, Tensor):
        return [outputs]
    inner = outputs.values() if isinstance(outputs, dict) else outputs
    return [leaf for part in inner for leaf in _leaves(part)]
