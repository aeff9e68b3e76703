"""Federated LoRA: what every method has in common that trains adapters on a frozen backbone.

A method says how pairs are aggregated, layer by layer (`rule`), and may say what a client
trains and sends. Pairs go up as values with their rank, not as differences; a change of the
backbone goes down once, as low-rank pairs, to every client that has missed it. Everything else
that is trained (a head, norms) is averaged as in FedAvg.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from isthmus import seeds
from isthmus.contracts import Context, Meta, Reduced, Update, Updates
from isthmus.federated.adapters.delta_log import DeltaLog
from isthmus.federated.adapters.product import Global
from isthmus.federated.mean import Mean
from isthmus.federated.method import Method, State
from isthmus.learn.phase import Carry, Grad, Opt, Visit
from isthmus.models.factors import Factors, Places, merged, read, write
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree


@dataclass
class LoraMethod(Method):
    """FedAvg with adapters: overrides D, S, P, U, the reducer and V."""

    places: Places = field(default_factory=dict)

    rule: ClassVar[Callable[..., Global]]
    """`rule(uploads, weights, down, knobs, key=)`: one layer's next pair, and its base change."""

    sends_values: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = False
    one_rank: ClassVar[bool] = True

    __hash__ = object.__hash__

    def rank_axes(self) -> dict[str, int]:
        return {at.B: -1 for at in self.places.values()} | {at.A: -2 for at in self.places.values()}

    @property
    def factors(self) -> list[str]:
        """The tensors that travel as pairs."""
        return [name for at in self.places.values() for name in (at.B, at.A)]

    @property
    def rest(self) -> list[str]:
        """Shared tensors that are no factors."""
        pairs = set(self.factors)
        return [name for name in self.names.shared if name not in pairs]

    def init(self, tensors: Tree) -> State:
        state = super().init(tensors)
        if not self.keeps_base:
            return state
        weights = {at.weight: tensors[at.weight] for at in self.places.values()}
        return {**state, "base": weights, "log": self._log().state()}

    def _log(self, state: State | None = None) -> DeltaLog:
        log = DeltaLog({name: at.shape for name, at in self.places.items()})
        if state is not None:
            log.load_state(state["log"])
        return log

    def base(self, state: State) -> Tree:
        return state.get("base", {})

    def version(self, state: State) -> int:
        return int(state["log"]["version"]) if self.keeps_base else 0

    def catch_up(self, state: State, version: int) -> Tree:
        changes: Tree = {}
        for layer, pairs in self._log(state).pairs_since(version).items():
            if pairs is None:
                weight = self.places[layer].weight
                changes[f"{layer}|whole"] = state["base"][weight]
                continue
            for i, (left, right) in enumerate(pairs):
                changes[f"{layer}|{i}|left"] = left.contiguous()
                changes[f"{layer}|{i}|right"] = right.contiguous()
        return changes

    def given(self, state: State, down: Tree) -> Tree:
        """The factors that the clients started from: as decoded, at the full rank."""
        whole = {} if self.slices_download and not self.one_rank else down
        return {**state["shared"], **whole}

    def origin(self, state: State, down: Tree, round: int) -> Tree:
        return self.given(state, down)

    def nothing(self, state: State) -> Reduced:
        shared = state["shared"]
        factors = {name: shared[name] for name in self.factors if name in shared}
        return Reduced({name: torch.zeros_like(shared[name]) for name in self.rest}, values=factors)

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        new, opt, carry = super().step(grad, params, opt, carry, batch)
        for name, trained in carry.get("trained", {}).items():
            if name in new:
                new[name] = torch.where(trained, new[name], params[name])
        return new, opt, carry

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, carry = super().start(visit, down, kept)
        if self.one_rank:
            return params, carry
        trained: Tree = {}
        for at in self.places.values():
            own = torch.arange(at.rank) < visit.rank
            trained[at.B], trained[at.A] = own, own[:, None]
        return params, {**carry, "trained": trained}

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        values = {name: params[name] for name in self.factors if name in self.names.shared}
        delta = {name: params[name] - down[name] for name in self.rest}
        local = {name: params[name] for name in self.names.local}
        return Update(delta=delta, values=values), local

    def reduce(self, state: State, updates: Updates, weights: Tensor, ctx: Context) -> Reduced:
        given = self.given(state, ctx.extras.get("down", {}))
        down = read(given, self.places)
        values, shares, total = updates.values, weights, float(weights.sum())
        if total > 1.0 + 1e-6:  # fixed weights 1/(qN) and many clients: the same step as a mean
            values = {n: given[n] + total * (x - given[n]) for n, x in values.items()}
            shares = weights / total
        ranks = [m.rank for m in updates.meta]
        layers: dict[str, Global] = {}
        for number, (layer, at) in enumerate(self.places.items()):
            uploads = [
                Factors(B, A, at.scale).prefix(rank or at.rank)
                for B, A, rank in zip(*self._pair(values, at, down[layer]), ranks, strict=True)
            ]
            key = seeds.fold(ctx.key, number)
            layers[layer] = self.rule(uploads, shares, down[layer], self.knobs, key=int(key))
        rest = Mean().reduce(Updates(delta=updates.delta, meta=updates.meta), weights, ctx)
        return Reduced(
            rest.tensors,
            {layer: made.base_delta for layer, made in layers.items() if made.base_delta},
            weights,
            write({layer: made.factors for layer, made in layers.items()}, self.places),
            diag={layer: made.diag for layer, made in layers.items()},
        )

    def _pair(self, values: Tree, at: Any, down: Factors) -> tuple[Tensor, Tensor]:
        """The stacked factors of a layer; one that did not cross is the one that was sent."""
        n = next(iter(values.values())).shape[0]
        B = values.get(at.B, down.B.expand(n, *down.B.shape))
        return B, values.get(at.A, down.A.expand(n, *down.A.shape))

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        old: Tree = state["shared"]
        shared = {**old, **{n: x for n, x in reduced.values.items() if n in old}}
        shared.update({n: shared[n] + reduced.tensors[n] for n in self.rest})
        new: State = {**state, "shared": shared}
        if self.keeps_base and reduced.base_delta:
            log = self._log(state)
            log.append(reduced.base_delta)
            changed = merged(state["base"], self.places, reduced.base_delta)
            new.update(base={**state["base"], **changed}, log=log.state())
        return new
