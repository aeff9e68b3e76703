"""TinyMetaFed: a part is rebuilt on each device, and of the rest only large changes are sent.

Ren, Li, Anicic, Runkler, "TinyMetaFed: efficient federated meta-learning for TinyML",
arXiv:2307.06822 (reconstructed from its abstract). Claim: less energy and communication than
TinyReptile, faster convergence, at no loss of quality.

    client, on a stream:  l <- l - lr grad_l f(g, l; x_s) on every r-th item, from the first l
                          (g, l) <- (g, l) - lr grad f(g, l; x_s) on the others
                          send the P % of g that moved most, as (place, change); forget l
    server:               g <- g + alpha_t mean_i (sparse change_i),  alpha_t = alpha (1 - t / T)
    predict:              the client's steps, from g and the first l

l is the head, one in r items rebuilds it, and what is not sent counts as zero (all reconstructed).
The largest are taken over all of g together: ceil(P |g| / 100) of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import nn

from isthmus import catalogue
from isthmus.contracts import Meta, Reduced, Update
from isthmus.federated import halves
from isthmus.federated.method import State
from isthmus.federated.methods import tinyreptile
from isthmus.federated.methods.tinyreptile import Stream
from isthmus.federated.portion import Portion
from isthmus.federated.stack import Stack
from isthmus.learn.phase import Carry, Phase, Visit
from isthmus.models.factors import Places
from isthmus.tasks.contract import Role
from isthmus.tree import Tree

CHANGE, PLACE = "change", "place"


class Settings(tinyreptile.Settings):
    """S: items in one visit; P: percentage of g that is sent; r: one in r items rebuilds l."""

    S: int = Field(32, ge=2)
    P: float = Field(20.0, gt=0.0, le=100.0)
    r: int = Field(4, ge=2)


@catalogue.register("tinymetafed", place="method", status="reconstructed")
class TinyMetaFed(tinyreptile.TinyReptile):
    """Overrides F (rebuild, then all), U (sparse, nothing stays) and V."""

    Settings = Settings
    stacks = True
    sends_values = True

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        return halves.demand(module, cls)

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return halves.personal(given, halves.is_head)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reducer = Stack()

    def phases(self, purpose: str) -> list[Phase]:
        made = super().phases(purpose)
        if purpose != "train":
            return made
        (both,) = made
        some = -(-self.knobs.S // self.knobs.r)
        own = tuple(name for name in both.trainable if name in self.names.local)
        if not own:
            return [both]
        first = Stream(Portion(self.singly, self.knobs.r).plans, some)
        then = Stream(Portion(self.singly, self.knobs.r, rest=True).plans, self.knobs.S - some)
        rebuild = replace(both, name=f"{both.name} l", trainable=own, plans=first.plans)
        return [rebuild, replace(both, plans=then.plans)]

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        change = torch.cat([(params[n] - down[n]).flatten() for n in self.names.shared])
        many = -int(-change.numel() * self.knobs.P // 100)
        place = change.abs().topk(many).indices
        values = {CHANGE: change[place], PLACE: place.to(torch.int32)}
        return Update(values=values), {name: kept[name] for name in self.names.local}

    def nothing(self, state: State) -> Reduced:
        like = next(iter(state["shared"].values()))
        values = {CHANGE: like.new_zeros(1, 1), PLACE: torch.zeros(1, 1, dtype=torch.int32)}
        return Reduced({}, values=values, weights=torch.zeros(1, dtype=torch.float64))

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        change, place = reduced.values[CHANGE], reduced.values[PLACE]
        weights = reduced.weights
        if weights is None:
            weights = torch.full((len(change),), 1.0 / len(change))
        g = state["shared"]
        sizes = [g[name].numel() for name in self.names.shared]
        weighted = weights.to(change.dtype)[:, None] * change
        flat = change.new_zeros(sum(sizes))
        flat = flat.index_add(0, place.flatten().long(), weighted.flatten())
        parts = zip(self.names.shared, flat.split(sizes), strict=True)
        mean = {name: part.view_as(g[name]) for name, part in parts}
        return super().server(state, replace(reduced, tensors=mean, values={}), meta)
