"""Fewer operations with the same results: what vmap and grad leave behind in a recording.

A recording of a small model is mostly views that change nothing, constants made anew and values
computed twice. Each rule here keeps every bit of the result; shapes are those that the recording
was made for.
"""

from __future__ import annotations

import math
from itertools import accumulate
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
_ELEMENTWISE = {*_IN_PLACE, *_IN_PLACE.values()}
_LINE = 16
"""Rows begin at a multiple of these many entries: a line of the processor's cache."""
_FRESH = {aten.bmm.default, aten.mm.default, *_ELEMENTWISE}
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


def abreast(graph: GraphModule, fuses: bool = False) -> None:
    """Lay the first results, while they are of one type and one row a client, side by side into
    one matrix `[n, d]`, as a message has them: what is sent together lies together.

    Who `fuses` operations (the inductor) writes the parts of a `cat` where they belong. Others
    would copy them, and elementwise results are told where to go instead.
    """
    output: Any = next(node for node in graph.graph.nodes if node.op == "output")
    first: list[Any] = []
    for node in output.args[0]:
        if node in first or not _movable(node, fuses) or _kind(node) != _kind((first or [node])[0]):
            break
        first.append(node)
    if len(first) < 2:
        return
    rows, dtype, device = _kind(first[0])
    widths = [math.prod(_laid(node)[0][1:]) for node in first]
    step = sum(widths) if fuses else -(-sum(widths) // _LINE) * _LINE
    call = graph.graph.call_function
    place = {node: i for i, node in enumerate(graph.graph.nodes)}
    with graph.graph.inserting_before(output if fuses else min(first, key=place.__getitem__)):
        if fuses:
            parts = zip(first, widths, strict=True)
            flat = [call(aten.view.default, (node, [rows, width])) for node, width in parts]
            matrix = call(aten.cat.default, (flat, 1))
        else:
            like = {"dtype": dtype, "device": device}
            matrix = call(aten.empty.memory_format, ([rows, step],), like)
        views: list[Any] = []
        for node, start in zip(first, accumulate(widths, initial=0), strict=False):
            shape, strides, _ = _laid(node)
            given = (matrix, [*shape], [step, *strides[1:]], start)
            views.append(call(aten.as_strided.default, given))
    if fuses:
        output.args = ([*views, *output.args[0][len(views) :]],)
    else:
        for node, view in zip(first, views, strict=True):
            node.target = _IN_PLACE.get(node.target, node.target)
            node.kwargs = {**node.kwargs, "out": view}
    graph.recompile()


def _movable(node: Any, fuses: bool) -> bool:
    """True for a computed result with a row for each client that may be laid elsewhere; unless
    it is copied, it must be elementwise, and nobody may rely on how it lies."""
    if not isinstance(node, Node) or node.op != "call_function" or _laid(node) is None:
        return False
    shape, strides, _ = _laid(node)
    if len(shape) < 2 or tuple(strides) != torch.empty(shape, device="meta").stride():
        return False
    users = [user.target for user in node.users if user.op != "output"]
    return fuses or all(target in _ELEMENTWISE for target in [node.target, *users])


def _kind(node: Any) -> Any:
    """How many rows a result has, their type and where they are."""
    meta = node.meta["val"]
    return meta.shape[0], meta.dtype, meta.device


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
