"""Curriculum FL: each client trains on its easy samples first and opens the others step by step.

Vahidian, Kadaveru, Baek, Wang, Kungurtsev, Chen, Shah, Lin, "When do curricula work in federated
learning?", ICCV 2023, arXiv:2212.12712. Claim: ordered learning largely alleviates the harm of
unlike clients, the more so the more they differ; choosing clients by the same idea (the schedule
of the same name) adds to it.

    score:  s_j = l(w_s; x_j, y_j), of the download (G), the last own model (L), or both summed (LG)
    order:  curr, s rising;  anti, s falling;  rand, by chance
    open:   k = pace(t) of n samples, at least `least`;  t steps are taken of T = E ceil(n / batch)
    train:  one shuffled pass over the first k, then a new k; until t >= T at the end of a pass

The pacing forms (linear, quad, root, step, exp, log) are in `federated.pacing`; those are of Wu,
Dyer and Neyshabur, "When do curricula work?", ICLR 2021. Models are averaged as in FedAvg. The last
pass may go beyond T, as in the authors' code. b = 1 is FedAvg to the bit: the code's T, with
n // batch + 1 steps in an epoch, has an extra pass where the batch divides n, and is not taken. A
client without a last own model scores by the download. Scoring takes a forward pass over all
samples a visit, which virtual time leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue, seeds
from isthmus.contracts import Update
from isthmus.federated.method import Data, Knobs, Method
from isthmus.federated.pacing import Form, Way, ordered, pace, shuffled
from isthmus.learn.phase import Carry, Phase, Plan, Visit
from isthmus.models.bind import bind
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

LAST, TRAINED = "last/", "trained"
_ORDER = 1 << 32
"""The child of a phase's key that orders by chance; those before it are the passes."""


class Settings(Knobs):
    """order and pacing: which way, in which form; a: share of the steps after which all is open;
    b: share open at first; score: of which model; least: samples that are always open."""

    order: Way = "curr"
    pacing: Form = "linear"
    a: float = Field(0.8, ge=0.0, le=1.0)
    b: float = Field(0.2, gt=0.0, le=1.0)
    score: Literal["G", "L", "LG"] = "G"
    least: int = Field(32, ge=1)


@catalogue.register("curriculum-fl", place="method", status="not-reproduced")
class CurriculumFL(Method):
    """Overrides B; for scores by the own model also keeps it (U)."""

    Settings = Settings

    def keep(self, tensors: Tree) -> Tree:
        kept = super().keep(tensors)
        if self.knobs.score == "G":
            return kept
        own = {LAST + name: tensors[name] for name in self.names.shared}
        return {**kept, **own, TRAINED: torch.zeros((), dtype=torch.int64)}

    def plan(self, phase: Phase, visit: Visit, data: Data, kept: Tree) -> Plan:
        n = len(next(iter(data.columns.values())))
        if not n:
            return super().plan(phase, visit, data, kept)
        scores = np.zeros(n) if self.knobs.order == "rand" else self.scores(data, kept)
        order = ordered(scores, self.knobs.order, seeds.fold(data.key, _ORDER))
        batch = self.local.batch or n
        total = self.local.steps or self.local.epochs * -(-n // batch)
        steps: list[np.ndarray] = []
        opening = 0
        while len(steps) < total:
            k = pace(self.knobs.pacing, len(steps), total, n, self.knobs.a, self.knobs.b)
            opened = np.sort(order[: max(k, min(n, self.knobs.least))])
            if self.local.batch:
                opened = opened[shuffled(seeds.fold(data.key, opening), len(opened))]
            steps += [opened[i : i + batch] for i in range(0, len(opened), batch)]
            opening += 1
        return padded(steps, batch)

    def scores(self, data: Data, kept: Tree) -> np.ndarray:
        """The loss of each sample `[n]`; without dropout."""
        local = {name: kept[name] for name in self.names.local}
        own = {name: kept.get(LAST + name) for name in self.names.shared}
        trained = self.knobs.score != "G" and bool(kept[TRAINED])
        total = np.zeros(len(next(iter(data.columns.values()))))
        if self.knobs.score != "L" or not trained:
            total += losses(self.stage.loss, data.module, {**data.down, **local}, data.columns)
        if trained:
            last = {**data.down, **local, **own}
            total += losses(self.stage.loss, data.module, last, data.columns)
        return total

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        if self.knobs.score == "G":
            return update, local
        own = {LAST + name: params[name] for name in self.names.shared}
        return update, {**local, **own, TRAINED: torch.ones_like(kept[TRAINED])}


def losses(
    loss: Any, module: nn.Module, tensors: Tree, columns: Mapping[str, Tensor]
) -> np.ndarray:
    """The task's loss of each item alone, float64 `[n]`, of a module in eval mode."""
    model = bind(module, tensors).eval()
    one = next(x for x in tensors.values() if x.is_floating_point()).new_ones(1)

    def each(item: Tree) -> Tensor:
        return loss(model, Batch({name: x[None] for name, x in item.items()}, one))[0]

    with torch.no_grad():
        return torch.vmap(each)(dict(columns)).double().numpy()


def padded(steps: list[np.ndarray], width: int) -> Plan:
    """Batches of unequal width as a plan `[T, width]`."""
    index = torch.zeros(len(steps), width, dtype=torch.int64)
    weight = torch.zeros(len(steps), width)
    for t, step in enumerate(steps):
        index[t, : len(step)] = torch.from_numpy(step)
        weight[t, : len(step)] = 1.0
    return Plan(index, weight)
