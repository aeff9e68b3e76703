"""The step: one client and a cohort, early stopping, following tensors, several gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus import seeds, tree
from isthmus.learn.graph import Graphs, Mode
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Plan, Work
from isthmus.learn.plan import shuffled_epochs_many
from isthmus.learn.visit import (
    expand,
    keys_of_steps,
    keys_within,
    sequential,
    stack_alike,
    vectorised,
)
from isthmus.models import optim
from isthmus.tasks.contract import Batch, weighted_mean
from isthmus.tree import Tree

SIZES = np.array([5, 12, 1, 8])
KEYS = seeds.keys(seeds.key("visit"), np.arange(4))
STARTS = np.array([0, 5, 17, 18])
RATE = torch.tensor(0.05, dtype=torch.float64)


class Line(nn.Module):
    """y = w x + b, with a tensor that follows w and one that no one touches."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.register_buffer("slow", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("far", torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b + 0.01 * (self.slow + self.far).sum()


LINE = Line()


def columns() -> Tree:
    x = seeds.normal(1, (26, 2), torch.float64)
    return {"x": x, "y": x @ torch.tensor([2.0, 1.0], dtype=torch.float64) - 0.7}


def loss(model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
    each = (model(batch.x) - batch.y).square()
    value = weighted_mean(each, batch.weight)
    noise = seeds.normal(batch.key, (), torch.float64)
    return value + 0.0 * noise + carry.get("pull", 0.0) * model.b, {"noise": noise}


def plan(epochs: int = 2, batch: int = 4) -> Plan:
    """Into the pool; ragged: steps 2 to 6."""
    own = shuffled_epochs_many(KEYS, SIZES, epochs, batch)
    index = own.index + torch.from_numpy(STARTS)[:, None, None]
    return Plan(torch.where(own.weight > 0, index, 0), own.weight.double())


def start() -> Tree:
    base = {n: x.detach().clone() for n, x in [*LINE.named_parameters(), *LINE.named_buffers()]}
    shifts = torch.arange(4.0, dtype=torch.float64) / 10
    return {n: x + shifts.view(-1, *[1] * (x.ndim - 1)) for n, x in expand(base, 4).items()}


def one_by_one(phase: Phase, params: Tree, carry: Carry, plans: Plan) -> list[Work]:
    return [
        sequential(
            phase, LINE, {}, tree.row(params, i), {n: x[i] for n, x in carry.items()}, columns(),
            Plan(plans.index[i], plans.weight[i]), int(KEYS[i]), RATE,
        )
        for i in range(4)
    ]  # fmt: skip


def agree(
    phase: Phase, carry: Carry | None = None, compile: Mode = "none", plans: Plan | None = None
) -> tuple[Work, list[Work]]:
    params, held = start(), carry or {}
    plans = plans or plan()
    many = vectorised(phase, LINE, {}, params, held, columns(), plans, KEYS, RATE, Graphs(compile))
    each = one_by_one(phase, params, held, plans)
    for i, one in enumerate(each):
        for n, x in one.params.items():
            torch.testing.assert_close(many.params[n][i], x, rtol=1e-12, atol=1e-12)
        for n, x in one.carry.items():
            torch.testing.assert_close(many.carry[n][i], x, rtol=1e-12, atol=1e-12)
        assert float(many.loss[i]) == pytest.approx(float(one.loss), rel=1e-12)
        assert float(many.aux["noise"][i]) == pytest.approx(float(one.aux["noise"]), rel=1e-9)
        got = (float(many.steps[i]), float(many.examples[i]), many.grads)
        assert got == (float(one.steps), float(one.examples), one.grads)
    return many, each


BOTH: tuple[str, ...] = ("w", "b")
PLAIN = Phase("train", BOTH, loss, optim.adam())


@pytest.mark.parametrize("batch", [4, 12])
@pytest.mark.parametrize("compile", ["none", "trace"])
def test_ragged_visits(compile: Mode, batch: int) -> None:
    """Batch 12: two steps, recorded as one piece; batch 4: six, recorded each."""
    many, _ = agree(PLAIN, compile=compile, plans=plan(2, batch))
    assert many.steps.tolist() == ([2, 2, 2, 2] if batch == 12 else [4, 6, 2, 4])
    assert many.examples.tolist() == [10, 24, 2, 16]
    assert torch.equal(many.params["far"], start()["far"])


def test_by_hand() -> None:
    """Client 2 has one item: two steps of gradient descent on (w x + b + c - y)^2."""
    _, each = agree(Phase("train", BOTH, loss, optim.sgd()))
    p = tree.row(start(), 2)
    x, y = columns()["x"][17], columns()["y"][17]
    w, b, rest = p["w"].clone(), p["b"].clone(), 0.01 * (p["slow"] + p["far"]).sum()
    for _ in range(2):
        error = w @ x + b + rest - y
        w, b = w - 0.05 * 2 * error * x, b - 0.05 * 2 * error
    torch.testing.assert_close(each[2].params["w"], w, rtol=1e-13, atol=0)
    torch.testing.assert_close(each[2].params["b"], b, rtol=1e-13, atol=0)


def test_only_trainable_names_move() -> None:
    many, _ = agree(Phase("train", ("b",), loss, optim.sgd()))
    assert torch.equal(many.params["w"], start()["w"])
    assert bool((many.params["b"] != start()["b"]).all())


def near(params: Tree, carry: Carry, value: Tensor) -> Tensor:
    return value < 0.5


def at_once(params: Tree, carry: Carry, value: Tensor) -> Tensor:
    return value < 1e9


@pytest.mark.parametrize("compile", ["none", "trace"])
def test_until_stops_a_client_and_freezes_it(compile: Mode) -> None:
    phase = Phase("train", BOTH, loss, optim.sgd(), until=near)
    many, _ = agree(phase, compile=compile, plans=plan(4))
    free = vectorised(
        Phase("train", BOTH, loss, optim.sgd()), LINE, {}, start(), {}, columns(), plan(4), KEYS,
        RATE, Graphs(),
    )  # fmt: skip
    stopped = many.steps < free.steps
    assert bool(stopped.any()) and not bool(stopped.all())
    assert bool((many.params["w"] == free.params["w"]).all(1)[~stopped].all())
    first, _ = agree(Phase("train", BOTH, loss, optim.sgd(), until=at_once))
    assert first.steps.tolist() == [1, 1, 1, 1] and first.examples.tolist() == [4, 4, 1, 4]


def ema(tensors: Any) -> Tree:
    return {"slow": 0.9 * tensors["slow"] + 0.1 * tensors["w"]}


@pytest.mark.parametrize("batch", [4, 12])
@pytest.mark.parametrize("compile", ["none", "trace"])
def test_follow_is_applied_after_every_step(compile: Mode, batch: int) -> None:
    phase = Phase("train", BOTH, loss, optim.sgd(), follow=ema)
    many, _ = agree(phase, compile=compile, plans=plan(2, batch))
    seen: list[Tensor] = []

    def watch(tensors: Any) -> Tree:
        seen.append(tensors["w"].clone())
        return ema(tensors)

    one_by_one(Phase("train", BOTH, loss, optim.sgd(), follow=watch), start(), {}, plan(2, batch))
    slow, at = start()["slow"], 0
    for i, steps in enumerate(many.steps.int().tolist()):
        expected = slow[i]
        for _ in range(steps):
            expected, at = 0.9 * expected + 0.1 * seen[at], at + 1
        torch.testing.assert_close(many.params["slow"][i], expected, rtol=1e-12, atol=0)


def twice(
    grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
) -> tuple[Tree, Opt, Carry]:
    """Sharpness-aware: the gradient at the point uphill."""
    first, _ = grad(params)
    second, _ = grad(tree.add(params, first, alpha=0.1))
    params, opt = opt.update(second, params)
    return params, opt, {**carry, "count": carry["count"] + 1}


@pytest.mark.parametrize("compile", ["none", "trace"])
def test_two_gradients_a_step_are_counted_and_carry_moves(compile: Mode) -> None:
    carry: Carry = {"count": torch.zeros(4), "pull": torch.linspace(0, 1, 4).double()}
    phase = Phase("train", BOTH, loss, optim.sgd(), step=twice)
    many, each = agree(phase, carry, compile)
    assert many.grads == 2 and many.carry["count"].tolist() == many.steps.tolist()
    x = {n: p.requires_grad_() for n, p in tree.clone(tree.row(start(), 2)).items()}
    item = (columns()["x"][17], columns()["y"][17])

    def f(w: Tensor, b: Tensor) -> Tensor:
        rest = 0.01 * (x["slow"] + x["far"]).sum().detach()
        return (w @ item[0] + b + rest - item[1]) ** 2 + carry["pull"][2] * b

    w, b = x["w"], x["b"]
    for _ in range(2):
        g = torch.autograd.grad(f(w, b), (w, b))
        high = [(p + 0.1 * q).detach().requires_grad_() for p, q in zip((w, b), g, strict=True)]
        g = torch.autograd.grad(f(*high), high)
        w, b = ((p - 0.05 * q).detach().requires_grad_() for p, q in zip((w, b), g, strict=True))
    torch.testing.assert_close(each[2].params["w"], w.detach(), rtol=1e-12, atol=1e-12)


def test_nothing_to_do() -> None:
    empty = Plan(torch.zeros(4, 0, 3, dtype=torch.int64), torch.zeros(4, 0, 3).double())
    many = vectorised(PLAIN, LINE, {}, start(), {}, columns(), empty, KEYS, RATE, Graphs())
    assert tree.equal(many.params, start()) and not many.steps.any() and not many.examples.any()
    none = plan()
    none = Plan(none.index, torch.zeros_like(none.weight))
    idle = vectorised(PLAIN, LINE, {}, start(), {}, columns(), none, KEYS, RATE, Graphs("trace"))
    assert tree.equal(idle.params, start()) and not idle.steps.any()
    alone = one_by_one(PLAIN, start(), {}, none)
    assert all(tree.equal(w.params, tree.row(start(), i)) for i, w in enumerate(alone))
    assert all(float(w.steps) == float(w.loss) == 0.0 for w in alone)


def test_steps_have_keys_of_their_own() -> None:
    table = keys_of_steps(KEYS, 3)
    assert torch.equal(keys_within(torch.from_numpy(KEYS), 3), table)
    assert table.tolist() == [[seeds.fold(int(k), t) for t in range(3)] for k in KEYS]
    assert len(set(table.flatten().tolist())) == 12


def test_stack_alike_copies_only_what_differs() -> None:
    a = {"x": torch.ones(3), "y": torch.zeros(2)}
    b = {"x": a["x"], "y": torch.zeros(2)}
    got = stack_alike([a, b])
    assert got["x"].stride(0) == 0 and got["y"].stride(0) == 2
    assert tree.equal(tree.stack([a, b]), {n: x.contiguous() for n, x in got.items()})
    assert stack_alike([a])["x"].shape == (1, 3)
    wide = expand(a, 5)
    assert wide["x"].shape == (5, 3) and wide["x"].data_ptr() == a["x"].data_ptr()
