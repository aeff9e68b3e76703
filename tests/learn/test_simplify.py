"""Recordings with fewer operations: the same bits, and arguments that stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from isthmus import tree
from isthmus.learn.graph import Graphs
from isthmus.learn.simplify import abreast, reuse, simplify


def operations(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_what_changes_nothing_goes_and_what_is_equal_is_computed_once() -> None:
    def function(x: Tensor) -> list[Tensor]:
        same = x.view(3, 4).expand(3, 4) * 1
        turned = same.t().t()
        return [(turned.exp() + torch.zeros_like(x)) * (x.exp() + 1.0)]

    x = torch.randn(3, 4)
    graph = make_fx(function)(x)
    before, plain = operations(graph), function(x)[0]
    simplify(graph, [x])
    after = operations(graph)
    assert after.count("aten.exp.default") == 1 < before.count("aten.exp.default")
    assert not {"aten.view.default", "aten.t.default", "aten.zeros_like.default"} & set(after)
    assert torch.equal(graph(x)[0], plain)


def test_constants_of_other_types_are_not_one() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [x + 1, x + 1.0, x + True]

    x = torch.tensor([1, 2])
    graph = make_fx(function)(x)
    simplify(graph, [x])
    assert [y.dtype for y in graph(x)] == [torch.int64, torch.float32, torch.int64]


def test_a_view_that_changes_strides_stays() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [x.t().reshape(3, 4), x.t().t(), x.expand(2, 4, 3)]

    x = torch.randn(4, 3)
    graph = make_fx(function)(x)
    simplify(graph, [x])
    for got, wanted in zip(graph(x), function(x), strict=True):
        assert torch.equal(got, wanted) and got.shape == wanted.shape


def test_only_memory_that_nothing_needs_is_written_over() -> None:
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        kept = x @ w
        gone = x @ (w + 1.0)
        return [kept, kept * 2.0 - gone * 3.0, x - gone, x * w[:1]]

    x, w = torch.randn(5, 3, 3), torch.randn(5, 3, 3)
    given = x.clone(), w.clone()
    graph = make_fx(function)(x, w)
    simplify(graph, [x, w])
    reuse(graph)
    assert any(name.endswith(".out") for name in operations(graph))
    for _ in range(2):
        for got, wanted in zip(graph(x, w), function(x, w), strict=True):
            assert torch.equal(got, wanted)
        assert torch.equal(x, given[0]) and torch.equal(w, given[1])


def test_results_of_one_call_survive_the_next() -> None:
    def function(nest: dict[str, Tensor]) -> tuple[dict[str, Tensor], None]:
        step = nest["p"] - nest["lr"] * (nest["p"] @ nest["p"])
        return {"p": step - nest["lr"] * step, "zero": torch.zeros_like(nest["p"])}, None

    graphs = Graphs("trace")
    nests = [{"p": torch.randn(4, 4), "lr": torch.tensor(rate)} for rate in (0.1, 0.2, 0.3)]
    results = [graphs.call("f", function, nest)[0] for nest in nests]
    for nest, result in zip(nests, results, strict=True):
        wanted, _ = function(nest)
        assert torch.equal(result["p"], wanted["p"]) and torch.equal(result["zero"], wanted["zero"])


def step(x: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
    """New weights of three clients and what they changed; then a mean, and what came in."""
    w2, b2 = w - 0.1 * (x.transpose(1, 2) @ x), b - 0.1 * x.sum(1)
    return [w2 - w, b2 - b, w2.sum((1, 2)), w]


@pytest.mark.parametrize("fuses", [False, True])
def test_first_results_lie_side_by_side(fuses: bool) -> None:
    x, w, b = torch.randn(3, 5, 4), torch.randn(3, 4, 4), torch.randn(3, 4)
    graph = make_fx(step)(x, w, b)
    simplify(graph, [x, w, b])
    reuse(graph)
    abreast(graph, fuses)
    given = [y.clone() for y in (x, w, b)]
    got, other = graph(x, w, b), graph(x + 1, w, b)
    for mine, wanted in zip(got, step(x, w, b), strict=True):
        assert torch.equal(mine, wanted)
    for mine, wanted in zip(other, step(x + 1, w, b), strict=True):
        assert torch.equal(mine, wanted)
    assert all(torch.equal(y, z) for y, z in zip((x, w, b), given, strict=True))
    rows = tree.rows({"w": got[0], "b": got[1]})
    assert rows is not None and torch.equal(rows, torch.cat([got[0].flatten(1), got[1]], 1))
    assert not {got[2].data_ptr(), got[3].data_ptr()} & {rows.data_ptr()}


@pytest.mark.parametrize("mode", ["trace", pytest.param("compile", marks=pytest.mark.slow)])
def test_recordings_lay_what_is_sent_side_by_side(mode: Any) -> None:
    graphs = Graphs(mode)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x, w, b = (torch.randn(s, generator=g) for s in ((3, 5, 4), (3, 4, 4), (3, 4)))

        def function(nest: Any) -> tuple[Any, None]:
            dw, db, total, _ = step(nest["x"], nest["w"], nest["b"])
            return {"delta": {"w": dw, "b": db}, "total": total}, None

        got, _ = graphs.call("f", function, {"x": x, "w": w, "b": b})
        assert tree.rows(got["delta"]) is not None
        for mine, wanted in zip(
            (*got["delta"].values(), got["total"]), step(x, w, b), strict=False
        ):
            assert torch.allclose(mine, wanted, atol=1e-6)


def test_a_result_that_others_need_as_it_lies_stays() -> None:
    """Of another type, turned, the same twice, or read by an operation that wants its layout."""

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        a = x * 2.0
        return [a, a.view(-1, 4) @ y, (x + 1.0).transpose(1, 2), x * 3.0, x * 3.0]

    x, y = torch.randn(3, 2, 4), torch.randn(4, 4)
    for fuses in (False, True):
        graph = make_fx(function)(x, y)
        simplify(graph, [x, y])
        reuse(graph)
        abreast(graph, fuses)
        for mine, wanted in zip(graph(x, y), function(x, y), strict=True):
            assert torch.equal(mine, wanted)
