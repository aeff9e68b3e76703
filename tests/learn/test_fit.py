"""`fit` is a plain training loop, and running statistics are those of the data."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from tests.federated import tiny
from torch import Tensor, nn

from isthmus import seeds, tree
from isthmus.errors import InputError
from isthmus.learn.fit import fit
from isthmus.learn.plan import random_batches_many, shuffled_epochs
from isthmus.learn.recalibrate import freeze_statistics, recalibrate
from isthmus.models.bind import bind, tensors_of, write
from isthmus.tasks.contract import Stage, Task, weighted_mean

TASK = tiny.task((13, 10))
ITEMS = TASK.synthesise().train


def torch_loop(module: nn.Module, optimiser: Any, batches: list[Tensor]) -> list[float]:
    """Cross-entropy, the way everybody writes it."""
    losses = []
    for rows in batches:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(
            module(ITEMS.columns["x"][rows]), ITEMS.columns["y"][rows]
        )
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def passes(key: int, epochs: int, batch: int) -> list[Tensor]:
    plan = shuffled_epochs(key, len(ITEMS), epochs, batch)
    return [i[w > 0] for i, w in zip(plan.index, plan.weight, strict=True)]


OPTIMISERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "sgd:momentum=0.9,nesterov=true,weight_decay=0.01": lambda p: torch.optim.SGD(
        p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
    "adamw:weight_decay=0.1": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_fit_is_a_torch_loop(name: str) -> None:
    module, plain = TASK.build(seed=4), TASK.build(seed=4)
    before = tree.clone(tensors_of(module))
    got, history = fit(TASK, module, ITEMS, optimiser=name, lr=0.05, epochs=3, batch=8, key=5)
    losses = torch_loop(plain, OPTIMISERS[name](plain.parameters()), passes(5, 3, 8))
    assert history == pytest.approx(losses, rel=1e-12) and len(history) == 9
    for n, x in tensors_of(plain).items():
        torch.testing.assert_close(got[n], x, rtol=1e-11, atol=1e-13)
    assert tree.equal(tensors_of(module), before)
    assert torch.equal(
        bind(module, got)(ITEMS.columns["x"]), write(module, got)(ITEMS.columns["x"])
    )


def test_steps_full_batches_and_the_stages_own_defaults() -> None:
    import numpy as np

    plain = TASK.build()
    plan = random_batches_many(np.array([2]), np.array([len(ITEMS)]), 5, 9)
    got, history = fit(TASK, TASK.build(), ITEMS, steps=5, batch=9, key=2)
    torch_loop(plain, torch.optim.SGD(plain.parameters(), 0.1), list(plan.index[0]))
    assert tiny.apart(got, tensors_of(plain)) < 1e-12 and len(history) == 5
    plain = TASK.build()
    whole, history = fit(TASK, TASK.build(), ITEMS, steps=3, batch=0)
    rows = [torch.arange(len(ITEMS))] * 3
    assert history == pytest.approx(
        torch_loop(plain, torch.optim.SGD(plain.parameters(), 0.1), rows), rel=1e-12
    )
    assert tiny.apart(whole, tensors_of(plain)) < 1e-12
    assert len(fit(TASK, TASK.build(), ITEMS)[1]) == 1  # epochs 1, batch 32 of 23 items
    assert fit(TASK, TASK.build(), ITEMS, key=1)[1] == pytest.approx(
        fit(TASK, TASK.build(), ITEMS, key=2)[1]
    )  # one batch of all: the order does not matter


def test_only_what_is_trainable_moves() -> None:
    module = TASK.build()
    got, _ = fit(TASK, module, ITEMS, trainable=["head.bias"])
    own = tensors_of(module)
    assert [n for n, x in got.items() if not torch.equal(x, own[n])] == ["head.bias"]
    module.head.requires_grad_(False)
    got, _ = fit(TASK, module, ITEMS)
    assert {n for n, x in got.items() if not torch.equal(x, own[n])} == {
        "features.lower.weight",
        "features.lower.bias",
    }
    with pytest.raises(InputError, match=r"trainable: head\.bais given.*nearest"):
        fit(TASK, TASK.build(), ITEMS, trainable=["head.bais"])
    with pytest.raises(InputError, match="trainable: nothing given"):
        fit(TASK, TASK.build().requires_grad_(False), ITEMS)


def test_a_stage_alone_and_its_following_tensor() -> None:
    def loss(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        error = (model.w - batch.x).square()
        return weighted_mean(error, batch.weight), {}

    def follow(tensors: Any) -> dict[str, Tensor]:
        return {"slow": 0.5 * (tensors["slow"] + tensors["w"])}

    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    module.register_buffer("slow", torch.zeros(1, dtype=torch.float64))
    stage = Stage("mean", loss, (("slow", "follow"), ("*", "shared")), lr=0.25, follow=follow)
    items = tiny.task((4,), data=(torch.arange(4.0).double().view(4, 1), torch.zeros(4).long()),
                      module=lambda seed: nn.Linear(1, 2).double()).synthesise().train  # fmt: skip
    got, history = fit(stage, module, items, steps=2, batch=0)
    assert got["w"].tolist() == [0.75 + 0.375] and got["slow"].tolist() == [0.1875 + 0.5625]
    assert history == [3.5, 1.25 + 0.75**2]


def test_dropout_draws_from_the_key_alone() -> None:
    task = tiny.task((13, 10), dropout=0.5)
    module, before = task.build(), torch.get_rng_state()
    a, b, c = (fit(task, module, ITEMS, key=k, batch=0)[1] for k in (1, 1, 2))
    assert a == b != c and torch.equal(before, torch.get_rng_state())
    assert any(isinstance(m, nn.Dropout) for m in module.modules())  # the module keeps its own
    still = fit(task, task.build().eval(), ITEMS, key=1, batch=0)[1]
    assert still == pytest.approx(fit(TASK, TASK.build(), ITEMS, key=1, batch=0)[1])


def normed() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        layers = OrderedDict(
            lin=nn.Linear(6, 5),
            one=nn.BatchNorm1d(5),
            act=nn.Tanh(),
            two=nn.BatchNorm1d(5, eps=1e-2),
        )
        return nn.Sequential(
            OrderedDict(features=nn.Sequential(layers), head=nn.Linear(5, 4))
        ).double()


NAMES = [
    f"features.{layer}.{name}"
    for layer in ("one", "two")
    for name in ("running_mean", "running_var", "num_batches_tracked")
]


def predict(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(inputs["x"])


def test_recalibration_is_torchs_cumulative_average() -> None:
    module, other = normed(), normed()
    x = seeds.normal(3, (30, 6), torch.float64) * 2 + 1
    before, own = tree.clone(tensors_of(module)), tensors_of(module)
    batches = [({"x": part}, len(part)) for part in x.split(10)]
    got = recalibrate(module, own, NAMES, predict, batches)
    for layer in other.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = None
    for part in x.split(10):
        other(part)
    for name in NAMES:
        torch.testing.assert_close(got[name], tensors_of(other)[name], rtol=1e-12, atol=1e-12)
    assert tree.equal(tensors_of(module), before) and all(m.training for m in module.modules())
    assert all(m.momentum == 0.1 for m in module.modules() if isinstance(m, nn.BatchNorm1d))


def test_recalibration_adds_up_over_ragged_batches_in_any_order() -> None:
    module = normed()
    x = seeds.normal(4, (24, 6), torch.float64)
    parts = x.split([2, 9, 1, 12])
    batches = [({"x": part}, len(part)) for part in parts]
    own = tensors_of(module)
    got = recalibrate(module, own, NAMES, predict, batches)
    back = recalibrate(module, own, NAMES, predict, batches[::-1])
    first = module.features.lin(x)
    sizes = (2, 9, 12)  # one item has no variance
    rows = [first[:2], first[2:11], first[12:]]
    mean = sum(n * r.mean(0) for n, r in zip(sizes, rows, strict=True)) / 23
    var = sum(n * r.var(0) for n, r in zip(sizes, rows, strict=True)) / 23
    torch.testing.assert_close(got["features.one.running_mean"], mean.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(got["features.one.running_var"], var.detach(), rtol=1e-10, atol=0)
    assert int(got["features.one.num_batches_tracked"]) == 3
    for name in NAMES:
        torch.testing.assert_close(got[name], back[name], rtol=1e-10, atol=1e-12)


def test_recalibration_refuses_what_it_cannot_do() -> None:
    module = normed()
    with pytest.raises(InputError, match="recalibrate: batches of one item given"):
        recalibrate(module, tensors_of(module), NAMES, predict, [({"x": torch.ones(1, 6)}, 1)])
    with pytest.raises(InputError, match=r"role of features\.lin\.weight: recalibrate given"):
        recalibrate(module, tensors_of(module), ["features.lin.weight"], predict, [])


def test_fit_leaves_statistics_alone_and_recomputes_them_at_the_end() -> None:
    task: Task = tiny.task((13, 10), module=lambda seed: normed())
    module, plain = task.build(), freeze_statistics(task.build())
    before = tree.clone(tensors_of(module))
    got, history = fit(task, module, ITEMS, epochs=2, batch=8, lr=0.2, key=3)
    losses = torch_loop(plain, torch.optim.SGD(plain.parameters(), 0.2), passes(3, 2, 8))
    assert history == pytest.approx(losses, rel=1e-12)
    assert tiny.apart({n: got[n] for n, _ in plain.named_parameters()},
                      {n: p.detach() for n, p in plain.named_parameters()}) < 1e-12  # fmt: skip
    assert tree.equal(tensors_of(module), before)
    assert all(not torch.equal(got[n], before[n]) for n in NAMES)
    model = bind(module, got).eval()
    x = ITEMS.columns["x"]
    scored = nn.functional.cross_entropy(model(x), ITEMS.columns["y"])
    stale = nn.functional.cross_entropy(
        bind(module, {**got, **{n: before[n] for n in NAMES}}).eval()(x), ITEMS.columns["y"]
    )
    assert scored < stale and scored < history[0]
