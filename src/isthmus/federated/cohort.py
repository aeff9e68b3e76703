"""A cohort: the clients of one mix, what they were sent, and what they did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from isthmus import tree
from isthmus.contracts import Meta, Updates
from isthmus.federated.method import Data, Method
from isthmus.federated.path import Posted
from isthmus.learn.phase import Phase, Plan, Purpose, Visit
from isthmus.learn.visit import batch_statistics
from isthmus.tree import Tree


@dataclass(frozen=True)
class Owned:
    """Who owns which rows of the pool: client i has `order[starts[i]:starts[i + 1]]`."""

    order: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(parts: Sequence[np.ndarray]) -> Owned:
        sizes = np.array([0, *(len(part) for part in parts)])
        order = np.concatenate([*parts, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        return Owned(order, np.cumsum(sizes))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.diff(self.starts)

    def sizes(self, clients: np.ndarray) -> np.ndarray:
        return self._sizes[clients]

    def rows(self, client: int) -> np.ndarray:
        return self.order[self.starts[client] : self.starts[client + 1]]


@dataclass
class Cohort:
    """n clients about to work: who, from what, with which keys.

    `downs` are the decoded downloads, one object for all that were sent the same. `kept` is
    stacked `[n, ...]`. `steps` `[n]` is how many updates each is told to take, where a schedule
    tells them.
    """

    clients: np.ndarray
    keys: np.ndarray
    ranks: np.ndarray
    versions: np.ndarray
    round: int | np.ndarray
    lr: float
    downs: Sequence[Tree]
    kept: Tree
    purpose: Purpose = "train"
    steps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.clients)

    def take(self, rows: Sequence[int] | np.ndarray) -> Cohort:
        """The clients of the given rows, in that order."""
        rows = np.asarray(rows)
        index = torch.from_numpy(rows)
        return replace(
            self,
            clients=self.clients[rows],
            keys=self.keys[rows],
            ranks=self.ranks[rows],
            versions=self.versions[rows],
            downs=[self.downs[i] for i in rows.tolist()],
            kept={name: x[index] for name, x in self.kept.items()},
            round=self.round if isinstance(self.round, int) else self.round[rows],
            steps=None if self.steps is None else self.steps[rows],
        )


@dataclass
class Done:
    """What a cohort did: uploads before the path, what each keeps, and the work per client.

    Where the clients have walked their half of the path themselves, `updates` are empty and
    `posted` holds what they sent.
    """

    updates: Updates
    kept: Tree
    loss: Tensor
    aux: Tree
    steps: Tensor
    examples: Tensor
    gradients: Tensor
    posted: Posted | None = None

    def take(self, rows: np.ndarray) -> Done:
        """The work of the clients in these rows."""
        index = torch.from_numpy(rows)

        def pick(stacked: Tree) -> Tree:
            return {name: x[index] for name, x in stacked.items()}

        u = self.updates
        updates = Updates(pick(u.delta), pick(u.values), pick(u.buffers), pick(u.scalars))
        sums = (self.steps[index], self.examples[index], self.gradients[index])
        posted = None if self.posted is None else self.posted.take(rows)
        return Done(updates, pick(self.kept), self.loss[index], pick(self.aux), *sums, posted)

    def declared(self, cohort: Cohort, sizes: Sequence[int], needs_loss: bool) -> list[Meta]:
        """What each client of the cohort says of its upload; its loss where that is asked for."""
        n, round = len(cohort), cohort.round
        rounds = [round] * n if isinstance(round, int) else round.tolist()
        versions = [max(0, round - 1) for round in rounds]
        losses: list[float | None] = [None] * n
        if needs_loss:
            losses = np.nan_to_num(self.loss.double().numpy()).tolist()  # a diverged one is guarded
        steps = self.steps.numpy().astype(np.int64).tolist()
        ranks = [rank or None for rank in cohort.ranks.tolist()]
        columns = (cohort.clients.tolist(), rounds, versions, sizes, steps, ranks, losses)
        return list(map(Meta._make, zip(*columns, strict=True)))


@dataclass
class Ground:
    """What all clients stand on: the model, its frozen tensors, the pool of data, who owns it.

    `cost` is what a step of a phase costs, and what each example in it costs more, in gradients of
    the task's loss, by the phase's name; without it every gradient that a step takes is one an
    example.
    """

    module: nn.Module
    base: Tree
    columns: Tree
    owned: Owned
    cost: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def exact(self) -> bool:
        """True when steps use statistics of the batch, which padding would change."""
        return batch_statistics(self.module)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type in which the model computes."""
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    def gradients(self, phase: Phase, steps: Any, examples: Any, grads: int) -> Any:
        """The work of some steps over some examples, in gradients of the loss on one example."""
        step, example = self.cost.get(phase.name, (0.0, grads))
        return steps * step + examples * example

    def plan(
        self, method: Method, phase: Phase, cohort: Cohort, keys: np.ndarray | None = None
    ) -> Plan:
        """The plans of a cohort `[n, T, b]`, pointing into the pool; `keys` (of the phase), if
        given, stand in place of the cohort's own."""
        keys = cohort.keys if keys is None else keys
        sizes = self.owned.sizes(cohort.clients)
        if phase.plans is not None:
            plan = phase.plans(keys, sizes)
        elif type(method).plan is Method.plan:
            plan = method.local.plans(keys, sizes, cohort.steps)
        else:
            phased = replace(cohort, keys=keys)
            plan = _padded([self._own_plan(method, phase, phased, i) for i in range(len(cohort))])
        flat = plan.index.numpy() + self.owned.starts[cohort.clients][:, None, None]
        if not sizes.all():  # a client without items may point behind the last row
            flat = np.minimum(flat, len(self.owned.order) - 1)
        return Plan(torch.from_numpy(self.owned.order.take(flat)), plan.weight.to(self.dtype))

    def _own_plan(self, method: Method, phase: Phase, cohort: Cohort, i: int) -> Plan:
        rows = torch.from_numpy(self.owned.rows(int(cohort.clients[i])))
        columns = {name: x[rows] for name, x in self.columns.items()}
        down = {**self.base, **cohort.downs[i]}
        data = Data(columns, int(cohort.keys[i]), self.module, down)
        kept = {name: x[i] for name, x in cohort.kept.items()}
        return method.plan(phase, visit_of(cohort, self, i), data, kept)


def visits_of(cohort: Cohort, ground: Ground) -> dict[str, Tensor]:
    """The fields of `Visit` but its purpose, `[n]` each (steps are not known yet: zero)."""
    return fields_of(*table_of(cohort, ground))


def table_of(cohort: Cohort, ground: Ground) -> tuple[Tensor, Tensor]:
    """`visits_of` as two matrices, of integers and of real numbers: `[5, n]`, `[3, n]`."""
    whole = np.empty((5, len(cohort)), np.int64)
    whole[0], whole[1], whole[2] = cohort.clients, cohort.round, cohort.versions
    whole[3], whole[4] = cohort.ranks, cohort.keys
    real = np.empty((3, len(cohort)))
    real[0], real[1], real[2] = ground.owned.sizes(cohort.clients), 0.0, cohort.lr
    return torch.from_numpy(whole), tree.cast(torch.from_numpy(real), ground.dtype)


def fields_of(whole: Tensor, real: Tensor) -> dict[str, Tensor]:
    """The rows of a `table_of` by name."""
    names = ("client", "round", "version", "rank", "key", "examples", "steps", "lr")
    return dict(zip(names, [*whole.unbind(), *real.unbind()], strict=True))


def visit_of(cohort: Cohort, ground: Ground, i: int) -> Visit:
    """The visit of the i-th client of a cohort."""
    fields = {name: x[i] for name, x in visits_of(cohort, ground).items()}
    return Visit(**cast(Any, fields), purpose=cohort.purpose)


def _padded(own: Sequence[Plan]) -> Plan:
    """Plans of unequal length and width as one, with padding at weight 0."""
    steps = max(plan.index.shape[0] for plan in own)
    width = max(plan.index.shape[1] for plan in own)
    index = torch.zeros(len(own), steps, width, dtype=torch.int64)
    weight = torch.zeros(len(own), steps, width)
    for i, plan in enumerate(own):
        t, b = plan.index.shape
        index[i, :t, :b], weight[i, :t, :b] = plan.index, plan.weight
    return Plan(index, weight)


class Executor(Protocol):
    """Computes the visits of a cohort: `run` from start to finish, `params` until the phases are
    over, for the tensors `[n, ...]` that each client then has."""

    def run(self, method: Method, ground: Ground, cohort: Cohort) -> Done: ...

    def params(self, method: Method, ground: Ground, cohort: Cohort) -> Tree: ...
