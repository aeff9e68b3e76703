"""Forward-forward: two forward passes, one with the right label and one with a wrong one.

Hinton, "The forward-forward algorithm: some preliminary investigations", 2022, arXiv:2212.13345.
Claim: close to backpropagation on MNIST with dense layers, without a backward pass.

    the label y' is written into the first inputs;  h <- h / rms(h) before every layer
    goodness  G_k = mean_u o_u^2;   p = sigmoid(G_k - theta)
    right label:  J_k = -log p;   wrong label:  J_k = -log(1 - p);   each layer descends its own
    predict:  the label with the largest goodness, summed over the layers after the first

The mean (not the sum) of squares with theta = 1 is that of the author's code (recalled), as is
dividing by the root of the mean square. A net of one hidden layer is judged by that layer. Wrong
labels are drawn anew in every step. The head takes no part and stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue, seeds
from isthmus.errors import InputError
from isthmus.federated.method import Knobs, Method
from isthmus.learn import forward
from isthmus.learn.phase import Carry
from isthmus.models import layerwise
from isthmus.models.factors import Places
from isthmus.models.layerwise import Layer, Seen
from isthmus.tasks.contract import Batch, Role
from isthmus.tree import Tree


class Settings(Knobs):
    """theta: the goodness that divides right from wrong."""

    theta: float = Field(1.0, gt=0.0)


@catalogue.register("forward-forward", place="method", status="verified")
class ForwardForward(Method):
    """Overrides L and E; the roles freeze the head."""

    Settings = Settings

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return {name: "frozen" if name.startswith("head.") else r for name, r in given.items()}

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        y, classes, chain = forward.labels(batch), model.head.out_features, _dense(model)
        share = forward.even(batch.weight)[:, None]
        step = 1.0 + torch.floor(seeds.uniform(batch.key, y.shape, share.dtype) * (classes - 1))
        wrong = (y + step.to(y.dtype)) % classes
        grads: Tree = {}
        total: list[Tensor] = []

        def net(x: Tensor) -> Tensor:
            for label, sign in ((y, 1.0), (wrong, -1.0)):
                for seen in _walk(chain, x, label, classes):
                    excess = sign * (seen.o.square().mean(1, keepdim=True) - self.knobs.theta)
                    pull = -2.0 * sign * torch.sigmoid(-excess) * seen.o / seen.layer.units
                    for name, g in layerwise.gradient(seen, pull * share).items():
                        grads[name] = grads[name] + g if name in grads else g
                    total.append((nn.functional.softplus(-excess) * share).sum())
            return x.new_zeros(len(y), classes)

        with torch.no_grad():
            self.stage.loss(net, batch)  # hands over the inputs; its value has no part in this
            value = torch.stack(total).sum()
        return layerwise.handed(model, grads, value), {}

    def predict(self, task: Any, model: Any, inputs: Tree, context: Any, kept: Tree) -> Any:
        chain, classes = _dense(model), model.head.out_features

        def goodness(x: Tensor) -> Tensor:
            scores = []
            for c in range(classes):
                label = torch.full((len(x),), c, device=x.device)
                each = [s.o.square().mean(1) for s in _walk(chain, x, label, classes)]
                scores.append(torch.stack(each[1:] or each).sum(0))
            return torch.stack(scores, dim=1)

        return task.predict(goodness, inputs, context)


def _dense(model: Any) -> list[Layer]:
    """The hidden layers; raises `InputError` for one that is not dense."""
    *hidden, _ = layerwise.layers(model)
    for layer in hidden:
        if not isinstance(layer.affine, nn.Linear):
            kind = type(layer.affine).__name__
            raise InputError(f"layer {layer.name}", kind, "linear with forward-forward")
    if not hidden:
        raise InputError("method", "forward-forward", "a net with a hidden layer")
    if hidden[0].inputs < model.head.out_features:
        given = f"{hidden[0].inputs} inputs"
        raise InputError("method", given, f"{model.head.out_features} or more, one per label")
    return hidden


def _walk(chain: list[Layer], x: Tensor, label: Tensor, classes: int) -> Iterator[Seen]:
    for k, layer in enumerate(chain):
        for shape in layer.before:
            x = shape(x)
        if k == 0:
            ones = label[:, None] == torch.arange(classes, device=x.device)
            x = torch.cat([ones.to(x.dtype), x[:, classes:]], dim=1)
        scale = x.square().mean(1, keepdim=True).sqrt() + 1e-8
        seen = layerwise.at(layer, x / scale)
        x = seen.o
        yield seen
