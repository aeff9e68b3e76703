"""GPFL: one valve makes two routes of a feature, a global and a personal one, learned at once.

Zhang, Hua, Wang, Song, Xue, Ma, Cao, Guan, "GPFL: simultaneously learning global and personalized
feature information for personalized federated learning", ICCV 2023, section 3. Claim: up to 8.99 %
more accuracy than ten methods, fairer, more stable and with less over-fitting.

    shared: features phi, valve CoV, GCE (an embedding e_c of each class);   kept: the head
    CoV(f, u) = ReLU(f * (gamma + 1) + beta),  gamma = LN(ReLU(A u + a)),  beta = LN(ReLU(B u + b))
    in a visit:  e0 = e at its start,  u_g = mean_c e0_c,  u_i = sum_c a_ic e0_c,  a_i class shares
    f = phi(x),  f_P = CoV(f, u_i),  f_G = CoV(f, u_g)
    min  l(head(f_P), y) + l(cos(f_G, e), y) + lam |f_G - e0_y|_F,  with mu / 2 |CoV, GCE|^2
    send phi, CoV and GCE;  mix by n_i / n;      predict:  head(CoV(phi(x), u_i))

u_g and u_i are 0 in the first round. They come from the mixed GCE; the authors' code takes them
from the client's own GCE of its last visit, which `stale` does. |.|_F is over a batch, so it grows
with the root of its size; `per_sample` takes the mean of the items' norms (reconstructed). a_i
counts all items of the client (the code leaves out those after the last whole batch): a first
phase of one step adds up e0_y / n, which is u_i, and takes no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import catalogue, seeds
from isthmus.contracts import Update
from isthmus.errors import InputError
from isthmus.federated.between import halves, watched
from isthmus.federated.method import Knobs, Method
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Plan, Visit
from isthmus.learn.plan import full_batch_many
from isthmus.models.factors import Places
from isthmus.models.nets import Net, initialise
from isthmus.tasks.contract import Batch, Role, weighted_mean
from isthmus.tasks.losses import cross_entropy
from isthmus.tree import Tree

GCE, LAST = "gce.weight", "last/gce"


class Settings(Knobs):
    """lam: strength of the magnitude term; mu: weight decay of GCE and CoV; angle: False takes the
    angle term away; per_sample: norms by item; stale: u from the client's own last GCE."""

    lam: float = Field(0.01, ge=0.0)
    mu: float = Field(0.1, ge=0.0)
    angle: bool = True
    per_sample: bool = False
    stale: bool = False


class Valve(nn.Module):
    """CoV: features `[b, K]` under a condition `[K]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.A, self.B = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_gamma, self.norm_beta = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, f: Tensor, u: Tensor) -> Tensor:
        gamma = self.norm_gamma(torch.relu(self.A(u)))
        beta = self.norm_beta(torch.relu(self.B(u)))
        return torch.relu(f * (gamma + 1.0) + beta)


class Embeddings(nn.Module):
    """GCE: an embedding of every class `[C, K]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, f: Tensor) -> Tensor:
        """The cosines of features `[b, K]` to every class: `[b, C]`."""
        return F.normalize(f, dim=-1) @ F.normalize(self.weight, dim=-1).mT


class Routed(Net):
    """`head(cov(features(x), u))`."""

    u: Tensor

    def __init__(self, features: nn.Module, head: nn.Linear, seed: int) -> None:
        super().__init__(features, head)
        shape = (head.out_features, head.in_features)
        self.cov = initialise(Valve(head.in_features), seed)
        self.gce = Embeddings(seeds.normal(seeds.key(seed, "gpfl"), shape))
        self.register_buffer("u", torch.zeros(head.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cov(self.features(x), self.u))


@catalogue.register("gpfl", place="method", status="miniature")
class GPFL(Method):
    """Overrides S (e0 and u), F (count, then train), L, P (weight decay). E is the model's."""

    Settings = Settings

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        features, head = halves(super().attach(module, knobs, seed), "gpfl")
        return Routed(features, head, seed).to(head.weight.dtype)

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        own: dict[str, Role] = {n: "local" for n in given if n.startswith("head.")}
        return {**super().roles(given, places), **own, "u": "local"}

    def keep(self, tensors: Tree) -> Tree:
        last = {LAST: torch.zeros_like(tensors[GCE])} if self.knobs.stale else {}
        return {**super().keep(tensors), **last}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, carry = super().start(visit, down, kept)
        e0 = down[GCE]
        e = kept[LAST] if self.knobs.stale else torch.where(visit.round > 1, e0, 0.0)
        params = {**params, "u": torch.zeros_like(e0[0])}
        more = {"e0": e0, "e": e, "u_g": e.mean(0), "n": visit.examples.clamp_min(1.0)}
        return params, {**carry, **more}

    def phases(self, purpose: str) -> list[Phase]:
        after = super().phases(purpose)
        if purpose == "warm-up":
            return after
        rule = self.local.optimiser  # not used: nothing is descended
        count = Phase("count", ("u",), self.loss, rule, self.count, plans=everything)
        return [count, *after]

    def count(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """u_i, the mean of the class embeddings over the client's items."""
        share = batch.weight / carry["n"]
        return {"u": params["u"] + share @ of_classes(batch, carry["e"])}, opt, carry

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        with watched(model.features) as calls:
            value, aux = super().loss(model, batch, carry)
        f_G = model.cov(calls[0].made, carry["u_g"])
        if self.knobs.angle:
            value = value + weighted_mean(cross_entropy(model.gce(f_G), batch["y"]), batch.weight)
        apart = (f_G - of_classes(batch, carry["e0"])).square().sum(-1)
        return value + self.knobs.lam * self.magnitude(apart, batch.weight), aux

    def magnitude(self, square: Tensor, weight: Tensor) -> Tensor:
        """The norm of a batch, from the squares `[b]` of its items."""
        if self.knobs.per_sample:
            return weighted_mean(root(square), weight)
        return root(weight @ square)

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        def decayed(params: Tree) -> tuple[Tree, dict[str, Tensor]]:
            grads, aux = grad(params)
            more = {n: g + self.knobs.mu * params[n] for n, g in grads.items() if of_routes(n)}
            return {**grads, **more}, aux

        return super().step(decayed, params, opt, carry, batch)

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        return update, {**local, LAST: params[GCE]} if self.knobs.stale else local


def everything(keys: np.ndarray, sizes: np.ndarray) -> Plan:
    """One step over all items of each client."""
    return full_batch_many(sizes, 1)


def of_routes(name: str) -> bool:
    """True for the tensors of GCE and CoV."""
    return name.startswith(("gce.", "cov."))


def of_classes(batch: Batch, e: Tensor) -> Tensor:
    """The embedding `[b, K]` of each item's class."""
    if "y" not in batch.columns:
        raise InputError("task", "no column y", "classes in one column y with method gpfl")
    classes = torch.arange(e.shape[0])
    return (batch["y"][:, None] == classes).to(e.dtype) @ e


def root(square: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0."""
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
