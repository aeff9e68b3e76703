"""Fewer operations with the same results: what vmap and grad leave behind in a recording.

A recording of a small model is mostly views that change nothing, constants made anew and values
computed twice. Each rule here keeps every bit of the result; shapes are those that the recording
was made for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

aten: Any = torch.ops.aten

_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.expand.default}
_SCALED = {aten.mul.Scalar, aten.div.Scalar, aten.mul.Tensor, aten.div.Tensor}
_TURNS = {aten.t.default, aten.transpose.int}
_IN_PLACE = {
    aten.mul.Tensor: aten.mul.out,
    aten.add.Tensor: aten.add.out,
    aten.sub.Tensor: aten.sub.out,
}
_FRESH = {aten.bmm.default, aten.mm.default, *_IN_PLACE, *_IN_PLACE.values()}
"""Operations whose result is memory of its own, no view of an argument's."""
_FROM_SHAPE = {aten.zeros_like.default: torch.zeros_like, aten.ones_like.default: torch.ones_like}


def simplify(graph: GraphModule, leaves: list[Tensor]) -> None:
    """Apply the rules to `graph` in place; `leaves` are tensors as it was recorded with."""
    with torch.no_grad():
        ShapeProp(graph).propagate(*leaves)
    seen: dict[Any, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        same = _unchanged(node) or _constant(graph, node)
        if same is None:
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            same = seen.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def reuse(graph: GraphModule) -> None:
    """Let elementwise operations write over an argument that nothing else needs.

    A cohort's weights are large, and memory that is asked for anew is slower than arithmetic.
    """
    nodes: list[Any] = list(graph.graph.nodes)
    for node in nodes:
        if node.op != "call_function" or node.target not in _IN_PLACE:
            continue
        for given in node.args[:2]:
            fresh = isinstance(given, Node) and given.target in _FRESH
            if fresh and len(given.users) == 1 and _laid(given) == _laid(node) is not None:
                node.target = _IN_PLACE[node.target]
                node.kwargs = {**node.kwargs, "out": given}
                break
    graph.recompile()


def _unchanged(node: Any) -> Any:
    """The node that this one only repeats: a view of the same shape, times 1, turned twice."""
    source: Any = node.args[0] if node.args else None
    if not hasattr(source, "target"):
        return None
    if node.target in _VIEWS:
        while source.target in _VIEWS and _laid(source.args[0]) == _laid(source):
            source = source.args[0]
        return source if _laid(source) == _laid(node) else None
    if node.target in _SCALED:
        one = isinstance(node.args[1], int | float) and node.args[1] == 1
        return source if one and _laid(source) == _laid(node) else None
    if node.target in _TURNS and source.target in _TURNS:
        first = source.args[0]
        return first if isinstance(first, Node) and _laid(first) == _laid(node) else None
    return None


def _laid(node: Any) -> Any:
    """Shape, strides and type of a node's result."""
    meta = node.meta.get("tensor_meta") if isinstance(node, Node) else None
    return None if meta is None else (meta.shape, meta.stride, meta.dtype)


def _constant(graph: GraphModule, node: Any) -> Any:
    """A result that depends on no value, computed once and kept."""
    if node.target is aten.scalar_tensor.default:
        value = torch.tensor(node.args[0], dtype=node.kwargs["dtype"])
    elif node.target in _FROM_SHAPE and _laid(node) is not None:
        meta = node.meta["tensor_meta"]
        like = torch.empty(meta.shape, dtype=meta.dtype)
        value = _FROM_SHAPE[node.target](like)
    else:
        return None
    name = f"_kept_{node.name}"
    graph.register_buffer(name, value)
    with graph.graph.inserting_before(node):
        kept = graph.graph.get_attr(name)
    kept.meta = dict(node.meta)
    return kept


def _frozen(args: Any) -> Any:
    """Arguments as something that can be compared; types told apart, as 1 == 1.0 == True."""
    if isinstance(args, list | tuple):
        return tuple(_frozen(arg) for arg in args)
    if isinstance(args, dict):
        return tuple((name, _frozen(arg)) for name, arg in args.items())
    return args if isinstance(args, Node) else (type(args), args)
