"""One client after the other: the reference that every other executor must equal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from isthmus import seeds, tree
from isthmus.contracts import Update, Updates
from isthmus.federated.cohort import Cohort, Done, Ground, visit_of
from isthmus.federated.method import Method
from isthmus.learn.phase import Carry, Plan, Visit
from isthmus.learn.visit import sequential
from isthmus.tree import Tree


class Sequential:
    """Runs the hooks as they are written, without vmap."""

    def run(self, method: Method, ground: Ground, cohort: Cohort) -> Done:
        each = [self._visit(method, ground, cohort, i) for i in range(len(cohort))]
        updates, kept, numbers, aux = zip(*each, strict=True)
        loss, steps, examples, gradients = torch.tensor(numbers, dtype=torch.float64).T
        return Done(
            Updates(
                tree.stack([u.delta for u in updates]),
                tree.stack([u.values for u in updates]),
                tree.stack([u.buffers for u in updates]),
                tree.stack([u.scalars for u in updates]),
            ),
            tree.stack(kept),
            loss,
            tree.stack(aux),
            steps,
            examples,
            gradients,
        )

    def params(self, method: Method, ground: Ground, cohort: Cohort) -> Tree:
        each = [self._work(method, ground, cohort.take([i]))[1] for i in range(len(cohort))]
        return tree.stack(each)

    def _visit(
        self, method: Method, ground: Ground, cohort: Cohort, i: int
    ) -> tuple[Update, Tree, tuple[float, float, float, float], Tree]:
        one = cohort.take([i])
        visit, params, carry, numbers, aux = self._work(method, ground, one)
        kept = tree.row(one.kept, 0)
        with torch.no_grad():
            update, kept = method.finish(visit, params, one.downs[0], carry, kept)
        return update, kept, numbers, aux

    def _work(
        self, method: Method, ground: Ground, one: Cohort
    ) -> tuple[Visit, Tree, Carry, tuple[float, float, float, float], Tree]:
        """Start and phases of a single client: its tensors, what it carries, and the sums."""
        visit = visit_of(one, ground, 0)
        with torch.no_grad():
            params, carry = method.start(visit, one.downs[0], tree.row(one.kept, 0))
        steps = examples = gradients = 0.0
        loss, aux = torch.zeros(()), {}
        for number, phase in enumerate(method.phases(one.purpose)):
            key = seeds.fold(int(one.keys[0]), number)
            phased = replace(one, keys=np.array([key], dtype=np.int64))
            plan = ground.plan(method, phase, phased)
            work = sequential(
                phase,
                ground.module,
                ground.base,
                params,
                carry,
                ground.columns,
                Plan(plan.index[0], plan.weight[0]),
                key,
                visit.lr,
            )
            params, carry, loss, aux = work.params, work.carry, work.loss, work.aux
            steps += float(work.steps)
            examples += float(work.examples)
            gradients += ground.gradients(
                phase, float(work.steps), float(work.examples), work.grads
            )
        visit = replace(visit, steps=torch.tensor(steps, dtype=visit.steps.dtype))
        return visit, params, carry, (float(loss), steps, examples, gradients), aux
