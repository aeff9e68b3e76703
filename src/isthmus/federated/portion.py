"""Plans over a portion of a client's items: every s-th of them, or all the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from isthmus.federated.method import Local
from isthmus.learn.phase import Plan


@dataclass(frozen=True)
class Portion:
    """`local.plans` over the items 0, s, 2s, ... of each client, or (`rest`) over those between.

    Of a client with one item the first portion is that item, and the rest is empty.
    """

    local: Local
    stride: int
    rest: bool = False

    def plans(self, keys: np.ndarray, sizes: np.ndarray) -> Plan:
        """The plans of many clients with int64 keys `[n]` and sizes `[n]`: `[n, T, b]`."""
        some = -(-sizes // self.stride)
        held = sizes - some if self.rest else some
        if not held.any():
            return Plan(
                torch.zeros(len(sizes), 1, 1, dtype=torch.int64), torch.zeros(len(sizes), 1, 1)
            )
        plan = self.local.plans(keys, held)
        at = plan.index
        index = at + at // (self.stride - 1) + 1 if self.rest else at * self.stride
        return Plan(torch.where(plan.weight > 0, index, 0), plan.weight)
