"""What every task promises, run on each task of the catalogue and on one made by `Task.of`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from isthmus import catalogue, seeds
from isthmus.models import optim
from isthmus.models.bind import bind, tensors_of
from isthmus.models.nets import mlp
from isthmus.tasks.contract import Role, Task, roles
from isthmus.tasks.items import Batch, Items, Splits
from isthmus.tasks.own import find
from isthmus.tree import equal, stack

STEPS = 90


def _rings() -> Task:
    """Two features, three classes by distance from the middle, six owners."""
    draw = seeds.generator(5, "rings")
    x = torch.randn(600, 2, generator=draw)
    y = torch.bucketize(x.norm(dim=1), torch.tensor([0.8, 1.5]))
    owners = [f"o{i % 6}" for i in range(480)]
    return Task.of(
        lambda seed: mlp([2, 24, 3], "tanh", seed),
        (x[:480], y[:480]),
        (x[480:], y[480:]),
        owner=owners,
        lr=0.3,
    )


@pytest.fixture(scope="module", params=["own", *catalogue.names("task")])
def task(request: pytest.FixtureRequest) -> Task:
    return _rings() if request.param == "own" else find(request.param)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def splits(task: Task) -> Splits:
    """The tiny data, at most 120 test items spread over all of them."""
    whole = task.synthesise(0, "tiny")
    return whole._replace(
        test=whole.test.take(range(0, len(whole.test), -(-len(whole.test) // 120)))
    )


def same(a: Items, b: Items) -> bool:
    return equal(a.columns, b.columns) and a.group == b.group and a.domain == b.domain


def fit(task: Task, items: Items, steps: int = STEPS) -> tuple[nn.Module, list[float]]:
    """Plain central training of the first stage; the trained model and the loss of every step."""
    stage = task.stages()[0]
    optimiser = optim.parse(stage.optimiser, lr=stage.lr)
    model = task.build("tiny", 0)
    tensors = tensors_of(model)
    given = roles(stage, tensors)
    names = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and given[n] in ("shared", "local")
    ]
    state, losses = optimiser.init({n: tensors[n] for n in names}), []
    size = min(stage.batch_size, len(items))
    for step in range(steps):
        index = seeds.permutation(seeds.key(1, "fit", step), len(items))[:size]
        batch = Batch(items.take(index).columns, torch.ones(size), torch.tensor(step))
        params = {n: tensors[n].detach().requires_grad_() for n in names}
        loss, _ = stage.loss(bind(model, tensors | params), batch)
        grads = dict(zip(names, torch.autograd.grad(loss, list(params.values())), strict=True))
        with torch.no_grad():
            new, state = optimiser.update(grads, state, params)
        tensors |= new
        losses.append(float(loss.detach()))
    return bind(model, tensors), losses


def score(task: Task, model: nn.Module, items: Items) -> float:
    with torch.no_grad():
        outputs = task.predict(model.eval(), task.inputs(items.columns))
    state = task.metric.update(
        task.metric.init(), outputs, task.targets(items.columns), torch.ones(len(items))
    )
    return task.metric.finish(state)[task.metric.primary]


def better(task: Task, a: float, b: float) -> bool:
    return a > b if task.metric.higher_is_better else a < b


def test_same_seed_same_bytes_other_seed_other_items(task: Task) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (task.synthesise(seed, "tiny") for seed in (3, 3, 4))
    assert all(same(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not all(same(a, b) for a, b in zip(first[:3], other[:3], strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_splits_are_disjoint(splits: Splits) -> None:
    def rows(items: Items) -> list[bytes]:
        return [
            b"|".join(c[i].numpy().tobytes() for c in items.columns.values())
            for i in range(len(items))
        ]

    train, val, test = (set(rows(part)) for part in splits[:3])
    assert train and val and test
    assert not (train & val or train & test or val & test)


def test_build_is_a_function_of_its_seed(task: Task) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (task.build("tiny", seed).state_dict() for seed in (3, 3, 4))
    assert equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not equal(first, other)


def test_roles_partition_the_names(task: Task) -> None:
    for stage in task.stages():
        tensors = tensors_of(task.build("tiny", 0))
        given = roles(stage, tensors)
        assert given.keys() == tensors.keys()
        assert set(given.values()) <= set(get_args(Role))
        assert "shared" in given.values()
        assert all(tensors[n].is_floating_point() for n, role in given.items() if role == "shared")


def test_training_beats_the_trivial_predictor_and_shuffled_targets(
    task: Task, splits: Splits
) -> None:
    model, losses = fit(task, splits.train)
    assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:5])

    order = seeds.permutation(seeds.key(2, "shuffle"), len(splits.train))
    swapped = {name: splits.train.columns[name][order] for name in task.target_names}
    shuffled, _ = fit(task, Items(splits.train.columns | swapped))

    trained = score(task, model, splits.test)
    assert better(task, trained, score(task, shuffled, splits.test))
    assert better(task, trained, _trivial(task, splits))


def _trivial(task: Task, splits: Splits) -> float:
    """The score of the constant that suits the training targets best."""
    target = splits.train.columns[task.target_names[0]]
    with torch.no_grad():
        outputs = task.predict(task.build("tiny", 0), task.inputs(splits.test.columns))
    if target.is_floating_point():
        constant = target.mean(0)
    else:
        seen = target[target >= 0].reshape(-1)
        constant = (torch.bincount(seen, minlength=outputs.shape[-1]) + 1e-3).log()
    state = task.metric.update(
        task.metric.init(),
        constant.expand(outputs.shape),
        task.targets(splits.test.columns),
        torch.ones(len(splits.test)),
    )
    return task.metric.finish(state)[task.metric.primary]


def test_padding_has_no_effect_on_loss_and_metric(task: Task, splits: Splits) -> None:
    model, stage = task.build("tiny", 0), task.stages()[0]
    real, padded = splits.train.take(range(4)), splits.train.take([0, 1, 2, 3, 7, 8])
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 0.0])
    values, states = [], []
    for items, w in ((real, weight[:4]), (padded, weight), (padded, torch.ones(6))):
        values.append(stage.loss(model, Batch(items.columns, w))[0].detach())
        outputs = task.predict(model, task.inputs(items.columns))
        states.append(
            task.metric.update(task.metric.init(), outputs, task.targets(items.columns), w)
        )
    torch.testing.assert_close(values[0], values[1])
    assert not torch.allclose(values[0], values[2])
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name])
    assert any(not torch.allclose(states[0][name], states[2][name]) for name in states[0])


def test_merge_over_clients_equals_the_union(task: Task, splits: Splits) -> None:
    items, metric = splits.test, task.metric
    parts = task.partition(items, 3, "iid", seed=7)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(items)))
    weight = 0.5 + torch.arange(len(items)) % 3
    model = task.build("tiny", 0).eval()
    with torch.no_grad():
        outputs = task.predict(model, task.inputs(items.columns))

    def state_of(index: np.ndarray) -> dict[str, torch.Tensor]:
        part = items.take(index)
        return metric.update(
            metric.init(), outputs[index], task.targets(part.columns), weight[index]
        )

    a, b, c = (state_of(part) for part in parts)
    union = metric.finish(state_of(np.arange(len(items))))
    for order in itertools.permutations([a, b, c]):
        merged = metric.finish(metric.merge(metric.merge(*order[:2]), order[2]))
        assert merged == pytest.approx(union, rel=1e-9)
    assert metric.finish(metric.merge(a, metric.init())) == metric.finish(a)
    for state in (a, metric.init()):
        assert {x.dtype for x in state.values()} <= {torch.float64, torch.int64}


def test_state_dict_round_trip(task: Task) -> None:
    one, two = task.build("tiny", 0).eval(), task.build("tiny", 1).eval()
    with torch.no_grad():
        for p in two.parameters():
            p.mul_(0.5)
    inputs = task.probe("tiny")
    with torch.no_grad():
        expected = task.predict(one, inputs)
        assert not torch.equal(task.predict(two, inputs), expected)
        two.load_state_dict(one.state_dict())
        assert torch.equal(task.predict(two, inputs), expected)


def test_predict_on_a_bound_module_equals_predict_on_the_module(task: Task, splits: Splits) -> None:
    inputs = task.inputs(splits.test.take(range(5)).columns)
    one, two = task.build("tiny", 0).eval(), task.build("tiny", 1).eval()
    tensors = {n: x * 1.25 if x.is_floating_point() else x for n, x in tensors_of(one).items()}
    with torch.no_grad():
        bound = task.predict(bind(two, tensors), inputs)
        untouched = task.predict(one, inputs)
        for name, x in tensors_of(one).items():
            x.copy_(tensors[name])
        assert torch.equal(bound, task.predict(one, inputs))
    assert not torch.equal(bound, untouched)


def test_loss_under_vmap_equals_the_loss_of_each_client(task: Task, splits: Splits) -> None:
    stage, model = task.stages()[0], task.build("tiny", 0)
    clients = [{n: x + 0.01 * i * x.sign() for n, x in _floats(model).items()} for i in range(3)]
    batches = [splits.train.take(range(4 * i, 4 * i + 4)).columns for i in range(3)]
    weight = torch.tensor([[1.0, 1, 1, 1], [1, 2, 0, 1], [1, 1, 0, 0]])
    keys = torch.tensor([5, 6, 7])

    def loss(tensors, columns, w, key):
        return stage.loss(bind(model, tensors), Batch(columns, w, key))[0]

    together = torch.vmap(loss)(stack(clients), stack(batches), weight, keys)
    alone = [loss(*args) for args in zip(clients, batches, weight, keys, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert len(set(together.tolist())) == 3


def _floats(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: x for n, x in tensors_of(model).items() if x.is_floating_point()}


def test_cuts_and_compressible_modules_exist(task: Task) -> None:
    model = task.build("tiny", 0)
    modules = dict(model.named_modules())
    choice = task.compressible(model)
    assert choice.modules and set(choice.modules) | set(choice.full_precision) <= set(modules)
    assert not set(choice.modules) & set(choice.full_precision)
    assert {cut.name for cut in task.cut_points("tiny")} <= set(modules)
    assert all(x.shape[0] == 1 for x in task.probe("tiny").values())
    drawn = list(task.calibration(task.synthesise(0, "tiny").train, batches=2, batch_size=3))
    assert [next(iter(inputs.values())).shape[0] for inputs in drawn] == [3, 3]


def test_the_real_format_gives_the_items_that_were_written(task: Task, tmp_path) -> None:
    if not hasattr(task, "export_real"):
        pytest.skip("a task without a real format")
    task.export_real(tmp_path)
    assert all(
        same(a, b) for a, b in zip(task.load(tmp_path)[:3], task.synthesise(0)[:3], strict=True)
    )
