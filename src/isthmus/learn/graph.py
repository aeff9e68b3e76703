"""Pure functions of tensors, recorded once and replayed.

Running Python, vmap and grad anew for every step costs more than the arithmetic of a small
model. `Graphs.call` therefore records the tensor operations of a function the first time it
meets a set of shapes (`torch.fx.experimental.proxy_tensor.make_fx`) and replays them after,
through TorchScript's interpreter; `compile` hands them to the inductor instead.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from isthmus.errors import InputError, unknown
from isthmus.learn.simplify import abreast, reuse, simplify

Mode = Literal["none", "trace", "compile"]
MODES: tuple[Mode, ...] = ("none", "trace", "compile")

Nest = Any
"""A tensor, or a dict of nests with string names."""

_KEPT = 64
"""Recordings that are kept; the oldest goes first."""


def flatten(nest: Nest, leaves: list[Tensor]) -> Hashable:
    """Append the tensors of a nest to `leaves`; returns its structure."""
    if not isinstance(nest, dict):
        leaves.append(nest)
        return None
    parts: list[Any] = []
    for name, child in nest.items():
        if isinstance(child, dict):
            parts.append((name, flatten(child, leaves)))
        else:
            parts.append(name)
            leaves.append(child)
    return tuple(parts)


def unflatten(structure: Hashable, leaves: Sequence[Tensor], start: int = 0) -> tuple[Nest, int]:
    """The inverse of `flatten`: the nest, and the position after its last tensor."""
    if structure is None:
        return leaves[start], start + 1
    nest: dict[str, Nest] = {}
    for part in structure:  # type: ignore[attr-defined]
        if isinstance(part, str):
            nest[part] = leaves[start]
            start += 1
        else:
            name, child = part
            nest[name], start = unflatten(child, leaves, start)
    return nest, start


class Graphs:
    """Recordings of functions, by tag and by the shapes, strides and types of their tensors.

    `mode`: `none` calls the function as it is, `trace` replays its operations, `compile` runs
    them through the inductor. A function must be pure, must not branch on tensor values,
    and everything that may change between calls must be among its tensors or in its tag.
    """

    def __init__(self, mode: Mode = "none") -> None:
        if mode not in MODES:
            raise unknown("compile", mode, MODES)
        self.mode: Mode = mode
        self.seconds = 0.0
        self._kept: dict[Hashable, tuple[Callable[..., Any], Hashable, Any]] = {}

    def call(
        self, tag: Hashable, function: Callable[..., tuple[Nest, Any]], *nests: Nest
    ) -> tuple[Nest, Any]:
        """`function(*nests) -> (nest, static)`; `static` is remembered from the recording."""
        if self.mode == "none":
            return function(*nests)
        leaves: list[Tensor] = []
        structure = tuple([flatten(nest, leaves) for nest in nests])
        sizes = tuple([(x.shape, x.stride(), x.dtype) for x in leaves])
        slot = (tag, structure, sizes)
        found = self._kept.get(slot)
        if found is None:
            found = self._record(function, structure, leaves)
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[slot] = found
        run, shape, static = found
        with torch.no_grad():
            out = run(*leaves)
        return unflatten(shape, out)[0], static

    def _record(
        self, function: Callable[..., tuple[Nest, Any]], structure: Hashable, leaves: list[Tensor]
    ) -> tuple[Callable[..., Any], Hashable, Any]:
        shape: Hashable = None
        static: Any = None

        def flat(*tensors: Tensor) -> list[Tensor]:
            nonlocal shape, static
            nests, at = [], 0
            for part in structure:  # type: ignore[attr-defined]
                nest, at = unflatten(part, tensors, at)
                nests.append(nest)
            result, static = function(*nests)
            out: list[Tensor] = []
            shape = flatten(result, out)
            return out

        graph = make_fx(flat)(*leaves)
        simplify(graph, leaves)
        if self.mode == "compile":
            abreast(graph, fuses=True)
            return _compiled(graph, leaves), shape, static
        reuse(graph)
        abreast(graph)
        return _replayed(graph, leaves), shape, static


def _replayed(graph: torch.fx.GraphModule, leaves: list[Tensor]) -> Callable[..., Any]:
    """The operations run one after the other by TorchScript, whose interpreter costs less per
    operation than Python; or by Python where TorchScript cannot take them."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run: Any = torch.jit.trace(graph, tuple(leaves), check_trace=False, strict=False)
            return run
    except Exception:  # it raises many kinds, all meaning "not this graph"
        return graph.forward


_OPTIONS = {
    # The hashes of `seeds` multiply positions by 64-bit constants. Taken for an index, such a
    # product overruns the inductor's buffers (torch 2.13 on CPU), so it must stay a value.
    "constant_and_index_propagation": False,
    # Shapes, strides and types are what a recording is found by.
    "size_asserts": False,
    "alignment_asserts": False,
}


def _compiled(graph: torch.fx.GraphModule, leaves: list[Tensor]) -> Callable[..., Any]:
    from torch._inductor import compile as lower

    try:
        with torch.no_grad(), _libraries_quoted():
            run = cast(Callable[..., Any], lower(graph, [*leaves], options=_OPTIONS))
            run(*leaves)
    except Exception as error:  # the inductor raises many kinds, all meaning "not here"
        if "ompiler" in f"{type(error).__name__} {error}":
            raise InputError(
                "compile", "compile", "none or trace where no C++ compiler is found"
            ) from error
        raise
    return run


@contextmanager
def _libraries_quoted() -> Iterator[None]:
    """For a torch in a folder with a space in its name: the inductor (2.13) quotes that path for
    the compiler, but only on Windows for the linker."""
    from torch.utils import cpp_extension

    plain = cpp_extension.TORCH_LIB_PATH
    if os.name == "posix":
        cpp_extension.TORCH_LIB_PATH = shlex.quote(plain)
    try:
        yield
    finally:
        cpp_extension.TORCH_LIB_PATH = plain
