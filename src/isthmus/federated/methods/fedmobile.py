"""FedMobile: phones learn stage after stage from new, drifting and mostly unlabelled data.

"Incremental semi-supervised federated learning for health inference via mobile sensing",
arXiv:2312.12666. Claim: ahead of the selected baselines on a real data set of influenza-like
symptoms, without keeping old data.

    stage s:  only items of stage s;  teacher f' = the global model at the end of stage s - 1
    loss:     CE on labelled  +  lam_u C on all  +  lam_k [s > 0] T^2 KL(f'(x) / T || f(x) / T)
    C:        fixmatch, q = softmax f(weak x):  [max q > threshold] CE(f(strong x), argmax q);
              mse:  |softmax f(weak x) - softmax f(strong x)|^2;  means over all items
    server:   w <- w + sum_i m_i (w_i - w) / sum_i m_i,   m_i = n_labelled + gamma n_unlabelled

(reconstructed): the abstract and keywords alone were read, which name federated and incremental
learning, distillation and consistency; the forms are those of Sohn et al., "FixMatch", NeurIPS
2020, and Hinton, Vinyals and Dean, arXiv:1503.02531. A stage is `rounds` rounds. A client's teacher
is the first model that it is sent in a stage: for whoever is there in the first round of a stage,
the global model at the end of the last one.

Columns `stage` (0, 1, ...; all items belong to every stage without it) and `labelled` (0 or 1; all
are without it). What an unlabelled item has in any column but `x` is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from isthmus import catalogue, seeds, tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.errors import InputError
from isthmus.federated.method import Data, Knobs, Method, State
from isthmus.federated.sensing import seen
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Plan, Visit
from isthmus.models.bind import bind
from isthmus.tasks.contract import Batch, weighted_mean
from isthmus.tasks.losses import cross_entropy
from isthmus.tree import Tree

TEACHER, STAGE, SHARE = "teacher/", "stage", "fedmobile/share"


class Settings(Knobs):
    """lam_u, lam_k: weights of consistency and distillation; T: its temperature; threshold: of a
    pseudo-label; weak, strong: jitter of the two views; scale, warp, drop: what the strong one has
    besides; gamma: what an unlabelled item weighs; rounds: of a stage; stages: their number."""

    lam_u: float = Field(1.0, ge=0.0)
    lam_k: float = Field(0.5, ge=0.0)
    T: float = Field(2.0, gt=0.0)
    consistency: Literal["fixmatch", "mse"] = "fixmatch"
    threshold: float = Field(0.8, ge=0.0, le=1.0)
    weak: float = Field(0.05, ge=0.0)
    strong: float = Field(0.15, ge=0.0)
    scale: float = Field(0.0, ge=0.0)
    warp: float = Field(0.0, ge=0.0, le=1.0)
    drop: float = Field(0.0, ge=0.0, lt=1.0)
    gamma: float = Field(1.0, ge=0.0)
    rounds: int = Field(12, ge=1)
    stages: int = Field(3, ge=1)


@catalogue.register("fedmobile", place="method", status="not-reproduced")
class FedMobile(Method):
    """Overrides S (the teacher), B (the stage), L, P (counts items), U and V (weights)."""

    Settings = Settings

    def keep(self, tensors: Tree) -> Tree:
        teacher = {TEACHER + name: tensors[name] for name in self.names.shared}
        return {**super().keep(tensors), **teacher, STAGE: torch.zeros((), dtype=torch.int64)}

    def stage_of(self, visit: Visit) -> Tensor:
        """The stage of a visit's round: 0, ..., stages - 1."""
        s = torch.div(visit.round - 1, self.knobs.rounds, rounding_mode="floor")
        return s.clamp(0, self.knobs.stages - 1)

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        s = self.stage_of(visit)
        turned = s > kept[STAGE]
        teacher = {n: torch.where(turned, down[n], kept[TEACHER + n]) for n in self.names.shared}
        zero = torch.zeros_like(visit.examples)
        on = (s > 0).to(zero.dtype)
        return params, {"teacher": teacher, "on": on, "labelled": zero, "unlabelled": zero}

    def plan(self, phase: Phase, visit: Visit, data: Data, kept: Tree) -> Plan:
        s = int(self.stage_of(visit))
        if s < int(kept[STAGE]):
            raise InputError("stage", s, f"{int(kept[STAGE])} or later: older items are gone")
        stage = data.columns.get("stage")
        if stage is None:
            return super().plan(phase, visit, data, kept)
        mine = torch.nonzero(stage == s).flatten()
        if not len(mine):
            return Plan(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1))
        many = self.local.plans(np.array([data.key]), np.array([len(mine)]))
        return Plan(mine[many.index[0]], many.weight[0])

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        if "x" not in batch.columns:
            raise InputError("task", "no column x", "inputs in one column x with method fedmobile")
        value, aux = super().loss(model, labelled(batch), carry)
        if self.knobs.lam_u:
            each = self.consistent(model, batch)
            value = value + self.knobs.lam_u * weighted_mean(each, batch.weight)
        if self.knobs.lam_k and self.knobs.stages > 1:
            f, t = model(batch["x"]), bind(model, carry["teacher"], batch.key)(batch["x"]).detach()
            each = distance(t, f, self.knobs.T)
            value = value + self.knobs.lam_k * carry["on"] * weighted_mean(each, batch.weight)
        return value, aux

    def consistent(self, model: Any, batch: Batch) -> Tensor:
        """C of each item, `[b]`."""
        k, x = self.knobs, batch["x"]
        weak = model(seen(x, seeds.fold(batch.key, 1), k.weak))
        strong = model(seen(x, seeds.fold(batch.key, 2), k.strong, k.scale, k.warp, k.drop))
        if k.consistency == "mse":
            return (weak.softmax(-1) - strong.softmax(-1)).square().sum(-1)
        sure, q = weak.detach().softmax(-1).max(-1)
        return torch.where(sure > k.threshold, cross_entropy(strong, q), 0.0)

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        params, opt, carry = super().step(grad, params, opt, carry, batch)
        n, known = (batch.weight > 0).to(batch.weight.dtype), mask(batch)
        counted = {
            "labelled": carry["labelled"] + (n * known).sum(),
            "unlabelled": carry["unlabelled"] + (n * (1.0 - known)).sum(),
        }
        return params, opt, {**carry, **counted}

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        passes = self.local.epochs if self.local.steps is None else 1
        counted = carry["labelled"] + self.knobs.gamma * carry["unlabelled"]
        share = counted / (passes * visit.examples.clamp_min(1.0))
        delta = {name: share * x for name, x in update.delta.items()}
        teacher = {TEACHER + name: x for name, x in carry["teacher"].items()}
        kept = {**local, **teacher, STAGE: torch.maximum(self.stage_of(visit), kept[STAGE])}
        return Update(delta={**delta, SHARE: share.view(1)}), kept

    def nothing(self, state: State) -> Reduced:
        zero = tree.zeros_like(state["shared"])
        return Reduced({**zero, SHARE: next(iter(zero.values())).new_zeros(1)})

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        share = reduced.tensors[SHARE]
        step = {n: reduced.tensors[n] / (share + (share == 0)) for n in state["shared"]}
        return {**state, "shared": tree.add(state["shared"], step)}


def mask(batch: Batch) -> Tensor:
    """1 for each labelled item of a batch, 0 for the others, `[b]`."""
    known = batch.columns.get("labelled")
    one = torch.ones_like(batch.weight)
    return one if known is None else torch.where(known > 0, one, 0.0)


def labelled(batch: Batch) -> Batch:
    """The batch for the supervised loss: unlabelled items weigh nothing, and have zeros in every
    column but `x`."""
    if "labelled" not in batch.columns:
        return batch
    known = mask(batch)

    def hidden(column: Tensor) -> Tensor:
        there = known.view(-1, *[1] * (column.ndim - 1)) > 0
        return torch.where(there, column, torch.zeros_like(column))

    columns = {n: x if n == "x" else hidden(x) for n, x in batch.columns.items()}
    return Batch(columns, batch.weight * known, batch.key)


def distance(teacher: Tensor, student: Tensor, T: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits `[b, C]`, `[b]`.

    >>> distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), 2.0)
    tensor([0.])
    """
    p, q = F.log_softmax(teacher / T, -1), F.log_softmax(student / T, -1)
    return T**2 * (p.exp() * (p - q)).sum(-1)
