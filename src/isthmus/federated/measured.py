"""Methods whose clients also measure the loss of the model that they were sent.

    F_i = the loss of w over all of client i's items, before any step

It is taken in a phase of its own after the training (so that training draws the batches it
would draw alone), as one gradient over the full batch: work that is counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.federated.method import Method
from isthmus.learn import plan as plans
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Plan, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree


class Measured(Method):
    """`carry["F"]` at the end is the loss of the model that the visit started from."""

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        w = {name: params[name] for name in self.names.trainable}
        return params, {"w": w, "F": torch.zeros_like(visit.lr)}

    def phases(self, purpose: str) -> list[Phase]:
        phases = super().phases(purpose)
        if purpose != "train":
            return phases
        rule, names = self.local.optimiser, self.names.trainable
        return [*phases, Phase("measure", names, self.loss, rule, self.measure, plans=all_at_once)]

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        value, aux = super().loss(model, batch, carry)
        return value, {**aux, "F": value}

    def measure(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """Look at w, and leave everything as it is."""
        _, aux = grad(carry["w"])
        return params, opt, {**carry, "F": aux["F"]}


def all_at_once(keys: np.ndarray, sizes: np.ndarray) -> Plan:
    """One batch of everything that a client holds."""
    return plans.full_batch_many(sizes, 1)
