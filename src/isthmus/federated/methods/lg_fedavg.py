"""LG-FedAvg: the body is personal, the head shared.

Liang, Liu, Ziyin, Salakhutdinov, Morency, "Think locally, act globally: federated learning with
local and global representations", arXiv:2001.01523, algorithm 1. Claim: compact local
representations let a smaller global model do, so fewer parameters cross.

    client:  (l_i, g_i) <- (l_i, g) - lr * grad l;  l_i stays;  send g_i
    server:  g <- sum_i (n_i / n) g_i

All clients start from one body; the paper's optional pre-training by FedAvg and the auxiliary
losses on the local representation (self-supervised, adversarial) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from isthmus import catalogue
from isthmus.federated import halves
from isthmus.federated.method import Method
from isthmus.models.factors import Places
from isthmus.tasks.contract import Role


@catalogue.register("lg-fedavg", place="method", status="verified")
class LGFedAvg(Method):
    """Turns everything but the head into a local half."""

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        return halves.demand(module, cls)

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return halves.personal(given, lambda name: not halves.is_head(name))
