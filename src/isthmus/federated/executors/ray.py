"""Cohorts split over Ray's worker processes, each of which runs its part at once.

Every worker holds the method and the ground; a part of a cohort, the frozen tensors that changed
and what the clients did go between them, by Ray's own serialisation among processes of one user.
A visit is a function of what it is given, so the part of a worker that dies is computed again by
a new one, with the same bits: a death costs at most the work of one round.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from isthmus import catalogue
from isthmus.errors import InputError, need
from isthmus.federated.cohort import Cohort, Done, Executor, Ground, Owned
from isthmus.federated.executors.sequential import Sequential
from isthmus.federated.executors.vectorised import Vectorised, joined
from isthmus.federated.flower import quiet
from isthmus.federated.method import Method
from isthmus.learn.graph import Mode
from isthmus.tree import Tree

DEAD = (
    "RayActorError",
    "WorkerCrashedError",
    "NodeDiedError",
    "ObjectLostError",
    "OutOfMemoryError",
)
"""What Ray raises when a process or its machine is gone; anything else is a fault of the work."""

DEATHS = 5
"""Workers that may die over one part of a cohort; more is no accident."""


class Ray:
    """`workers` processes on this machine, or on the cluster that RAY_ADDRESS names."""

    def __init__(self, workers: int, compile: Mode = "none", chunk: int = 0) -> None:
        quiet()
        self.ray = need("ray", "ray")
        self.workers, self.chunk = workers, chunk
        self.compile: Mode = compile
        self._first: Tree = {}
        self._held: dict[int, Tree] = {}
        self._actors: dict[int, Any] = {}
        self._given: tuple[Method, Ground, Any] | None = None

    def run(self, method: Method, ground: Ground, cohort: Cohort) -> Done:
        if self._given is None or self._given[0] is not method or self._given[1] is not ground:
            self._begin(method, ground)
        parts = [rows for rows in np.array_split(np.arange(len(cohort)), self.workers) if len(rows)]
        done: dict[int, Done] = {}
        deaths = tuple(getattr(self.ray.exceptions, name) for name in DEAD)
        for _ in range(DEATHS):
            left = [i for i in range(len(parts)) if i not in done]
            begun = [(i, self._send(i, ground, cohort.take(parts[i]))) for i in left]
            for i, reference in begun:
                try:
                    done[i] = self.ray.get(reference)
                except self.ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # a fault of the visit, not of its worker
                except deaths:
                    self._actors.pop(i, None)
            if len(done) == len(parts):
                made = [done[i] for i in range(len(parts))]
                return made[0] if len(made) == 1 else joined(made, torch.arange(len(cohort)))
        raise RuntimeError(f"{DEATHS} workers died over the same part of a cohort")

    def params(self, method: Method, ground: Ground, cohort: Cohort) -> Tree:
        """Measuring is done here, where the test items are."""
        return _local(method, self.compile, self.chunk).params(method, ground, cohort)

    def _begin(self, method: Method, ground: Ground) -> None:
        """Start Ray, and hand it what all workers hold."""
        if not self.ray.is_initialized():
            quietly = {"logging_level": "ERROR", "log_to_driver": False}
            own = {"num_cpus": self.workers, "include_dashboard": False}
            self.ray.init(**quietly, **({} if os.environ.get("RAY_ADDRESS") else own))
        there = int(self.ray.cluster_resources().get("CPU", 0))
        if self.workers > there:
            raise InputError("workers", self.workers, f"1 to {there}, the processors Ray has")
        self._actors.clear()
        for name, module in list(sys.modules.items()):
            if name.startswith(catalogue.OWN):  # loaded from a path: no worker can import these
                self.ray.cloudpickle.register_pickle_by_value(module)
        self._first = dict(ground.base)
        self._given = method, ground, self.ray.put((method, ground, self.compile, self.chunk))

    def _send(self, i: int, ground: Ground, part: Cohort) -> Any:
        """Have the i-th worker run a part; a new worker where there is none."""
        assert self._given is not None  # `run` has begun
        if i not in self._actors:
            # Without `num_cpus` an actor is placed by a processor and then reserves none: two runs
            # in one process, as when methods are compared, do not wait for each other for ever.
            self._actors[i] = self.ray.remote(_Worker).remote(self._given[2])
            self._held[i] = self._first
        now, held = dict(ground.base), self._held[i]
        changed = {name: x for name, x in now.items() if x is not held.get(name)}
        self._held[i] = now
        return self._actors[i].run.remote(part, changed)


def _local(method: Method, compile: Mode, chunk: int) -> Executor:
    """What runs a part of a cohort in one process."""
    return cast(Executor, Vectorised(compile, chunk) if method.vectorise else Sequential())


class _Worker:
    """One process: a method on its ground."""

    def __init__(self, given: tuple[Method, Ground, Mode, int]) -> None:
        torch.set_num_threads(1)
        method, ground, compile, chunk = given
        owned = Owned(ground.owned.order.copy(), ground.owned.starts.copy())  # Ray's cannot change
        self.method, self.ground = method, replace(ground, owned=owned)
        self.executor = _local(method, compile, chunk)

    def run(self, part: Cohort, base: Tree) -> Done:
        self.ground.base.update(base)
        own = {
            name: getattr(part, name).copy() for name in ("clients", "keys", "ranks", "versions")
        }
        return self.executor.run(self.method, self.ground, replace(part, **own))
