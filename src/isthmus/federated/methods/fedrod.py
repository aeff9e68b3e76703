"""FedRoD: one shared body under two heads, a generic one that is shared and a personal one.

Chen and Chao, "On bridging generic and personalized federated learning for image classification",
ICLR 2022, algorithm 1 with linear personal heads. Claim: trained apart, the two predictors are the
best generic and the best personalised model at once.

    z = f(x);  generic logits g = G z;  personal logits p_i = g + P_i z
    generic:   f, G  minimise balanced softmax: CE(g + gamma * log n_i, y), n_i items per class
    personal:  P_i   minimises CE(stop(g) + P_i stop(z), y);  P_i stays
    server:    f, G  <- sum_i (n_i / n) (f_i, G_i)

The personal loss reaches neither body nor generic head. P_i starts at zero (reconstructed), so a
client that never took part predicts as the generic model does. The paper's second form, in which a
shared hypernetwork makes P_i from n_i, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue
from isthmus.federated import halves
from isthmus.federated.method import Knobs, Method
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Visit
from isthmus.models import optim
from isthmus.models.factors import Places
from isthmus.tasks.contract import Batch, Role
from isthmus.tree import Tree


class Settings(Knobs):
    """gamma: power of the class counts in the balanced softmax; 0 is the plain one."""

    gamma: float = Field(1.0, ge=0.0)


@catalogue.register("fedrod", place="method", status="verified")
class FedRoD(Method):
    """Overrides F (count the classes, then train), S, L, E."""

    Settings = Settings

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        head = halves.linear_head(module, cls)
        module.personal = nn.Linear(head.in_features, head.out_features).to(head.weight)
        nn.init.zeros_(module.personal.weight)
        nn.init.zeros_(module.personal.bias)
        return module

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return halves.personal(given, lambda name: name.startswith("personal."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.idle, self.once = optim.sgd(), replace(self.local, batch=0, epochs=1, steps=None)

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        return params, {"counts": torch.zeros_like(params["personal.bias"])}

    def phases(self, purpose: str) -> list[Phase]:
        if purpose != "train":
            return []
        count = Phase("count", (), self.loss, self.idle, self.count, plans=self.once.plans)
        return [count, *super().phases(purpose)]

    def count(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """How many of the client's items are of each class."""
        counts = carry["counts"]
        hit = batch.y[:, None] == torch.arange(counts.shape[0])
        return params, opt, {"counts": counts + batch.weight @ hit.to(counts.dtype)}

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        rarest = torch.finfo(carry["counts"].dtype).tiny  # a class that the client does not have
        prior = self.knobs.gamma * carry["counts"].clamp_min(rarest).log()
        seen: list[tuple[Tensor, Tensor]] = []

        def generic(*inputs: Tensor) -> Tensor:
            z = model.features(*inputs)
            g = model.head(z)
            seen.append((z.detach(), g.detach()))
            return g + prior

        def personal(*inputs: Tensor) -> Tensor:
            z, g = seen[0]
            return g + model.personal(z)

        balanced, aux = self.stage.loss(generic, batch)
        empirical, _ = self.stage.loss(personal, batch)
        return balanced + empirical, aux

    def predict(self, task: Any, model: Any, inputs: Tree, context: Any, kept: Tree) -> Any:
        def personal(*inputs: Tensor) -> Tensor:
            z = model.features(*inputs)
            return model.head(z) + model.personal(z)

        return task.predict(personal, inputs, context)
