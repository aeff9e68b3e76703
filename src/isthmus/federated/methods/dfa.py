"""DFA: the error at the output reaches every hidden layer directly, by a fixed random matrix.

Nokland, "Direct feedback alignment provides learning in deep neural networks", NeurIPS 2016,
arXiv:1609.01596. Claim: close to backpropagation on dense nets, without its backward chain.

    e = dJ/do of the output layer;   hidden layer k:  W_k -= lr ((B_k e) act'(z)) h^T

B_k is uniform in +-1/sqrt(units), from a shared seed. Every layer waits for e.
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


@catalogue.register("dfa", place="method", status="verified")
class DFA(Method):
    """Overrides L."""

    Settings = Settings

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        def error(k: int, seen: Seen, e: Tensor) -> Tensor:
            key = seeds.key(self.knobs.projection_seed, "dfa", k)
            draw = seeds.uniform(key, (seen.layer.units, e.shape[1]), e.dtype)
            b = (2.0 * draw - 1.0) / math.sqrt(seen.layer.units)
            return layerwise.per_unit(seen, e @ b.mT) * layerwise.shares(seen)

        return forward.descend_late(self.stage.loss, model, batch, error)
