"""DRTP: each hidden layer is told a fixed random projection of the label as if it were its error.

Frenkel, Lefebvre and Bol, "Learning without feedback: fixed random learning signals allow for
feedforward training of deep neural networks", Frontiers in Neuroscience 2021, arXiv:1909.01311.
Claim: trains without any feedback, below backpropagation and direct feedback alignment.

    hidden layer k:  W_k -= lr ((B_k y) act'(z)) h^T;   output layer: its own gradient

B_k is uniform in +-sqrt(6 / units) as in the authors' code (recalled), from a shared seed. What
tpSGD adds is the difference between target and output.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.federated.method import Knobs, Method
from isthmus.learn import forward
from isthmus.learn.phase import Carry
from isthmus.models import layerwise
from isthmus.models.layerwise import Seen
from isthmus.tasks.contract import Batch


class Settings(Knobs):
    """projection_seed: of all B_k."""

    projection_seed: int = Field(0, ge=0)


@catalogue.register("drtp", place="method", status="verified")
class DRTP(Method):
    """Overrides L."""

    Settings = Settings

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        y, classes = forward.labels(batch), model.head.out_features

        def error(k: int, seen: Seen) -> Tensor:
            key = seeds.key(self.knobs.projection_seed, "drtp", k)
            draw = seeds.uniform(key, (classes, seen.layer.units), seen.o.dtype)
            b = (2.0 * draw - 1.0) * math.sqrt(6.0 / seen.layer.units)
            return layerwise.per_unit(seen, b[y]) * layerwise.shares(seen)

        return forward.descend(self.stage.loss, model, batch, error)
