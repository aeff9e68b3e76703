"""FedCP: a gate, told of sample and client, parts features into a global and a personal share.

Zhang, Hua, Wang, Song, Xue, Ma, Guan, "FedCP: separating feature information for personalized
federated learning via conditional policy", KDD 2023, section 4. Claim: up to 6.69 % more accuracy
than eleven methods in vision and text, also when clients drop out.

    start:   features, phi0 <- the global features;  psi, H <- global;  phi0 and H frozen
    v_i = the rows of H_i's weight added up, at length 1
    h = features(x);   (r, s) = softmax of pairs of ReLU(LN(A (h * v_i) + a)),  r + s = 1
    logits = H_i(r * h) + H(s * h);      min  l(logits, y) + lam MMD^2(h, phi0(x))
                                          over features, psi and H_i
    send features, psi and (H_i + H) / 2 as the head;  keep H_i;  mix by n_i / n

    MMD^2 = mean_ab k(h_a, h_b) + k(h0_a, h0_b) - 2 k(h_a, h0_b),
    k(a, b) = sum over q of 10, 15, 20, 50 of exp(-|a - b|^2 / (2 q))

lam acts through the widths of the kernels, so it must be tuned again with the scale and number of
the features; 5 is the authors' for a CNN of 512. Their code draws Gumbel noise in training and in
prediction; here in training alone, and only on request (`gumbel`), so a prediction is one number.
Before its first visit a client's v_i is a random direction, the same for all (reconstructed: the
code draws one per client). `gate`, `context` and lam 0 take away r and s (both 1/2), v_i (all
ones) and the MMD, as the paper's ablations do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import catalogue, seeds
from isthmus.contracts import Update
from isthmus.federated.between import halves, shares, watched
from isthmus.federated.method import Knobs, Method
from isthmus.learn.phase import Carry, Phase, Visit
from isthmus.models.bind import bind
from isthmus.models.factors import Places
from isthmus.models.nets import Net, initialise
from isthmus.tasks.contract import Batch, Role
from isthmus.tree import Tree

WIDTHS = (10.0, 15.0, 20.0, 50.0)
"""The q of the kernel."""

HEAD, PERSONAL, CONTEXT = "head.", "personal.", "context"


class Settings(Knobs):
    """lam: strength of the MMD; gumbel: noise on the gate in training; tau: its temperature;
    gate, context: False takes the gate, or v_i, away."""

    lam: float = Field(5.0, ge=0.0)
    gumbel: bool = False
    tau: float = Field(1.0, gt=0.0)
    gate: bool = True
    context: bool = True


class Policy(nn.Module):
    """psi: the share r of each feature that is personal, `[b, K] -> [b, K]`; s is 1 - r."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, 2 * width), nn.LayerNorm(2 * width)
        self.noise: Tensor | None = None
        self.tau = 1.0

    def forward(self, h: Tensor) -> Tensor:
        pair = torch.relu(self.norm(self.linear(h))).unflatten(-1, (2, h.shape[-1]))
        if self.noise is not None:
            uniform = seeds.uniform(self.noise, pair.shape, pair.dtype)
            tiny = torch.finfo(pair.dtype).tiny
            pair = (pair - torch.log(-torch.log(uniform.clamp_min(tiny)))) / self.tau
        return pair.softmax(-2)[..., 0, :]


class Conditional(Net):
    """`personal(r h) + head(s h)` with the gate's shares of the features h."""

    context: Tensor

    def __init__(self, features: nn.Module, head: nn.Linear, gated: bool) -> None:
        super().__init__(features, head)
        self.gated = gated
        self.policy, self.personal = Policy(head.in_features), copy.deepcopy(head)
        self.register_buffer("context", torch.ones(head.in_features))

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        r = self.shares(h)
        return self.personal(r * h) + self.head((1.0 - r) * h)

    def shares(self, h: Tensor) -> Tensor:
        """r of features h `[b, K]`."""
        return self.policy(h * self.context) if self.gated else torch.full_like(h, 0.5)


@catalogue.register("fedcp", place="method", status="miniature")
class FedCP(Method):
    """Overrides S (phi0), F (what is trained), L (the MMD) and U (the blend). E is the model's."""

    Settings = Settings

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        features, head = halves(super().attach(module, knobs, seed), "fedcp")
        model = Conditional(features, head, knobs.gate)
        initialise(model.policy, seed)
        if knobs.context:
            model.context = unit(seeds.normal(seeds.key(seed, "fedcp"), model.context.shape))
        return model.to(head.weight.dtype)

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        own: dict[str, Role] = {n: "local" for n in given if n.startswith(PERSONAL)}
        return {**super().roles(given, places), **own, CONTEXT: "local"}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, carry = super().start(visit, down, kept)
        phi0 = {name: x for name, x in down.items() if name.startswith("features.")}
        return params, {**carry, "phi0": phi0}

    def phases(self, purpose: str) -> list[Phase]:
        H = [name for name in self.names.shared if name.startswith(HEAD)]
        return [
            replace(phase, trainable=tuple(name for name in phase.trainable if name not in H))
            for phase in super().phases(purpose)
        ]

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        if self.knobs.gumbel:
            model.policy.noise, model.policy.tau = batch.key, self.knobs.tau
        with watched(model.features) as calls:
            value, aux = super().loss(model, batch, carry)
        if not self.knobs.lam:
            return value, aux
        h = calls[0].made
        frozen: Any = bind(model, carry["phi0"], batch.key)
        h0 = frozen.features(*calls[0].given)
        return value + self.knobs.lam * mmd(h, h0, batch.weight), aux

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        for name in self.names.shared:
            if name.startswith(HEAD):  # the blend (H_i + H) / 2, less H
                H_i = params[PERSONAL + name.removeprefix(HEAD)]
                update.delta[name] = (H_i - down[name]) / 2.0
        if self.knobs.context:
            local[CONTEXT] = unit(params[PERSONAL + "weight"].sum(0))
        return update, local


def unit(v: Tensor) -> Tensor:
    """v at length 1."""
    return v / v.norm().clamp_min(1e-12)


def mmd(h: Tensor, h0: Tensor, weight: Tensor) -> Tensor:
    """MMD^2 of two batches of features `[b, K]` with weights `[b]`, from all pairs of items.

    >>> h = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> mmd(h, h, torch.ones(2))
    tensor(0.)
    """
    p = shares(weight, h)

    def k(a: Tensor, b: Tensor) -> Tensor:
        square = (a[:, None] - b[None]).square().sum(-1)
        kernels = torch.stack([torch.exp(-square / (2.0 * q)) for q in WIDTHS])
        return p @ kernels.sum(0) @ p

    return k(h, h) + k(h0, h0) - 2.0 * k(h, h0)
