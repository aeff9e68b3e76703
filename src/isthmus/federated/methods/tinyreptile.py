"""TinyReptile: Reptile on a stream, one item a step, each item once, nothing stored.

Ren, Anicic, Runkler, "TinyReptile: TinyML with federated meta-learning", arXiv:2304.05201
(reconstructed from its abstract). Claim: Reptile's quality with at least half less memory and time.

    client:   for S streamed items:  phi^ <- phi^ - lr grad l(phi^; x_s),  from phi
    server:   phi <- phi + alpha_t (phi^ - phi),   alpha_t = alpha (1 - t / T)
    predict:  the client's steps, from phi

One client a round is the run's `cohort=1`; the changes of several are averaged evenly. The order
of the stream is drawn for each visit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field

from isthmus import catalogue
from isthmus.federated.method import Local
from isthmus.federated.methods import reptile
from isthmus.learn.phase import Phase, Plan

Plans = Callable[[np.ndarray, np.ndarray], Plan]


@dataclass(frozen=True)
class Stream:
    """The first `most` steps of other plans; all of them at 0."""

    inner: Plans
    most: int

    def plans(self, keys: np.ndarray, sizes: np.ndarray) -> Plan:
        """`[n, at most most, b]`."""
        plan = self.inner(keys, sizes)
        many = self.most or plan.index.shape[1]
        return Plan(plan.index[:, :many], plan.weight[:, :many])


class Settings(reptile.Settings):
    """S: items that a client sees in one visit, 0 for all that it has."""

    S: int = Field(32, ge=0)


@catalogue.register("tinyreptile", place="method", status="reconstructed")
class TinyReptile(reptile.Reptile):
    """Overrides B: single items."""

    Settings = Settings

    @property
    def singly(self) -> Local:
        """Each item once, one in a step."""
        return replace(self.local, batch=1, epochs=1, steps=None)

    def phases(self, purpose: str) -> list[Phase]:
        if purpose != "train":
            return super().phases(purpose)
        stream = Stream(self.singly.plans, self.knobs.S).plans
        return [replace(phase, plans=stream) for phase in super().phases(purpose)]
