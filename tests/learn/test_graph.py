"""Recordings: the bits of the function, made anew when anything about a call changes."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.learn import graph
from isthmus.learn.graph import Graphs

LEAF = st.integers(0, 9).map(lambda i: torch.tensor(i))
NESTS = st.recursive(LEAF, lambda n: st.dictionaries(st.text("abc", max_size=2), n, max_size=3))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(x, b[name]) for name, x in a.items())
    return a is b


@given(NESTS, NESTS)
def test_flatten_and_back(nest: Any, other: Any) -> None:
    leaves: list[torch.Tensor] = []
    structure = graph.flatten(nest, leaves)
    got, used = graph.unflatten(structure, leaves)
    assert used == len(leaves) and same(got, nest)
    more: list[torch.Tensor] = []
    if graph.flatten(other, more) == structure:
        assert len(more) == len(leaves)
    hash(structure)


class Counted:
    """Counts how often its Python runs."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor, self.runs = factor, 0

    def __call__(self, nest: Any, other: Any) -> tuple[Any, int]:
        self.runs += 1
        total = sum(x.sum() for x in nest.values())
        grown = {name: torch.sin(x) * self.factor + total for name, x in nest.items()}
        return {"out": grown, "other": other["deep"]["x"] / 3.0}, len(nest)


def nests(seed: int, **shapes: tuple[int, ...]) -> tuple[Any, Any]:
    g = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(s, generator=g) for n, s in (shapes or {"a": (3,), "b": (2, 2)}).items()}
    return made, {"deep": {"x": torch.randn(4, generator=g)}}


def test_replaying_gives_the_same_bits_without_running_python() -> None:
    function, plain = Counted(), Counted()
    graphs = Graphs("trace")
    for seed in range(4):
        got, static = graphs.call("tag", function, *nests(seed))
        expected, count = plain(*nests(seed))
        assert static == count == 2
        assert torch.equal(got["other"], expected["other"]) and list(got) == ["out", "other"]
        assert all(torch.equal(x, expected["out"][n]) for n, x in got["out"].items())
    assert function.runs == 1
    none = Counted()
    assert Graphs("none").call("tag", none, *nests(0))[1] == 2 and none.runs == 1


def test_a_changed_tag_shape_stride_type_or_name_is_recorded_anew() -> None:
    graphs, function = Graphs("trace"), Counted()
    calls: list[tuple[Any, tuple[Any, Any]]] = [("tag", nests(0))]
    calls += [("other tag", nests(0)), (("tag", 1), nests(0))]
    calls += [("tag", nests(0, a=(4,), b=(2, 2))), ("tag", nests(0, a=(3,), c=(2, 2)))]
    calls += [("tag", nests(0, b=(2, 2), a=(3,))), ("tag", nests(0, a=(3,)))]
    wide, deep = nests(0)
    calls += [("tag", ({n: x.double() for n, x in wide.items()}, deep))]
    calls += [("tag", ({**wide, "b": wide["b"].T}, deep))]
    calls += [("tag", ({**wide, "a": torch.ones(()).expand(3)}, deep))]
    for number, (tag, call) in enumerate(calls, 1):
        got, _ = graphs.call(tag, function, *call)
        assert function.runs == number
        expected = Counted()(*call)[0]
        assert all(torch.equal(got["out"][n], x) for n, x in expected["out"].items())
    for tag, call in calls:
        graphs.call(tag, function, *call)
    assert function.runs == len(calls)


def test_a_later_call_changes_neither_earlier_results_nor_what_it_was_given() -> None:
    graphs, function = Graphs("trace"), Counted()
    first, _ = graphs.call("tag", function, *nests(1))
    before = {n: x.clone() for n, x in first["out"].items()}
    wide, deep = nests(2)
    given = {n: x.clone() for n, x in wide.items()}
    second, _ = graphs.call("tag", function, wide, deep)
    third, _ = graphs.call("tag", function, second["out"], deep)  # results go in again
    assert all(torch.equal(x, before[n]) for n, x in first["out"].items())
    assert all(torch.equal(x, given[n]) for n, x in wide.items())
    expected = Counted()(Counted()(wide, deep)[0]["out"], deep)[0]
    assert all(torch.equal(x, expected["out"][n]) for n, x in third["out"].items())


def test_the_oldest_recordings_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_KEPT", 2)
    graphs, function = Graphs("trace"), Counted()
    for tag in ("a", "b", "a", "c", "b", "c", "a"):
        graphs.call(tag, function, *nests(0))
    assert function.runs == 4  # a, b, c, and a once more


def test_recorded_results_carry_no_gradient_graph() -> None:
    leaf, deep = nests(0)
    leaf["a"].requires_grad_()
    got, _ = Graphs("trace").call("tag", Counted(), leaf, deep)
    assert not got["out"]["a"].requires_grad


def test_an_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"compile: tracing given.*nearest: trace"):
        Graphs("tracing")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 40, 1000])
def test_compiled_draws_are_the_same_bits(count: int) -> None:
    """64-bit products of positions are values, not places in memory."""

    def draws(key: torch.Tensor) -> tuple[Any, None]:
        child = seeds.fold(key, 3)
        both = {"bits": seeds.bits(child, (count,)), "uniform": seeds.uniform(child, (count,))}
        return both, None

    keys = torch.tensor([5, -7, 2**60])
    expected = torch.vmap(lambda x: draws(x)[0])(keys)
    got, _ = Graphs("compile").call(
        "draws", lambda k: (torch.vmap(lambda x: draws(x)[0])(k), 0), keys
    )
    assert torch.equal(got["bits"], expected["bits"])
    assert torch.equal(got["uniform"], expected["uniform"])


def test_the_linker_is_handed_a_folder_with_a_space_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import cpp_builder
    from torch.utils import cpp_extension

    where = "/a place/torch/lib"
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", where)
    with graph._libraries_quoted():
        options = cpp_builder.CppTorchOptions(vec_isa=cpp_builder.invalid_vec_isa)
        line = cpp_builder.CppBuilder("name", "source.cpp", options).get_command_line()
    assert f"-L{where}" in shlex.split(line)
    assert where == cpp_extension.TORCH_LIB_PATH
