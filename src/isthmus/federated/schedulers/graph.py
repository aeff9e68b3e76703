"""Who averages with whom: graphs, their mixing matrices, and how fast these mix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isthmus import seeds
from isthmus.errors import unknown

GRAPHS = ("ring", "complete", "torus", "star", "none")


def graph(name: str, n: int) -> np.ndarray:
    """The adjacency bool `[n, n]` of a named graph, without loops."""
    if name not in GRAPHS:
        raise unknown("graph", name, GRAPHS)
    i = np.arange(n)
    near = np.zeros((n, n), bool)
    if name == "complete":
        near[:] = True
    elif name == "ring":
        near[i, (i + 1) % n] = True
    elif name == "star":
        near[0] = True
    elif name == "torus":
        wide = next(w for w in range(int(n**0.5), 0, -1) if n % w == 0)
        row, column = i // wide, i % wide
        near[i, row * wide + (column + 1) % wide] = True
        near[i, (row + 1) % (n // wide) * wide + column] = True
    near |= near.T
    np.fill_diagonal(near, False)
    return near


def metropolis(near: np.ndarray) -> np.ndarray:
    """W_ij = 1 / (1 + max(deg_i, deg_j)) between neighbours, the rest on the diagonal: `[n, n]`.

    Symmetric, non-negative, rows and columns sum to 1 (Xiao and Boyd, "Fast linear iterations for
    distributed averaging", Systems and Control Letters 2004).

    >>> metropolis(graph("ring", 3)).round(3).tolist()[0]
    [0.333, 0.333, 0.333]
    """
    degree = near.sum(1)
    w = near / (1.0 + np.maximum(degree[:, None], degree[None, :]))
    np.fill_diagonal(w, 1.0 - w.sum(1))
    return w


def matching(near: np.ndarray, key: int) -> np.ndarray:
    """Random disjoint pairs of neighbours, each of which averages: `[n, n]`."""
    w = np.eye(len(near))
    pairs = np.argwhere(np.triu(near))
    free = np.ones(len(near), bool)
    for at in np.argsort(seeds.bits_of(np.array([key]), max(1, len(pairs)))[0][: len(pairs)]):
        i, j = pairs[at]
        if free[i] and free[j]:
            free[i] = free[j] = False
            w[i, i] = w[j, j] = w[i, j] = w[j, i] = 0.5
    return w


def rho(matrices: Sequence[np.ndarray]) -> float:
    """|| mean_t W_t^T W_t - 11^T / n ||_2: below 1 exactly when the union of the graphs connects.

    1 - rho bounds how much of the distance to consensus a round takes away on average.
    """
    n = len(matrices[0])
    mean = sum(w.T @ w for w in matrices) / len(matrices)
    return float(np.linalg.norm(mean - np.full((n, n), 1.0 / n), 2))
