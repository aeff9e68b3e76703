"""DRTP, DFA, feedback alignment, forward-forward, last layer only: each by hand in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import local
from torch import Tensor, nn

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.models.bind import bind, tensors_of
from isthmus.models.nets import cnn, mlp
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree


def net(seed: int = 1) -> Any:
    return mlp([6, 5, 7, 4], "tanh", seed).double()


def uniform(name: str, k: int, shape: tuple[int, int], bound: float) -> Tensor:
    key = seeds.key(0, name, k)
    return (2.0 * seeds.uniform(key, shape, local.F64) - 1.0) * bound


def forward(module: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The inputs of the three layers, and the logits."""
    f = module.features
    h1 = torch.tanh(x @ f.linear0.weight.T + f.linear0.bias)
    h2 = torch.tanh(h1 @ f.linear1.weight.T + f.linear1.bias)
    return [x, h1, h2], h2 @ module.head.weight.T + module.head.bias


def by_hand(module: Any, given: Batch, errors: Callable[[Tensor, list[Tensor]], Any]) -> Tree:
    """Gradients from the errors dJ/do that `errors(e, hidden outputs)` gives both hidden layers."""
    with torch.no_grad():
        h, logits = forward(module, given.x)
        share = (given.weight / given.weight.sum())[:, None]
        e = share * (logits.softmax(1) - nn.functional.one_hot(given.y, 4))
        first, second = errors(e, h)
        d = [first * (1 - h[1] ** 2), second * (1 - h[2] ** 2), e]
        names = ("features.linear0", "features.linear1", "head")
        weights = {f"{n}.weight": d[k].T @ h[k] for k, n in enumerate(names)}
        return weights | {f"{n}.bias": d[k].sum(0) for k, n in enumerate(names)}


def test_drtp_projects_the_label() -> None:
    module, given = net(), local.batch(6)

    def errors(e: Tensor, h: list[Tensor]) -> tuple[Tensor, Tensor]:
        share = (given.weight / given.weight.sum())[:, None]
        b = [uniform("drtp", k, (4, n), math.sqrt(6 / n)) for k, n in enumerate((5, 7))]
        one_hot = nn.functional.one_hot(given.y, 4).double()
        return share * (one_hot @ b[0]), share * (one_hot @ b[1])

    got = local.grads(local.method("drtp", net), module, given)
    assert tiny.apart(by_hand(module, given, errors), got) < 1e-13


def test_dfa_projects_the_error() -> None:
    module, given = net(), local.batch(6)

    def errors(e: Tensor, h: list[Tensor]) -> tuple[Tensor, Tensor]:
        b = [uniform("dfa", k, (n, 4), 1 / math.sqrt(n)) for k, n in enumerate((5, 7))]
        return e @ b[0].T, e @ b[1].T

    got = local.grads(local.method("dfa", net), module, given)
    assert tiny.apart(by_hand(module, given, errors), got) < 1e-13


def test_feedback_alignment_swaps_the_way_back_alone() -> None:
    module, given = net(), local.batch(6)
    b1 = uniform("feedback", 1, (7, 5), 1 / math.sqrt(5))
    b2 = uniform("feedback", 2, (4, 7), 1 / math.sqrt(7))

    def errors(e: Tensor, h: list[Tensor]) -> tuple[Tensor, Tensor]:
        return ((e @ b2) * (1 - h[2] ** 2)) @ b1, e @ b2

    method = local.method("feedback-alignment", net)
    total, _ = local.value(method, module, given)
    assert tiny.apart(by_hand(module, given, errors), local.grads(method, module, given)) < 1e-13
    plain, _ = local.value(local.method("fedavg", net), module, given)
    assert float(total.detach() - plain.detach()) == pytest.approx(0.0, abs=1e-14)
    with torch.no_grad():  # matrices that are the weights give backpropagation
        module.features.linear1.weight.copy_(b1)
        module.head.weight.copy_(b2)
    backward = local.grads(local.method("fedavg", net), module, given)
    assert tiny.apart(backward, local.grads(method, module, given)) < 1e-13


def test_feedback_alignment_costs_what_backpropagation_costs() -> None:
    cost = tiny.federation("feedback-alignment", tiny.task(module=net)).ground.cost["train"]
    assert cost == 1.0


def goodness(module: Any, x: Tensor, label: Tensor) -> list[Tensor]:
    """Mean squares of both hidden layers, with graph in each layer alone."""
    h = torch.cat([nn.functional.one_hot(label, 4).double(), x[:, 4:]], dim=1)
    found = []
    for layer in (module.features.linear0, module.features.linear1):
        h = h / h.square().mean(1, keepdim=True).sqrt()
        h = torch.tanh(layer(h.detach()))
        found.append(h.square().mean(1))
    return found


def test_forward_forward_parts_right_from_wrong() -> None:
    module, given = net(), local.batch(6)
    method = local.method("forward-forward", net, theta=0.3)
    leaves = {n: p.detach().requires_grad_() for n, p in module.features.named_parameters()}
    bound = bind(module, {f"features.{n}": p for n, p in leaves.items()})
    draw = seeds.uniform(given.key, (7,), local.F64)
    wrong = (given.y + 1 + (draw * 3).floor().long()) % 4
    assert bool((wrong != given.y).all()) and len(set((wrong - given.y).tolist())) > 2
    total = torch.zeros((), dtype=local.F64)
    for label, sign in ((given.y, 1.0), (wrong, -1.0)):
        for g in goodness(bound, given.x, label):
            total = total - local.mean(torch.log(torch.sigmoid(sign * (g - 0.3))), given)
    expected = torch.autograd.grad(total, list(leaves.values()))
    value, _ = local.value(method, module, given)
    got = local.grads(method, module, given)
    assert float(value.detach()) == pytest.approx(float(total.detach()), rel=1e-8)
    named = {f"features.{n}": g for n, g in zip(leaves, expected, strict=True)}
    assert tiny.apart(named, {n: got[n] for n in named}) < 1e-7  # 1e-8 beside the root mean square
    assert "head.weight" not in got


def test_forward_forward_predicts_the_label_of_most_goodness() -> None:
    module, task = net(), tiny.task(module=net)
    fed = tiny.federation("forward-forward", task)
    inputs = task.inputs(task.synthesise().test.columns)
    said = fed.method.predict(task, module, inputs, None, {})
    for c in range(4):
        each = goodness(module, inputs["x"], torch.full((30,), c))
        assert torch.allclose(said[:, c], each[1], atol=1e-7)
    assert len(said.argmax(1).unique()) > 1
    assert set(fed.method.names.frozen) == {"head.weight", "head.bias"}


def test_last_layer_only_is_fedavg_of_the_head() -> None:
    fed = tiny.play("last-layer-only", tiny.task(module=net), 2)
    assert set(fed.state["shared"]) == {"head.weight", "head.bias"}
    start = tensors_of(net(0))
    given = Batch({"x": fed.ground.columns["x"], "y": fed.ground.columns["y"]},
                  torch.ones(sum(tiny.RAGGED), dtype=local.F64))  # fmt: skip
    one = tiny.play("last-layer-only", tiny.task(module=net), 1, batch=0, epochs=1, lr=0.3)
    g = local.grads(local.method("fedavg", net), net(0), given)
    expected = {n: start[n] - 0.3 * g[n] for n in ("head.weight", "head.bias")}
    assert tiny.apart(expected, one.state["shared"]) < 1e-13


@pytest.mark.parametrize("name", ["feedback-alignment", "forward-forward"])
def test_what_is_for_dense_nets_refuses_pictures(name: str) -> None:
    module = cnn([4], 4, inputs=2, activation="tanh").double()
    with pytest.raises(InputError, match=rf"conv0: Conv2d given, allowed: linear with {name}"):
        local.value(local.method(name, net), module, local.batch(2, 5, 5))


def test_forward_forward_needs_room_for_the_label() -> None:
    module = mlp([3, 5, 4]).double()
    with pytest.raises(InputError, match="3 inputs given, allowed: 4 or more"):
        local.value(local.method("forward-forward", net), module, local.batch(3))


def test_direct_projections_reach_pictures() -> None:
    """A channel's error is shared evenly by its positions."""
    module, given = cnn([4], 4, inputs=2, activation="tanh").double(), local.batch(2, 5, 5)
    got = local.grads(local.method("drtp", net), module, given)
    b = uniform("drtp", 0, (4, 4), math.sqrt(6 / 4))[given.y]
    leaves = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    lower: Any = bind(module, leaves)
    first = lower.features[:3](given.x)
    own = (first.mean((2, 3)) * b).sum(1)  # a linear loss has this gradient
    names = [n for n in leaves if n.startswith("features")]
    expected = torch.autograd.grad(local.mean(own, given), [leaves[n] for n in names])
    for n, g in zip(names, expected, strict=True):
        torch.testing.assert_close(got[n], g, rtol=1e-11, atol=1e-13)
