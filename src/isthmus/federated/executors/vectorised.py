"""A whole cohort at once: the hooks mapped over clients by `torch.vmap`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from isthmus import seeds
from isthmus.contracts import Updates
from isthmus.federated.cohort import Cohort, Done, Ground, fields_of, table_of
from isthmus.federated.method import Method
from isthmus.learn.graph import Graphs, Mode, Nest
from isthmus.learn.phase import Phase, Plan, Purpose, Visit
from isthmus.learn.visit import (
    Whole,
    keys_within,
    short,
    stack_alike,
    vectorised,
)
from isthmus.tree import Tree


class Vectorised:
    """`chunk` clients at a time (0: all), recorded or compiled as `compile` says.

    Models whose steps use batch statistics have no masked form; their clients are grouped by
    the shape of their plans instead of padded.
    """

    def __init__(self, compile: Mode = "none", chunk: int = 0) -> None:
        self.graphs, self.chunk = Graphs(compile), chunk
        keep_freed_memory()

    def run(self, method: Method, ground: Ground, cohort: Cohort) -> Done:
        groups = self._groups(method, ground, cohort)
        if len(groups) == 1:
            return self._run(method, ground, cohort)
        done = [self._run(method, ground, cohort.take(rows)) for rows in groups]
        order = torch.from_numpy(np.argsort(np.concatenate(groups), kind="stable"))
        return joined(done, order)

    def params(self, method: Method, ground: Ground, cohort: Cohort) -> Tree:
        groups = self._groups(method, ground, cohort)
        made = [self._params(method, ground, cohort.take(rows)) for rows in groups]
        order = torch.from_numpy(np.argsort(np.concatenate(groups), kind="stable"))
        return {name: torch.cat([m[name] for m in made])[order] for name in made[0]}

    def _groups(self, method: Method, ground: Ground, cohort: Cohort) -> list[np.ndarray]:
        everyone = np.arange(len(cohort))
        groups = [everyone]
        if ground.exact:
            sizes = ground.owned.sizes(cohort.clients)
            groups = [everyone[sizes == size] for size in np.unique(sizes)]
        if self.chunk:
            groups = [
                rows[i : i + self.chunk] for rows in groups for i in range(0, len(rows), self.chunk)
            ]
        return groups

    def _run(self, method: Method, ground: Ground, cohort: Cohort) -> Done:
        table = table_of(cohort, ground)
        alike, apart = _downloads(cohort.downs)
        phases = method.phases(cohort.purpose)
        plans = self._plans(method, ground, cohort, phases)
        if len(phases) == 1 and short(plans[0], ground.exact):
            return self._at_once(method, ground, cohort, phases[0], plans[0], table, alike, apart)
        fields = fields_of(*table)
        worked = self._phases(method, ground, cohort, phases, plans, fields, alike, apart)
        finish = _Finish(method, cohort.purpose)
        fields["steps"] = worked.steps.to(ground.dtype)
        out, _ = self.graphs.call(
            finish.tag, finish, fields, worked.params, alike, apart, worked.carry, cohort.kept
        )
        updates = Updates(out["delta"], out["values"], out["buffers"], out["scalars"])
        return Done(updates, out["kept"], *worked[2:])

    def _params(self, method: Method, ground: Ground, cohort: Cohort) -> Tree:
        phases = method.phases(cohort.purpose)
        plans = self._plans(method, ground, cohort, phases)
        fields = fields_of(*table_of(cohort, ground))
        alike, apart = _downloads(cohort.downs)
        return self._phases(method, ground, cohort, phases, plans, fields, alike, apart).params

    def _plans(
        self, method: Method, ground: Ground, cohort: Cohort, phases: Sequence[Phase]
    ) -> list[Plan]:
        plans: list[Plan] = []
        for number, phase in enumerate(phases):
            keys = seeds.keys_of(cohort.keys, number)
            plans.append(ground.plan(method, phase, cohort, keys))
        return plans

    def _phases(
        self,
        method: Method,
        ground: Ground,
        cohort: Cohort,
        phases: Sequence[Phase],
        plans: Sequence[Plan],
        fields: dict[str, Tensor],
        alike: Tree,
        apart: Tree,
    ) -> _Worked:
        """`start` and the phases after it, of all clients at once."""
        start = _Start(method, cohort.purpose)
        begun, _ = self.graphs.call(start.tag, start, fields, alike, apart, cohort.kept)
        params, carry = begun["params"], begun["carry"]
        steps = examples = gradients = loss = torch.zeros(len(cohort), dtype=ground.dtype)
        aux: Tree = {}
        for number, (phase, plan) in enumerate(zip(phases, plans, strict=True)):
            work = vectorised(
                phase,
                ground.module,
                ground.base,
                params,
                carry,
                ground.columns,
                plan,
                seeds.keys_of(cohort.keys, number),
                fields["lr"][0],
                self.graphs,
                ground.exact,
            )
            params, carry, loss, aux = work.params, work.carry, work.loss, work.aux
            steps, examples = steps + work.steps, examples + work.examples
            more = ground.gradients(phase, work.steps.double(), work.examples.double(), work.grads)
            gradients = gradients + more
        return _Worked(params, carry, loss, aux, steps, examples, gradients)

    def _at_once(
        self,
        method: Method,
        ground: Ground,
        cohort: Cohort,
        phase: Phase,
        plan: Plan,
        table: tuple[Tensor, Tensor],
        alike: Tree,
        apart: Tree,
    ) -> Done:
        """A visit of one short phase, from `start` to `finish`, as one recording."""
        uneven = not plan.weight.numpy()[..., 0].all()  # a step that does nothing is all padding
        cost = ground.cost.get(phase.name)
        visit = _Visit(method, cohort.purpose, phase, ground.module, uneven, cost)
        out, _ = self.graphs.call(
            visit.tag,
            visit,
            {"whole": table[0], "real": table[1]},
            alike,
            apart,
            cohort.kept,
            ground.base,
            ground.columns,
            {"index": plan.index, "weight": plan.weight},
        )
        return Done(
            Updates(out["delta"], out["values"], out["buffers"], out["scalars"]),
            out["kept"],
            out["loss"],
            out["aux"],
            out["steps"],
            out["examples"],
            out["gradients"],
        )


class _Worked(NamedTuple):
    """What start and phases left, per client; the sums as in `Done`."""

    params: Tree
    carry: Any
    loss: Tensor
    aux: Tree
    steps: Tensor
    examples: Tensor
    gradients: Tensor


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 256 MB that were freed, where it is glibc.

    A round frees the tensors of a cohort and the next one asks for as much again. Handed back
    to the system in between, every page of it would be faulted in and zeroed each time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_TRIM_THRESHOLD, 1 << 28)
    mallopt(_MMAP_THRESHOLD, 1 << 25)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""The numbers of glibc's malloc.h."""


class _Visit:
    def __init__(
        self,
        method: Method,
        purpose: Purpose,
        phase: Phase,
        module: nn.Module,
        uneven: bool,
        cost: tuple[float, float] | None,
    ) -> None:
        self.start, self.finish = _Start(method, purpose), _Finish(method, purpose)
        self.cost = cost
        self.work = Whole(phase, module, uneven or phase.until is not None)
        self.tag = ("visit", self.start.tag, self.work.tag)

    def __call__(
        self,
        table: Tree,
        alike: Tree,
        apart: Tree,
        kept: Tree,
        base: Tree,
        columns: Tree,
        sequence: Tree,
    ) -> tuple[Nest, None]:
        fields = fields_of(**table)
        begun, _ = self.start(fields, alike, apart, kept)
        lr, weight = fields["lr"][0], sequence["weight"]
        keys = seeds.fold(fields["key"], 0)  # of the first phase, and the only one
        sequence = {
            **sequence,
            "key": keys_within(keys, weight.shape[1]),
            "live": weight.amax(-1) > 0,
        }
        work, grads = self.work(base, begun["params"], begun["carry"], columns, sequence, lr)
        fields = {**fields, "steps": work["steps"]}
        out, _ = self.finish(fields, work["params"], alike, apart, work["carry"], kept)
        sums = {name: work[name] for name in ("loss", "aux", "steps", "examples")}
        step, example = self.cost or (0.0, grads)
        gradients = work["examples"].double() * example
        if step:
            gradients = gradients + work["steps"].double() * step
        return {**out, **sums, "gradients": gradients}, None


class _Start:
    def __init__(self, method: Method, purpose: Purpose) -> None:
        self.method = method
        self.purpose: Purpose = purpose
        self.tag = ("start", method, purpose)

    def __call__(self, fields: Tree, alike: Tree, apart: Tree, kept: Tree) -> tuple[Nest, None]:
        def start(fields: Tree, apart: Tree, kept: Tree) -> Nest:
            visit = Visit(**cast(Any, fields), purpose=self.purpose)
            params, carry = self.method.start(visit, {**alike, **apart}, kept)
            return {"params": params, "carry": carry}

        return torch.vmap(start)(fields, apart, kept), None


class _Finish:
    def __init__(self, method: Method, purpose: Purpose) -> None:
        self.method = method
        self.purpose: Purpose = purpose
        self.tag = ("finish", method, purpose)

    def __call__(
        self, fields: Tree, params: Tree, alike: Tree, apart: Tree, carry: Any, kept: Tree
    ) -> tuple[Nest, None]:
        def finish(fields: Tree, params: Tree, apart: Tree, carry: Any, kept: Tree) -> Nest:
            visit = Visit(**cast(Any, fields), purpose=self.purpose)
            update, left = self.method.finish(visit, params, {**alike, **apart}, carry, kept)
            return {
                "delta": update.delta,
                "values": update.values,
                "buffers": update.buffers,
                "scalars": update.scalars,
                "kept": left,
            }

        return torch.vmap(finish)(fields, params, apart, carry, kept), None


def _downloads(downs: Sequence[Tree]) -> tuple[Tree, Tree]:
    """The downloaded tensors that all clients have alike, and the others stacked."""
    first = downs[0]
    if all(down is first for down in downs):
        return first, {}
    down = stack_alike(downs)
    alike = {name: x[0] for name, x in down.items() if len(downs) > 1 and x.stride(0) == 0}
    return alike, {name: x for name, x in down.items() if name not in alike}


def joined(done: Sequence[Done], order: Tensor) -> Done:
    """What several parts did as one, with the clients in this order."""

    def cat(trees: Sequence[Tree]) -> Tree:
        return {name: torch.cat([t[name] for t in trees])[order] for name in trees[0]}

    def line(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))[order]

    return Done(
        Updates(
            cat([d.updates.delta for d in done]),
            cat([d.updates.values for d in done]),
            cat([d.updates.buffers for d in done]),
            cat([d.updates.scalars for d in done]),
        ),
        cat([d.kept for d in done]),
        line([d.loss for d in done]),
        cat([d.aux for d in done]),
        line([d.steps for d in done]),
        line([d.examples for d in done]),
        line([d.gradients for d in done]),
    )
