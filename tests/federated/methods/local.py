"""What the tests of layer-wise and module-wise learning share: gradients of a method's loss."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tests.federated import tiny
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.federated.method import Method
from isthmus.models.bind import bind
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

F64 = torch.float64


def method(name: str, module: Any = None, **settings: Any) -> Method:
    """A method as it is built for a small task, in float64."""
    task = tiny.task(module=None if module is None else lambda seed: module(seed).double())
    return tiny.federation(name, task, settings=settings).method


def batch(
    *shape: int, classes: int = 4, n: int = 7, seed: int = 5, weight: Tensor | None = None
) -> Batch:
    """Random inputs and labels; item i counts i + 1 times, so no mean is even."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=g, dtype=F64)
    y = torch.randint(0, classes, (n,), generator=g)
    w = torch.arange(1, n + 1, dtype=F64) if weight is None else weight
    return Batch({"x": x, "y": y}, w, torch.tensor(99))


def value(
    method: Method, module: nn.Module, given: Batch, carry: Any = None
) -> tuple[Tensor, Tree]:
    """The loss of a method at the module's tensors, still with its graph, and the leaves."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    carry = {"client": torch.tensor(3)} if carry is None else carry
    return method.loss(bind(module, leaves, key=given.key), given, carry)[0], leaves


def grads(method: Method, module: nn.Module, given: Batch, carry: Any = None) -> Tree:
    """What a step of the method would take for the gradient."""
    total, leaves = value(method, module, given, carry)
    got = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {n: g for n, g in zip(leaves, got, strict=True) if g is not None}


def mean(each: Tensor, given: Batch) -> Tensor:
    return (each * given.weight).sum() / given.weight.sum()


def graph(total: Tensor) -> set[str]:
    """The kinds of operations that `backward` would go through."""
    todo, seen, names = [total.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(type(node).__name__.rstrip("0123456789"))
            todo += [child for child, _ in node.next_functions]
    return names


class Alive(TorchDispatchMode):
    """Counts the storages of one size that are alive at once."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes, self.peak = nbytes, 0
        self.held: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() == self.nbytes:
                ref = StorageWeakRef(x.untyped_storage())
                self.held[ref.cdata] = ref
        self.held = {at: ref for at, ref in self.held.items() if not ref.expired()}
        self.peak = max(self.peak, len(self.held))
        return out


@contextmanager
def kept_for_backward() -> Iterator[list[Any]]:
    """The tensors that autograd saves while this is open; dead references are let go."""
    saved: list[Any] = []

    class Held:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    def pack(x: Tensor) -> Held:
        held = Held(x)
        saved.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.x):
        yield saved
