"""Feedback alignment: backpropagation, with fixed random matrices on the way back.

Lillicrap, Cownden, Tweed and Akerman, "Random synaptic feedback weights support error
backpropagation for deep learning", Nature Communications 2016, arXiv:1411.0247. Claim: the
weights come to align with the matrices, so that what they send back teaches.

    d_{k-1} = (B_k^T d_k) act'(z_{k-1})  in place of  (W_k^T d_k) act'(z_{k-1})
    W_k -= lr d_k h_k^T

B_k, of the shape of W_k, is uniform in +-1/sqrt(inputs) as the weights are at their start, from a
shared seed. Every linear layer has one, the head too; other layers are refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import catalogue, seeds
from isthmus.errors import InputError
from isthmus.federated.method import Knobs, Method
from isthmus.learn.phase import Carry
from isthmus.models import layerwise
from isthmus.models.layerwise import Layer
from isthmus.tasks.contract import Batch


class Settings(Knobs):
    """projection_seed: of all B_k."""

    projection_seed: int = Field(0, ge=0)


class _Swapped(torch.autograd.Function):
    """W h forward; backward, the input's gradient is B^T d and the weight's is that of W h."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        h, _, b = inputs
        ctx.save_for_backward(h, b)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor | None, Tensor, None]:
        h, b = ctx.saved_tensors
        (d,) = errors
        return d @ b if ctx.needs_input_grad[0] else None, d.mT @ h, None


@catalogue.register("feedback-alignment", place="method", status="verified")
class FeedbackAlignment(Method):
    """Overrides L: the same values, other gradients."""

    Settings = Settings

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        chain = layerwise.layers(model)
        for layer in chain:
            if not isinstance(layer.affine, nn.Linear):
                kind = type(layer.affine).__name__
                raise InputError(f"layer {layer.name}", kind, "linear with feedback-alignment")

        def net(x: Tensor) -> Tensor:
            for k, layer in enumerate(chain):
                for shape in layer.before:
                    x = shape(x)
                affine: Any = layer.affine
                b = self.feedback(k, layer, affine.weight.dtype)
                x = _Swapped.apply(x, affine.weight, b)
                x = x if affine.bias is None else x + affine.bias
                x = x if layer.act is None else layer.act(x)
            return x

        return self.stage.loss(net, batch)

    def feedback(self, k: int, layer: Layer, dtype: torch.dtype) -> Tensor:
        """B_k `[units, inputs]`."""
        key = seeds.key(self.knobs.projection_seed, "feedback", k)
        draw = seeds.uniform(key, (layer.units, layer.inputs), dtype)
        return (2.0 * draw - 1.0) / math.sqrt(layer.inputs)
