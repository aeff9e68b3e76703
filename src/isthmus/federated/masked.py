"""Uploads under a mask: what clients send in place of their own, and what the server makes of it.

    client:  q = w round(u / S levels), behind it w      S: the clip bound, w: a whole weight
    server:  sum_i w_i u_i / sum_i w_i = S / levels * (sum_i q_i) / (sum_i w_i)

All numbers are whole and mod 2^32, so the sum under masks is the sum without them, to the bit. The
rounding is stochastic, so that the mean is unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus import seeds, tree
from isthmus.contracts import Mask, Meeting, Meta, Reduced, Updates
from isthmus.errors import InputError
from isthmus.federated.method import Method
from isthmus.federated.path import NOISED, joined, split

MASKED = "masked"
_ROUNDING = 301


@dataclass
class Masked:
    """Secure aggregation on the path of uploads; `bound` is the norm to which each is clipped."""

    mask: Mask
    bound: float
    meeting: Meeting | None = None
    layout: tree.Layout = ()

    def weights(self, method: Method, meta: Sequence[Meta]) -> np.ndarray:
        """Whole weights: the number of examples, or 1 where the method weighs all alike."""
        unlike = [Meta(0, 1, 0, 1.0), Meta(1, 1, 0, 3.0)]
        first, second = method.weigh(unlike).tolist()
        alike = abs(first - second) < 1e-12
        return np.array([1 if alike else int(m.n_examples) for m in meta], np.int64)

    def hide(self, updates: Updates, weights: np.ndarray, keys: np.ndarray) -> Updates:
        """The uploads as masked integers; nothing else goes up, neither examples nor steps.

        Raises `InputError` where the sum could pass 2^31.
        """
        assert self.meeting is not None  # the round has begun
        if int(weights.sum()) * self.mask.levels >= 2**31:
            most = 2**31 // self.mask.levels
            given = f"{int(weights.sum())} examples in a round"
            raise InputError("mask", given, f"fewer than {most}, or fewer bits")
        parts = joined(updates, NOISED)
        self.layout = tree.layout(parts, stacked=True)
        codes = self.codes(tree.flatten_stacked(parts), keys)
        whole = np.concatenate([codes * weights[:, None], weights[:, None]], axis=1)
        sent = self.meeting.mask((whole & 0xFFFFFFFF).astype(np.uint32), updates.clients)
        crossing = torch.from_numpy(sent.view(np.int32).copy())
        meta = [m._replace(n_examples=0, steps=0) for m in updates.meta]
        return Updates(delta={MASKED: crossing}, meta=meta)

    def codes(self, rows: Tensor, keys: np.ndarray) -> np.ndarray:
        """Integers `[n, d]` in +-levels: u / S levels, rounded up or down by chance."""
        u = rows.double() / self.bound * self.mask.levels
        own = torch.from_numpy(seeds.keys_of(keys, _ROUNDING))
        draws = torch.stack([seeds.uniform(int(key), u.shape[1:]) for key in own])
        low = u.floor()
        codes = (low + (draws.double() < u - low)).clamp(-self.mask.levels, self.mask.levels)
        return codes.to(torch.int64).numpy()

    def reveal(self, arrived: Updates, like: dict[str, torch.dtype]) -> Reduced:
        """The weighted mean of what has arrived."""
        assert self.meeting is not None  # the round has begun
        rows = arrived.delta[MASKED].numpy().view(np.uint32)
        total = self.meeting.unmask(rows.sum(0, dtype=np.uint32), arrived.clients)
        sums = torch.from_numpy(total.view(np.int32).astype(np.float64))
        mean = sums[:-1] / sums[-1] * (self.bound / self.mask.levels)
        flat = {
            name: x.to(like.get(name, torch.float32))
            for name, x in tree.unflatten(mean, self.layout).items()
        }
        held: dict[str, Any] = split(flat, NOISED)
        return Reduced(held["delta"], values=held["values"], buffers=held["buffers"])
