"""How well a path follows its reference: SR, SPL, OSR, NE, nDTW and SDTW.

Distances d are metres along the shortest path in the house. A path Q that ends at q succeeds when
d(q, goal) < 3 m (Anderson et al., CVPR 2018; SPL: Anderson et al., "On evaluation of embodied
navigation agents", arXiv:1807.06757); with l the shortest length and p the walked one,

    SPL = S l / max(p, l)        nDTW = exp(-DTW(R, Q) / (3 m |R|))        SDTW = S nDTW

(Ilharco et al., "General evaluation for instruction conditioned navigation using dynamic time
warping", arXiv:1907.05446). OSR counts paths that come within 3 m anywhere, NE is d(q, goal).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isthmus.tasks.contract import Metric
from isthmus.tree import Tree

NEAR = 3.0
"""Metres within which a goal counts as reached."""

NAMES = ("sr", "spl", "osr", "ne", "ndtw", "sdtw", "length")


def dtw(cost: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """The cheapest monotone alignment of two sequences: `[b]`.

    `cost` `[b, N, M]` holds the distance of each pair; `n` and `m` int64 `[b]` are the real
    lengths, 1 or more. D(i, j) = cost(i, j) + min(D(i-1, j), D(i-1, j-1), D(i, j-1)).

    >>> cost = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])[None]
    >>> dtw(cost, torch.tensor([2]), torch.tensor([3]))
    tensor([1.])
    """
    rows: list[list[Tensor]] = []
    for i in range(cost.shape[1]):
        row: list[Tensor] = []
        for j in range(cost.shape[2]):
            before = [rows[i - 1][j]] if i else []
            before += [rows[i - 1][j - 1]] if i and j else []
            before += [row[j - 1]] if j else []
            least = torch.stack(before).amin(0) if before else torch.zeros_like(cost[:, 0, 0])
            row.append(cost[:, i, j] + least)
        rows.append(row)
    table = torch.stack([torch.stack(row, 1) for row in rows], 1)
    return pick(pick(table, n - 1), m - 1)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """`x[i, index[i]]` for every i: `[b, n, ...]` and int64 `[b]` give `[b, ...]`."""
    return x[torch.arange(x.shape[0], device=x.device), index]


def walked(outputs: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The viewpoints that scores `[b, T, V]` lead to from `start` `[b]`, and how many there are.

    The path `[b, T + 1]` ends where the best next viewpoint is the present one, and stays there.
    """
    place, moving, path, length = start, torch.ones_like(start), [start], torch.ones_like(start)
    for t in range(outputs.shape[1]):
        after = outputs[:, t].argmax(-1)
        moving = moving * (after != place)
        place = torch.where(moving > 0, after, place)
        path.append(place)
        length = length + moving
    return torch.stack(path, 1), length


def measures(path: Tensor, length: Tensor, reference: Tensor, distances: Tensor) -> Tree:
    """The measures of each path, `[b]` in float64, by the names of `NAMES`.

    `path` int64 `[b, M]` with `length` real entries, `reference` int64 `[b, N]` with -1 after its
    end, `distances` `[b, V, V]` in metres.
    """
    d = distances.double()
    real = (reference >= 0).sum(1)
    true = reference.clamp_min(0)
    start, goal = true[:, 0], pick(true, real - 1)
    to_goal = torch.take_along_dim(pick(d, goal), path, 1)
    here = torch.arange(path.shape[1], device=path.device) < length[:, None]
    each = torch.arange(path.shape[0], device=path.device)[:, None]
    steps = d[each, path[:, :-1], path[:, 1:]] * here[:, 1:]
    walk, shortest = steps.sum(1), pick(pick(d, start), goal)
    error = pick(to_goal, length - 1)
    success = (error < NEAR).double()
    longer = torch.maximum(walk, shortest)
    share = torch.where(longer > 0, shortest / torch.where(longer > 0, longer, 1.0), 1.0)
    cost = d[each[..., None], true[:, :, None], path[:, None, :]]
    fidelity = torch.exp(-dtw(cost, real, length) / (real * NEAR))
    return {
        "sr": success,
        "spl": success * share,
        "osr": (torch.where(here, to_goal, math.inf).amin(1) < NEAR).double(),
        "ne": error,
        "ndtw": fidelity,
        "sdtw": success * fidelity,
        "length": walk,
    }


class Navigated(Metric):
    """Means over episodes of all `NAMES`, from their sums and `total`.

    `outputs` `[b, T, V]` score the next viewpoint at each step; targets are `path` (the
    reference) and `distances`, as in `measures`.
    """

    primary, higher_is_better = "sr", True

    def init(self) -> Tree:
        return {name: torch.zeros((), dtype=torch.float64) for name in (*NAMES, "total")}

    def update(
        self,
        state: Mapping[str, Tensor],
        outputs: Any,
        targets: Mapping[str, Tensor],
        weight: Tensor,
    ) -> Tree:
        path, length = walked(outputs, targets["path"][:, 0])
        found = measures(path, length, targets["path"], targets["distances"])
        count = weight.double()
        sums = {name: (count * x).sum() for name, x in found.items()} | {"total": count.sum()}
        return {name: state[name].to(x.device) + x for name, x in sums.items()}

    def finish(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        total = float(state["total"])
        return {name: float(state[name]) / total if total > 0 else math.nan for name in NAMES}
