"""Coordinate-wise median: each coordinate of the result is the middle of the n uploaded ones.

Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", ICML 2018, arXiv:1803.01498, Algorithm 1, option I. Claim: the error stays
bounded while fewer than half of the clients are hostile. For even n the two middle values are
averaged (`torch.median` would give the lower one).

The paper's clients have equally many examples. By default every accepted client counts once here
too, because an attacker can declare any number of examples; `weighted=True` takes the weighted
median instead, whose breakdown point is half of the declared weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from isthmus import catalogue
from isthmus.contracts import Context, Reduced, Updates
from isthmus.defenses.coordinate import coordinatewise


def median(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """The median over the leading axis: `[n, *shape]` -> `[*shape]`, weighted when asked.

    The weighted median lies where half of the weight is below: between the first value that
    reaches one half and the first that exceeds it. Equal weights give the plain median.

    >>> import torch
    >>> median(torch.tensor([[1.0], [2.0], [4.0], [90.0]]))
    tensor([3.])
    >>> median(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 1.0, 5.0]))
    tensor([4.])
    """
    ordered, index = x.sort(dim=0)
    n = x.shape[0]
    if weights is None:
        low, high = ordered[(n - 1) // 2], ordered[n // 2]
    else:
        below = weights.double()[index].cumsum(dim=0)
        half, slack = below[-1] / 2, 1e-12 * below[-1]  # the slack absorbs rounding of the sums
        first = (below < half - slack).sum(dim=0, keepdim=True)
        after = (below <= half + slack).sum(dim=0, keepdim=True)
        low = ordered.gather(0, first)[0]
        high = ordered.gather(0, after)[0]
    return low + (high - low) / 2


@catalogue.register("median", place="reducer", status="verified")
@dataclass(frozen=True)
class Median:
    """The coordinate-wise median as reducer."""

    weighted: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def reduce(self, updates: Updates, weights: Tensor, ctx: Context) -> Reduced:
        """The median of the uploads whose weight is not 0."""
        return coordinatewise(
            updates, weights, lambda x, w: median(x, w if self.weighted else None)
        )
