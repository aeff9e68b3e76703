"""FedAvg in which clients with few items count for more: weights by the root of their number.

isthmus check examples/own_method.py:FedRoot
isthmus train --method examples/own_method.py:FedRoot --set settings.power=0.5
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from isthmus.contracts import Meta
from isthmus.federated.method import Knobs, Method


class Settings(Knobs):
    """power: 1 is FedAvg, 0 counts every client alike."""

    power: float = Field(0.5, ge=0.0, le=1.0)


class FedRoot(Method):
    """Overrides W: w_i = n_i^power / sum_j n_j^power."""

    Settings = Settings

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        items = torch.tensor([m.n_examples for m in meta], dtype=torch.float64)
        counts = items**self.knobs.power
        return counts / counts.sum()
