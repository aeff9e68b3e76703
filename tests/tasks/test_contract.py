from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from isthmus.errors import InputError
from isthmus.models.bind import tensors_of
from isthmus.tasks.contract import Card, Stage, data_file, data_root, roles
from isthmus.tasks.digits import Digits
from isthmus.tasks.items import Batch, Items, weighted_mean


def _loss(model, batch):
    return weighted_mean(model(batch.x), batch.weight), {}


def test_weighted_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0], [10.0, 20.0], [7.0, 7.0]], dtype=torch.float64)
    weight = torch.tensor([3.0, 1.0, 0.0])
    assert weighted_mean(values, weight).item() == pytest.approx((3 * 2 + 15) / 4)
    assert weighted_mean(values, weight).dtype == torch.float64
    assert weighted_mean(values, 5 * weight).item() == pytest.approx((3 * 2 + 15) / 4)


def test_weighted_mean_of_nothing_is_zero_with_zero_gradient() -> None:
    values = torch.tensor([1.0, 5.0], requires_grad=True)
    mean = weighted_mean(values, torch.zeros(2))
    (gradient,) = torch.autograd.grad(mean, values)
    assert mean.item() == 0.0 and gradient.tolist() == [0.0, 0.0]


def test_weighted_mean_gives_a_tiny_total_its_full_mean() -> None:
    assert weighted_mean(torch.tensor([2.0, 8.0]), torch.tensor([0.0, 1e-30])).item() == 8.0


def test_batch_is_made_inside_a_traced_and_vmapped_step() -> None:
    def step(x, weight, key):
        batch = Batch({"x": x}, weight, key)
        return weighted_mean(batch.x * batch["x"], batch.weight) + batch.key

    x, weight = torch.arange(6.0).view(2, 3), torch.tensor([[1.0, 0, 1], [2, 1, 1]])
    keys = torch.tensor([10, 20])
    expected = torch.tensor([(0 + 4) / 2 + 10, (2 * 9 + 16 + 25) / 4 + 20])
    assert torch.allclose(torch.vmap(step)(x, weight, keys), expected)
    traced = make_fx(torch.vmap(step))(x, weight, keys)
    assert torch.allclose(traced(x + 1, weight, keys), torch.vmap(step)(x + 1, weight, keys))


def test_batch_names_a_missing_column() -> None:
    batch = Batch({"x": torch.ones(1)}, torch.ones(1))
    with pytest.raises(AttributeError, match="no column z"):
        _ = batch.z
    with pytest.raises(AttributeError):
        _ = Batch.__new__(Batch).x


def test_items_take_copies_in_order_and_keep_labels() -> None:
    items = Items(
        {"x": torch.arange(8.0).view(4, 2), "y": torch.arange(4)},
        ["a", "b", "a", "c"],
        list("pqrs"),
    )
    taken = items.take([3, 1, 1])
    assert taken.columns["x"].tolist() == [[6, 7], [2, 3], [2, 3]]
    assert (taken.group, taken.domain) == (["c", "b", "b"], ["s", "q", "q"])
    taken.columns["x"].zero_()
    assert items[3]["x"].tolist() == [6, 7] and items[3]["domain"] == "s"


@pytest.mark.parametrize(
    ("columns", "group", "message"),
    [
        ({"x": torch.ones(3), "y": torch.ones(2)}, None, "column y: 2 items given"),
        ({"x": torch.ones(3)}, ["a"], "group: 1 labels given, allowed: 3 labels"),
        ({"weight": torch.ones(3)}, None, "column: weight given"),
        ({}, None, "columns: none given"),
    ],
)
def test_items_refuse(columns, group, message) -> None:
    with pytest.raises(InputError, match=message):
        Items(columns, group)


def test_roles_of_a_plain_module_first_match_wins() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.register_buffer("ids", torch.arange(3))
    tensors = tensors_of(model)
    plain = roles(Stage("train", _loss), tensors)
    assert plain == {
        "0.weight": "shared",
        "0.bias": "shared",
        "1.weight": "shared",
        "1.bias": "shared",
        "1.running_mean": "recalibrate",
        "1.running_var": "recalibrate",
        "1.num_batches_tracked": "recalibrate",
        "ids": "frozen",  # integers have no mean
    }
    ordered = roles(
        Stage("train", _loss, (("0.b*", "local"), ("0.*", "frozen"), ("*", "local"))), tensors
    )
    assert (ordered["0.bias"], ordered["0.weight"], ordered["1.bias"]) == (
        "local",
        "frozen",
        "local",
    )


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((("0.weight", "shared"),), "role of 0.bias: none given, allowed: a pattern that matches"),
        ((("*", "sharde"),), "nearest: shared"),
        ((("*", "follow"),), "role of 0.weight: follow given"),
    ],
)
def test_roles_refuse(patterns, message) -> None:
    with pytest.raises(InputError, match=message):
        roles(Stage("train", _loss, patterns), tensors_of(nn.Sequential(nn.Linear(2, 3))))


def test_cuts_begin_after_the_first_learned_layer() -> None:
    assert [(c.name, c.shape) for c in Digits().cut_points("small")] == [
        ("features.linear0", (32,)),
        ("features.relu0", (32,)),
    ]
    convolutions = Digits().cut_points("paper")
    assert convolutions[0] == ("features.conv0", (16, 8, 8))
    assert convolutions[-1] == ("features.flatten", (32,))


def test_real_data_come_from_the_argument_then_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("ISTHMUS_DATA", raising=False)
    with pytest.raises(InputError, match="--data-dir or \\$ISTHMUS_DATA"):
        data_root()
    monkeypatch.setenv("ISTHMUS_DATA", str(tmp_path))
    assert data_root() == tmp_path
    with pytest.raises(InputError, match=r"a folder that holds faces/list\.txt") as caught:
        data_file(None, "faces/list.txt")
    assert "\n" not in str(caught.value)
    (tmp_path / "here.txt").touch()
    assert data_file(None, "here.txt") == tmp_path / "here.txt"
    with pytest.raises(InputError):
        data_file(tmp_path / "elsewhere", "here.txt")


def test_a_task_without_real_data_says_so() -> None:
    class Plain(Digits):
        card = Card("plain")
        load = Digits.__mro__[1].load

    with pytest.raises(InputError, match="plain has no other data"):
        Plain().load()
