"""FedPer: the head is personal, the body shared.

Arivazhagan, Aggarwal, Singh, Choudhary, "Federated learning with personalization layers",
arXiv:1912.00818, algorithms 1 and 2. Claim: where clients differ, base plus personalisation
layers beat one model for all.

    client:  (w_B, w_P_i) <- (w_B, w_P_i) - lr * grad l;  w_P_i stays;  send w_B
    server:  w_B <- sum_i (n_i / n) w_B_i

The personalisation layers are the head (the paper tries from one to several of the last layers).
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


@catalogue.register("fedper", place="method", status="verified")
class FedPer(Method):
    """Turns the head into a local half."""

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        return halves.demand(module, cls)

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return halves.personal(given, halves.is_head)
