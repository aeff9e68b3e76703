"""Servers that learn a small synthetic set from the trajectory of their own models.

Trajectory matching (Cazenavette et al., CVPR 2022) at the server of a federation (Pi et al.,
"DynaFed", CVPR 2023): training on the set for M steps is to lead from one global model to one E
rounds later. The server uses no data but the models that it has sent.

    u_0 = w_s,  u <- u - lr~ grad CE(f_u(x~), softmax y~)  M times,  s drawn from 0 .. R0 - E
    L = |u_M - w_{s+E}|^2 / |w_s - w_{s+E}|^2,  Adam on x~, y~ and log lr~ through the M steps

x~ starts from noise; the logits y~ start at 3 for the item's class and at 0 for the others
(reconstructed), the classes in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.contracts import Meta, Reduced
from isthmus.errors import InputError
from isthmus.federated.method import Knobs, Method, State
from isthmus.models.bind import bind
from isthmus.models.optim import adam
from isthmus.tree import Tree

Loss = Callable[[Tree, Tensor, Tensor], Tensor]
"""`loss(u, x, y)`: of the network with tensors `u` on inputs x and class probabilities y."""

_FIRST = 3.0
"""The logit with which a class starts."""


class Settings(Knobs):
    """R0: rounds before the set is learned; E: rounds that M steps on it stand for; ipc: items per
    class; iterations of Adam, with steps lr_x and lr_y; F: rounds between two sets (0: one set);
    shape: of one input, where the network does not begin with a linear layer.

    The defaults fit a CPU; DynaFed's are E 3, M 20, ipc 15 and 3000 iterations.
    """

    R0: int = Field(20, ge=1)
    E: int = Field(4, ge=1)
    M: int = Field(8, ge=1)
    ipc: int = Field(5, ge=1)
    iterations: int = Field(400, ge=1)
    lr_x: float = Field(0.05, gt=0.0)
    lr_y: float = Field(0.01, gt=0.0)
    F: int = Field(0, ge=0)
    shape: tuple[int, ...] = ()


@dataclass(eq=False)
class Distilled(Method):
    """Keeps the last R0 + 1 global models, and at round R0 learns the set: `state["synthetic"]`.

    `module` is the network without its state: what it computes is asked by `bind`.
    """

    module: Any = None

    Settings: ClassVar[type[Knobs]] = Settings

    def __post_init__(self) -> None:
        k = self.knobs
        if k.E > k.R0:
            raise InputError("settings.E", k.E, f"at most settings.R0, which is {k.R0}")

    def init(self, tensors: Tree) -> State:
        state = super().init(tensors)
        shape, classes = measures(self.module, self.knobs.shape)
        like = next(iter(state["shared"].values()))
        n = self.knobs.ipc * classes
        synthetic = {"x": like.new_zeros(n, *shape), "y": like.new_zeros(n, classes)}
        longest = self.knobs.R0 + 1
        return {
            **state,
            "synthetic": {**synthetic, "lr": like.new_zeros(())},
            "trajectory": {n: torch.stack([x] * longest) for n, x in state["shared"].items()},
            "count": {"rounds": torch.tensor(0), "sets": torch.tensor(0)},
        }

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        new = super().server(state, reduced, meta)
        rounds = int(state["count"]["rounds"]) + 1
        sets = int(state["count"]["sets"])
        trajectory = {
            n: torch.cat([held[1:], new["shared"][n].unsqueeze(0)])
            for n, held in state["trajectory"].items()
        }
        synthetic, since = state["synthetic"], rounds - self.knobs.R0
        if since == 0 or (since > 0 and self.knobs.F and since % self.knobs.F == 0):
            synthetic = self.distil(trajectory, seeds.key("distil", sets))
            sets += 1
        count = {"rounds": torch.tensor(rounds), "sets": torch.tensor(sets)}
        return {**new, "synthetic": synthetic, "trajectory": trajectory, "count": count}

    def distil(self, trajectory: Tree, key: int) -> Tree:
        """The set that a trajectory gives: x, class probabilities y, and the rate lr."""
        held = self.knobs.ipc, *measures(self.module, self.knobs.shape)
        begun = noise(*held, next(iter(trajectory.values())).dtype, key)
        learned, _ = distil(self.loss_on, trajectory, begun, self.knobs, key)
        return {
            "x": learned["x"],
            "y": learned["y"].softmax(1),
            "lr": learned["log lr"].exp(),
        }

    def loss_on(self, u: Tree, x: Tensor, y: Tensor) -> Tensor:
        """The loss of the network with tensors `u` on a set of soft labels."""
        return soft_loss(bind(self.module, u), x, y)


def measures(module: nn.Module, shape: Sequence[int] = ()) -> tuple[tuple[int, ...], int]:
    """The shape of one input of a classifier, and the number of its classes.

    Raises `InputError` when `shape` is empty and the network does not begin with a linear layer.
    """
    layers = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    if not layers or not isinstance(layers[-1], nn.Linear):
        raise InputError("model", "no linear last layer", "a classifier that ends in one")
    first = layers[0]
    if not shape and not isinstance(first, nn.Linear):
        given = f"nothing, and the model begins with {type(first).__name__}"
        raise InputError("settings.shape", given, "the shape of one input, as [1, 8, 8]")
    width = (first.in_features,) if isinstance(first, nn.Linear) else ()
    return tuple(shape) or width, layers[-1].out_features


def soft_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of `model` on x `[n, ...]` against probabilities y `[n, C]`."""
    return -(y * F.log_softmax(model(x), 1)).sum(1).mean()


def noise(ipc: int, shape: tuple[int, ...], classes: int, dtype: torch.dtype, key: int) -> Tree:
    """A set before it is learned: `x`, logits `y`, and `log lr` of 0.1."""
    n = ipc * classes
    x = seeds.normal(seeds.fold(key, 0), (n, *shape), dtype)
    y = _FIRST * F.one_hot(torch.arange(n) % classes, classes).to(dtype)
    return {"x": x, "y": y, "log lr": torch.tensor(math.log(0.1), dtype=dtype)}


def matching(loss: Loss, start: Tree, goal: Tree, synthetic: Tree, steps: int) -> Tensor:
    """How far `steps` steps on the set leave `goal`: 1 for none taken, 0 for reached."""
    x, y, lr = synthetic["x"], synthetic["y"].softmax(1), synthetic["log lr"].exp()
    u = start
    for _ in range(steps):
        g = torch.func.grad(loss)(u, x, y)
        u = {name: v - lr * g[name] for name, v in u.items()}
    left = torch.stack([(v - goal[name]).square().sum() for name, v in u.items()]).sum()
    way = torch.stack([(v - goal[name]).square().sum() for name, v in start.items()]).sum()
    return left / way


def distil(
    loss: Loss, trajectory: Tree, begun: Tree, knobs: Settings, key: int
) -> tuple[Tree, list[float]]:
    """Learn the set on a trajectory `[R0 + 1, ...]`; the set, and the loss of each iteration."""
    last = len(next(iter(trajectory.values()))) - 1 - knobs.E
    draws = seeds.uniform(seeds.fold(key, 1), (knobs.iterations,), torch.float64)
    picks = (draws * (last + 1)).long().tolist()
    rules = {
        "x": adam(knobs.lr_x),
        "y": adam(knobs.lr_y),
        "log lr": adam(knobs.lr_x),
    }
    synthetic = dict(begun)
    states = {name: rule.init({name: begun[name]}) for name, rule in rules.items()}
    history: list[float] = []

    def objective(synthetic: Tree, s: int) -> Tensor:
        start, goal = tree.row(trajectory, s), tree.row(trajectory, s + knobs.E)
        return matching(loss, start, goal, synthetic, knobs.M)

    for s in picks:
        grads, value = torch.func.grad_and_value(objective)(synthetic, s)
        history.append(float(value))
        for name, rule in rules.items():
            own = {name: synthetic[name]}
            moved, states[name] = rule.update({name: grads[name]}, states[name], own)
            synthetic = {**synthetic, **moved}
    return {name: x.detach() for name, x in synthetic.items()}, history
