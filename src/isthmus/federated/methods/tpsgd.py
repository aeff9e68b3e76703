"""tpSGD: every layer descends its own loss against a fixed random projection of the label.

Lomnitz, Daniels, Zhang and Piacentino, "Learning with local gradients at the edge", 2022,
arXiv:2208.08503. Claim: without backpropagation, within 5 % of its accuracy on shallow dense,
convolutional and recurrent nets; better than other gradient-free methods, in less memory and time.

    hidden layer k:  o = act(W_k h + b_k), h given;  t_k = P_k y
                     d = (t_k - o) act'(z)  or, for the absolute loss,  d = sign(t_k - o) act'(z)
                     W_k += lr d h^T,  b_k += lr d;  o goes on, h is let go
    output layer:    its own gradient of the task's loss

P_k is drawn from a seed that all clients share: it is neither stored nor sent. (Reconstructed:)
its entries are +-1 below tanh and 0 or 1 below the other activations, so that targets lie in
their range; of a convolution, the mean of each channel has a target (or each of its positions
has, which count as their mean); a recurrent layer has the target at its last time step (or at every
one), with the state before it given; the norm after a convolution is part of its layer. The step
costs two matrix products a layer where backpropagation costs three.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue, seeds
from isthmus.federated.method import Knobs, Method
from isthmus.learn import forward
from isthmus.learn.phase import Carry, Visit
from isthmus.models import layerwise
from isthmus.models.layerwise import Layer, Seen
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree


class Settings(Knobs):
    """local_loss: J_k; projection_seed: of all P_k; times, channels: where targets apply.

    `alone`: each client has P_k of its own (what a shared seed is for shows when it is missing).
    """

    local_loss: Literal["squared", "absolute"] = "squared"
    projection_seed: int = Field(0, ge=0)
    times: Literal["last", "all"] = "last"
    channels: Literal["mean", "each"] = "mean"
    alone: bool = False


@catalogue.register("tpsgd", place="method", status="not-reproduced")
class TpSGD(Method):
    """Overrides L, whose gradient in each layer is that of the layer's own loss (and S: who)."""

    Settings = Settings

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, carry = super().start(visit, down, kept)
        return params, {**carry, "client": visit.client}

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        y, classes = forward.labels(batch), model.head.out_features

        def error(k: int, seen: Seen) -> Tensor:
            p = self.projection(k, seen.layer, classes, carry["client"])
            o = seen.o.mean((2, 3), keepdim=True) if self.pools(seen.layer) else seen.o
            miss = o - layerwise.per_unit(seen, p.to(o.dtype)[y])
            if self.knobs.local_loss == "absolute":
                miss = torch.sign(miss)
            return miss * layerwise.shares(seen, self.knobs.times == "last")

        return forward.descend(self.stage.loss, model, batch, error)

    def pools(self, layer: Layer) -> bool:
        return self.knobs.channels == "mean" and isinstance(layer.affine, nn.Conv2d)

    def projection(self, k: int, layer: Layer, classes: int, client: Tensor) -> Tensor:
        """The target of every class, which is P_k transposed: `[classes, units]`."""
        key = seeds.key(self.knobs.projection_seed, "projection", k)
        draw = seeds.bits(seeds.fold(key, client) if self.knobs.alone else key,
                          (classes, layer.units))  # fmt: skip
        return 2 * (draw & 1) - 1 if layer.two_sided else draw & 1
