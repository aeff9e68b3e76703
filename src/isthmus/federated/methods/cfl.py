"""CFL: a group of clients whose updates disagree at a stationary point is split in two.

Sattler, Mueller, Samek, "Clustered federated learning: model-agnostic distributed multitask
optimization under privacy constraints", IEEE TNNLS 2021, arXiv:1910.01991, algorithms 1 to 3.
Claim: finds groups of clients with incompatible tasks once training of one model has converged,
with no change at the clients.

    server, for each group c:  D_c = sum_{i in c} (n_i / n_c) D_i;  w_c <- w_c + D_c
        if ||D_c|| < eps1 and max_{i in c} ||D_i|| > eps2: split c into the two halves whose most
        similar pair across is least similar, by the cosine of updates

That bipartition is found by joining the most similar updates first until two sets are left, as in
the paper. A group is watched in rounds in which three or more of it take part; members that are
away keep the group's number, and may be split off in a later round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced
from isthmus.federated.method import Knobs, State
from isthmus.federated.rows import Rows
from isthmus.tree import Tree


class Settings(Knobs):
    """eps1: below it a group's mean update is still; eps2: above it some member still moves."""

    eps1: float = Field(0.4, ge=0.0)
    eps2: float = Field(1.6, ge=0.0)


@catalogue.register("cfl", place="method", status="verified")
class CFL(Rows):
    """Overrides V; `state["group"]` is the number of each client's group, `[N]`."""

    Settings = Settings

    def init(self, tensors: Tree) -> State:
        return {**super().init(tensors), "group": torch.zeros(self.population, dtype=torch.int64)}

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        who = np.array([m.client for m in meta])
        weights = torch.tensor([m.n_examples for m in meta], dtype=torch.float64)
        group = state["group"].numpy().copy()
        rows = dict(state["clients"])
        flat = tree.flatten_stacked(reduced.tensors).double()
        for number in np.unique(group[who]).tolist():
            here = np.flatnonzero(group[who] == number)
            share = weights[here] / weights[here].sum()
            step = tree.weighted_mean({n: x[here] for n, x in reduced.tensors.items()}, share)
            members = state["group"] == number
            for name, x in rows.items():
                on = members.view(-1, *[1] * (x.ndim - 1))
                rows[name] = torch.where(on, x + step[name], x)
            if len(here) > 2 and self.torn(flat[here], share):
                half = bipartition(cosines(flat[here]))
                group[who[here[half]]] = group.max() + 1
        return {"clients": rows, "group": torch.from_numpy(group)}

    def torn(self, updates: torch.Tensor, share: torch.Tensor) -> bool:
        """True when the mean of these updates `[m, d]` is small and some of them is not."""
        still = float((share @ updates).norm()) < self.knobs.eps1
        return still and float(updates.norm(dim=1).max()) > self.knobs.eps2


def cosines(updates: torch.Tensor) -> np.ndarray:
    """The cosines between rows `[m, d]`: `[m, m]`."""
    unit = updates / updates.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return (unit @ unit.T).numpy()


def bipartition(similar: np.ndarray) -> np.ndarray:
    """The members (bool `[m]`) of one of the two sets with the least largest similarity across.

    The set without member 0. `similar` is symmetric `[m, m]`.

    >>> bipartition(np.array([[1.0, 0.2, 0.9], [0.2, 1.0, 0.3], [0.9, 0.3, 1.0]]))
    array([False,  True, False])
    """
    m = len(similar)
    of = np.arange(m)
    first, second = np.triu_indices(m, 1)
    for k in np.argsort(-similar[first, second], kind="stable"):
        if len(np.unique(of)) == 2:
            break
        of[of == of[second[k]]] = of[first[k]]
    return of != of[0]
