"""Named tensors: every function against plain arithmetic, on tensors of several ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isthmus import tree
from isthmus.tree import Tree

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)


def draw(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float64) -> Tree:
    g = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(s, generator=g, dtype=dtype) for i, s in enumerate(shapes)}


def some(seed: int = 0) -> Tree:
    return draw([(2, 3), (), (4,)], seed)


@given(SHAPES, st.integers(1, 4))
def test_flatten_and_back(shapes: list[tuple[int, ...]], n: int) -> None:
    one = draw(shapes, 1)
    flat = tree.flatten(one)
    assert flat.shape == (sum(x.numel() for x in one.values()),)
    assert tree.equal(tree.unflatten(flat, tree.layout(one)), one)
    many = [draw(shapes, i) for i in range(n)]
    stacked = tree.stack(many)
    rows = tree.flatten_stacked(stacked)
    assert all(torch.equal(rows[i], tree.flatten(many[i])) for i in range(n))
    again = tree.unflatten(rows, tree.layout(stacked, stacked=True))
    assert tree.equal(again, stacked)
    assert all(tree.equal(a, b) for a, b in zip(tree.unstack(stacked), many, strict=True))


def test_layout_names_places_in_the_order_of_the_tree() -> None:
    slots = tree.layout({"b": torch.zeros(2, 3), "a": torch.zeros(())})
    assert slots == (tree.Slot("b", 0, 6, (2, 3)), tree.Slot("a", 6, 7, ()))
    flat = torch.arange(7.0)
    views = tree.unflatten(flat, slots)
    views["a"] += 1.0
    assert flat[6] == 7.0 and views["b"][1, 0] == 3.0


def test_rows_are_one_view_of_tensors_that_lie_side_by_side() -> None:
    slots = tree.layout(some())
    for n, step, before in ((3, 14, 2), (3, 11, 0), (1, 14, 3)):
        matrix = torch.randn(n, step)[:, before : before + 11]
        stacked = tree.unflatten(matrix, slots)
        found = tree.rows(stacked)
        assert found is not None and torch.equal(found, matrix)
        found += 1.0
        assert tree.equal(tree.unflatten(matrix, slots), stacked)
        weights = torch.linspace(0.5, 2.0, n)
        apart = tree.clone(stacked)
        means = tree.weighted_mean(stacked, weights), tree.weighted_mean(apart, weights)
        for name, x in apart.items():
            exact = torch.einsum("n,n...->...", weights.double(), x.double())
            assert all(mean[name].shape == x.shape[1:] for mean in means)
            assert all(torch.allclose(mean[name].double(), exact, atol=1e-6) for mean in means)


def test_rows_are_none_where_any_tensor_lies_elsewhere() -> None:
    block = torch.randn(3, 12)
    side = {"a": block[:, :4], "b": block[:, 4:10].view(3, 2, 3)}
    assert tree.rows(side) is not None
    assert tree.rows({}) is None
    assert tree.rows(tree.clone(side)) is None
    assert tree.rows({"b": side["b"], "a": side["a"]}) is None  # in another order
    assert tree.rows({"a": side["a"], "b": block[:, 5:11]}) is None  # with a gap
    assert tree.rows({"a": side["a"], "b": side["b"].transpose(1, 2)}) is None  # turned
    assert tree.rows({"a": side["a"], "b": block[:2, 4:10]}) is None  # of fewer rows
    assert tree.rows({"a": block[:1, :4].expand(3, 4), "b": block[:1, 4:10].expand(3, 6)}) is None
    halves = block.numpy()
    near = {"a": torch.from_numpy(halves[:, :4]), "b": torch.from_numpy(halves[:, 4:10])}
    assert tree.rows(near) is None  # neighbours, but not one storage
    assert tree.rows({"a": side["a"], "b": side["b"].view(torch.int32)}) is None


def test_arithmetic() -> None:
    a, b = some(1), some(2)
    for name, x in a.items():
        y = b[name]
        assert torch.equal(tree.add(a, b)[name], x + y)
        assert torch.equal(tree.add(a, b, alpha=-2.5)[name], torch.add(x, y, alpha=-2.5))
        assert torch.equal(tree.sub(a, b)[name], x - y)
        assert torch.equal(tree.scale(a, 3.0)[name], 3.0 * x)
        assert torch.equal(tree.zeros_like(a)[name], torch.zeros_like(x))
        assert torch.equal(tree.tree_map(lambda p, q, r: p * q - r, a, b, a)[name], x * y - x)
    everything = np.concatenate([x.numpy().ravel() for x in a.values()])
    assert float(tree.norm(a)) == pytest.approx(np.linalg.norm(everything), rel=1e-6)


def test_clone_shares_nothing() -> None:
    a = {"w": torch.ones(3, requires_grad=True)}
    b = tree.clone(a)
    b["w"].add_(1.0)
    assert a["w"].sum() == 3.0 and not b["w"].requires_grad


def test_row_is_a_view_and_stack_is_a_copy() -> None:
    a, b = some(1), some(2)
    stacked = tree.stack([a, b])
    tree.row(stacked, 1)["t2"].zero_()
    assert not stacked["t2"][1].any() and b["t2"].all() and torch.equal(stacked["t2"][0], a["t2"])


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=5))
def test_weighted_mean_is_a_weighted_sum(weights: list[float]) -> None:
    many = [some(i) for i in range(len(weights))]
    got = tree.weighted_mean(tree.stack(many), torch.tensor(weights, dtype=torch.float64))
    for name in many[0]:
        expected = sum((w * x[name] for w, x in zip(weights, many, strict=True)), torch.zeros(()))
        torch.testing.assert_close(got[name], expected.to(torch.float64), rtol=1e-12, atol=1e-12)


def test_nbytes_and_equal() -> None:
    a = {"w": torch.zeros(3, dtype=torch.float64), "i": torch.zeros(2, 2, dtype=torch.int32)}
    assert tree.nbytes(a) == 3 * 8 + 4 * 4
    assert tree.equal(a, tree.clone(a))
    others: list[dict[str, Tensor]] = [
        {"w": a["w"]},
        {**a, "w": a["w"].float()},
        {**a, "w": a["w"].view(3, 1)},
        {**a, "i": a["i"] + 1},
        {**a, "x": a["w"]},
    ]
    assert not any(tree.equal(a, other) or tree.equal(other, a) for other in others)
