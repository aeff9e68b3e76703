"""MOON: a client's features are drawn to those of the global model, away from its own last ones.

Li, He, Song, "Model-contrastive federated learning", CVPR 2021, equation 3. Claim: more accurate
than FedAvg, FedProx and SCAFFOLD on image classification with unlike clients.

    client:  min_v  F_i(v) + mu l(v),
             l = -log( e^{cos(z, z_g) / tau} / (e^{cos(z, z_g) / tau} + e^{cos(z, z_p) / tau}) )

z, z_g and z_p are the features of one item by v, by the global model and by the client's model
at the end of its last visit. The rest is FedAvg; mu = 0 is FedAvg to the bit, and at a client's
first visit in the first round z_g = z_p, so that l = log 2 and pulls nowhere.

The paper puts a projection head of two layers between features and classes; here z is what
`model.features` gives, flattened, and the classes' head follows it (reconstructed: any model
with `features` and `head` will do).
"""

from __future__ import annotations

from typing import Any, cast

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from isthmus import catalogue
from isthmus.contracts import Update
from isthmus.errors import InputError
from isthmus.federated.method import Knobs, Method
from isthmus.learn.phase import Carry, Visit
from isthmus.models.bind import bind
from isthmus.tasks.contract import Batch, weighted_mean
from isthmus.tree import Tree

LAST = "last/"


class Settings(Knobs):
    """mu: weight of the contrast; tau: its temperature."""

    mu: float = Field(1.0, ge=0.0)
    tau: float = Field(0.5, gt=0.0)


@catalogue.register("moon", place="method", status="verified")
class Moon(Method):
    """Overrides S (remember both models), L (the contrast) and U (keep the own model)."""

    Settings = Settings

    def __post_init__(self) -> None:
        if not self.features:
            raise InputError("model", "one without features", "features and head with method moon")

    @property
    def features(self) -> list[str]:
        return [name for name in self.names.shared if name.startswith("features.")]

    def keep(self, tensors: Tree) -> Tree:
        return {**super().keep(tensors), **{LAST + name: tensors[name] for name in self.features}}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        own = {name: kept[LAST + name] for name in self.features}
        return params, {"global": {name: down[name] for name in self.features}, "last": own}

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        value, aux = super().loss(model, batch, carry)
        if "x" not in batch.columns:
            raise InputError("task", "no column x", "inputs in one column x with method moon")
        others = [bind(model, carry[name], batch.key) for name in ("global", "last")]
        z, z_g, z_p = (
            cast(Any, seen).features(batch.columns["x"]).flatten(1) for seen in (model, *others)
        )
        each = contrast(z, z_g, z_p, self.knobs.tau)
        return value + self.knobs.mu * weighted_mean(each, batch.weight), aux

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        return update, {**local, **{LAST + name: params[name] for name in self.features}}


def contrast(z: Tensor, z_g: Tensor, z_p: Tensor, tau: float) -> Tensor:
    """The contrast of each item, `[b]`, of features `[b, d]`.

    >>> z = Tensor([[1.0, 0.0]])
    >>> contrast(z, z, z, 0.5)  # log 2
    tensor([0.6931])
    """
    near, far = (F.cosine_similarity(z, other, dim=1) / tau for other in (z_g, z_p))
    return F.softplus(far - near)
