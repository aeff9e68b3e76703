from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.tasks import metrics
from isthmus.tasks.contract import Task, roles
from isthmus.tasks.items import Batch, Items
from isthmus.tasks.own import find, of
from isthmus.tree import equal

X = torch.randn(20, 3, generator=seeds.generator(0))
Y = torch.arange(20) % 2


def linear(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 2)


class Pairs(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int):
        return X[i].numpy(), int(Y[i])


class Rows(Pairs):
    def __getitem__(self, i: int):
        return {"x": X[i], "y": int(Y[i])}


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        (X.numpy(), Y.numpy()),
        TensorDataset(X, Y),
        Pairs(),
        Rows(),
        {"x": X, "y": Y},
        Items({"x": X, "y": Y}),
    ],
    ids=["tensors", "arrays", "TensorDataset", "tuples", "dicts", "columns", "items"],
)
def test_every_kind_of_data_gives_the_same_items(data) -> None:
    task = of(linear, data, data, val=(X[:4], Y[:4]))
    splits = task.synthesise()
    assert equal(splits.train.columns, {"x": X, "y": Y})
    assert equal(splits.test.columns, splits.train.columns) and len(splits.val) == 4
    assert (task.input_names, task.target_names) == (("x",), ("y",))


def test_owners_by_label_by_column_and_of_items() -> None:
    by_label = of(linear, (X, Y), (X, Y), owner=torch.arange(20) // 5, val=(X, Y))
    by_column = of(
        linear,
        {"x": X, "y": Y, "who": torch.arange(20) // 5},
        {"x": X, "y": Y, "who": torch.arange(20)},
        val={"x": X, "y": Y, "who": torch.arange(20)},
        owner="who",
    )
    given = Items({"x": X, "y": Y}, [str(i // 5) for i in range(20)])
    by_items = of(linear, given, given, val=given)
    for task in (by_label, by_column, by_items):
        assert task.input_names == ("x",)
        parts = task.partition(task.synthesise().train, 4, "natural")
        assert [part.tolist() for part in parts] == np.arange(20).reshape(4, 5).tolist()


def test_several_inputs_reach_the_model_in_order() -> None:
    class Both(nn.Module):
        def forward(self, a, b):
            return torch.stack([a.sum(1) - b.sum(1), b.sum(1)], 1)

    task = of(Both(), (X, 2 * X, Y), (X, 2 * X, Y))
    outputs = task.predict(task.build(), task.inputs(task.synthesise().test.columns))
    torch.testing.assert_close(outputs[:, 0], -X.sum(1))


def test_the_default_loss_is_weighted_cross_entropy() -> None:
    task = of(linear, (X, Y), (X, Y))
    model, weight = task.build(), torch.arange(20.0) % 3
    loss, _ = task.stages()[0].loss(model, Batch({"x": X, "y": Y}, weight))
    each = nn.functional.cross_entropy(model(X), Y, reduction="none")
    torch.testing.assert_close(loss, (each * weight).sum() / weight.sum())
    assert isinstance(task.metric, metrics.Accuracy)


def test_ignored_tokens_do_not_dilute_the_loss() -> None:
    y = torch.tensor([[0, 1], [1, -100]])
    x = torch.randn(2, 2, 3, generator=seeds.generator(1))
    task = of(linear, (x, y), (x, y))
    loss, _ = task.stages()[0].loss(task.build(), Batch({"x": x, "y": y}, torch.ones(2)))
    outputs = task.build()(x).reshape(-1, 2)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(outputs, y.reshape(-1)))


def test_squared_error_and_a_loss_of_your_own() -> None:
    y = X.sum(1)
    task = of(lambda: nn.Linear(3, 1), (X, y), (X, y), loss="squared-error")
    loss, _ = task.stages()[0].loss(task.build(), Batch({"x": X, "y": y}, torch.ones(20)))
    torch.testing.assert_close(loss, (task.build()(X)[:, 0] - y).square().mean())
    assert isinstance(task.metric, metrics.Regression)

    def huber(outputs, target):
        return nn.functional.huber_loss(outputs[:, 0], target, reduction="none")

    own = of(lambda: nn.Linear(3, 1), (X, y), (X, y), loss=huber)
    outputs = own.build()(X).detach()
    state = own.metric.update(own.metric.init(), outputs, {"y": y}, torch.ones(20))
    mean = float(huber(outputs, y).double().mean())
    assert own.metric.finish(state) == {"loss": pytest.approx(mean)}
    for reduced in (nn.CrossEntropyLoss(), lambda outputs, y: outputs.mean(0)):
        with pytest.raises(InputError, match="one value per item"):
            of(linear, (X[:6], Y[:6]), (X, Y), loss=reduced)


def test_models_are_copied_or_made_from_the_seed() -> None:
    module = linear(3)
    task = of(module, (X, Y), (X, Y))
    built = task.build()
    assert built is not module and equal(built.state_dict(), module.state_dict())
    plain, before = of(lambda: nn.Linear(3, 2), (X, Y), (X, Y)), torch.random.get_rng_state()
    one, same, other = (plain.build(seed=s).state_dict() for s in (1, 1, 2))
    assert equal(one, same) and not equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())
    seeded = of(linear, (X, Y), (X, Y)).build(seed=3)
    assert equal(seeded.state_dict(), module.state_dict())


def test_your_roles_go_before_the_plain_ones() -> None:
    task = Task.of(linear, (X, Y), (X, Y), roles=[("bias", "local")], lr=0.7, optimiser="adam")
    (stage,) = task.stages()
    assert roles(stage, task.build().state_dict()) == {"weight": "shared", "bias": "local"}
    assert (stage.lr, stage.optimiser) == (0.7, "adam")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": X}, "data: Tensor given|data set of tuples"),
        ({"train": [X, Y]}, "a data set of tuples or of dicts"),
        ({"train": (X,)}, r"\(x, y\)"),
        ({"targets": ["label"]}, "targets: label given, allowed: x, y"),
        ({"owner": "who"}, "owner: who given"),
        ({"owner": ["a"]}, "group: 1 labels given, allowed: 20"),
        ({"loss": "cross-entrpy"}, "nearest: cross-entropy"),
        ({"metric": "acuracy"}, "nearest: accuracy"),
    ],
)
def test_bad_input_is_one_line(options, message) -> None:
    with pytest.raises(InputError, match=message) as caught:
        of(**{"model": linear, "train": (X, Y), "test": (X, Y), **options})
    assert "\n" not in str(caught.value)


def test_find_by_name_and_by_path(tmp_path) -> None:
    assert find("Digits").card.name == "digits"
    with pytest.raises(InputError, match="nearest: digits"):
        find("digts")
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom isthmus.tasks import Task\n"
        "x, y = torch.ones(12, 2), torch.arange(12) % 2\n"
        "def make(name='mine'):\n"
        "    return Task.of(torch.nn.Linear(2, 2), (x, y), (x, y), name=name)\n"
        "ready = make()\n"
        "wrong = 3\n"
    )
    assert find(f"{file}:make").card.name == "mine"
    assert find(f"{file}:make", name="other").card.name == "other"
    assert find(f"{file}:ready").card.name == "mine"
    with pytest.raises(InputError, match="a Task, a class of tasks or a function"):
        find(f"{file}:wrong")
    with pytest.raises(InputError, match="nearest: ready"):
        find(f"{file}:redy")
