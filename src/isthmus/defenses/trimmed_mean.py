"""Trimmed mean: in each coordinate drop the f largest and the f smallest values, average the rest.

Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", ICML 2018, arXiv:1803.01498, Algorithm 1, option II, where f = beta n with
beta at least the hostile fraction and below 1/2. Needs 2f < n; f = 0 is the mean.

By default every accepted client counts once (see the median for why); `weighted=True` averages
the values that remain by their clients' weights. The trimming itself is by rank in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from isthmus import catalogue
from isthmus.contracts import Context, Reduced, Updates
from isthmus.defenses.coordinate import coordinatewise
from isthmus.errors import InputError


def trimmed_mean(x: Tensor, f: int, weights: Tensor | None = None) -> Tensor:
    """Mean over the leading axis without the f extremes at each end: `[n, *shape]` -> `[*shape]`.

    Raises `InputError` unless 0 <= 2f < n.

    >>> import torch
    >>> trimmed_mean(torch.tensor([[1.0], [2.0], [6.0], [90.0]]), 1)
    tensor([4.])
    """
    n = x.shape[0]
    if not 0 <= 2 * f < n:
        raise InputError("trimmed-mean.f", f, f"0 to {(n - 1) // 2} with {n} uploads (2f < n)")
    if weights is None:
        return (x.sort(dim=0).values[f : n - f] if f else x).mean(dim=0)
    kept, index = (part[f : n - f] for part in x.sort(dim=0))
    share = weights.to(x.dtype)[index]
    return (share * kept).sum(dim=0) / share.sum(dim=0)


@catalogue.register("trimmed-mean", place="reducer", status="verified")
@dataclass(frozen=True)
class TrimmedMean:
    """The trimmed mean as reducer: f at each end, or floor(beta n) when f is not given."""

    f: int | None = None
    beta: float = 0.1
    weighted: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < 0.5:
            raise InputError("trimmed-mean.beta", self.beta, "0 or more and below 0.5")
        if self.f is not None and self.f < 0:
            raise InputError("trimmed-mean.f", self.f, "0 or more")

    def min_clients(self) -> int:
        """The fewest uploads for which the rule is legal."""
        return 1 if self.f is None else 2 * self.f + 1

    def reduce(self, updates: Updates, weights: Tensor, ctx: Context) -> Reduced:
        """The trimmed mean of the uploads whose weight is not 0."""

        def rule(x: Tensor, w: Tensor) -> Tensor:
            f = int(self.beta * len(x)) if self.f is None else self.f
            return trimmed_mean(x, f, w if self.weighted else None)

        return coordinatewise(updates, weights, rule)
