"""pFedNavi: each client learns which layers want to be its own, and mixes those element by element.

"Personalized federated vision-language navigation", IEEE INFOCOM 2026 workshop, arXiv:2602.14401.
Claim: on R2R and RxR up to 7.5 % more success and 7.8 % more fidelity to the path than federated
averaging (FedVLN), in 1.38 times fewer rounds.

    theta_l(a) = local_l + a_l (global_l - local_l),  a_l = 1 at first
    1  on the held-out items:  a <- clip(a - eta g / |g|, 0, 1),  g = dL/da,  one pass
    2  personal layers P = {l : a_l < tau} (or the k smallest a_l); the others start from global
    3  in P:  W <- clip(W - eta_w dL/dhat * (global - local), 0, 1),  W = a_l at first,  one pass
       hat = local + W (global - local)
    4  train from hat; what has come of it is local.  Send and mix all layers as FedAvg

(reconstructed) from the abstract and from FedALA (AAAI 2023), by the same authors: the normalised
step, both rates, tau, one pass each, and the held-out items. On items that local was trained on
every a_l goes to 0, so these are the same in every visit and local never sees them. They are not
lost to the others: once local is put aside, training goes on with them before the model is sent
(`rejoin`). In the first visit there is no local yet and a stays 1. a is kept, W is not. A client
predicts from hat, after steps 1 to 3.

A layer is a module that owns tensors. `candidates` names those that may become personal; the
paper speaks of the encoder-decoder projection and the decoder layers.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.contracts import Update
from isthmus.errors import InputError
from isthmus.federated.method import Knobs, Local, Method
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Plan, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

LOCAL, A, VISITS = "local/", "a", "visits"
"""What a client keeps: its last model, the coefficients of its layers, how often it has trained."""


class Settings(Knobs):
    """eta: length of a step of a; tau: layers below it are personal; k: that many layers instead
    (0: by tau); candidates: patterns of layers; held: share of a client's items on which a is
    learned; rejoin: train on them before sending; eta_w: rate of W (0 leaves step 3 out).
    """

    eta: float = Field(0.05, ge=0.0)
    tau: float = Field(0.5, ge=0.0)
    k: int = Field(0, ge=0)
    candidates: tuple[str, ...] = ("*",)
    held: float = Field(0.25, ge=0.0, lt=1.0)
    eta_w: float = Field(1.0, ge=0.0)
    rejoin: bool = True


@catalogue.register("pfednavi", place="method", status="miniature")
class PFedNavi(Method):
    """Overrides S and F (mix, then train) and U (keep local and a)."""

    Settings = Settings

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            allowed = f"patterns of {', '.join(dict.fromkeys(self.owners.values()))}"
            raise InputError("settings.candidates", ", ".join(self.knobs.candidates), allowed)

    @property
    def owners(self) -> dict[str, str]:
        """The layer of each tensor that is trained and shared."""
        names = [name for name in self.names.trainable if name in self.names.shared]
        return {name: name.rpartition(".")[0] for name in names}

    @property
    def layers(self) -> list[str]:
        """The layers that may become personal, in the order of the model."""
        chosen = self.knobs.candidates
        every = dict.fromkeys(self.owners.values())
        return [layer for layer in every if any(fnmatchcase(layer, p) for p in chosen)]

    @property
    def mixed(self) -> dict[str, int]:
        """The tensors of those layers, and the number of each one's layer."""
        number = {layer: i for i, layer in enumerate(self.layers)}
        return {n: number[owner] for n, owner in self.owners.items() if owner in number}

    # -- S ------------------------------------------------------------------------------

    def keep(self, tensors: Tree) -> Tree:
        local = {LOCAL + name: tensors[name] for name in self.mixed}
        first = tensors[next(iter(self.mixed))]
        ones, none = first.new_ones(len(self.layers)), torch.zeros((), dtype=torch.int64)
        return {**super().keep(tensors), **local, A: ones, VISITS: none}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, carry = super().start(visit, down, kept)
        ours = {name: down[name] for name in self.mixed}
        mine = {n: torch.where(kept[VISITS] > 0, kept[LOCAL + n], x) for n, x in ours.items()}
        step = {n: torch.zeros_like(x) for n, x in ours.items()}
        mix = {"global": ours, "local": mine, A: kept[A], "W - a": step}
        return {**params, **self.hat(mix)}, {**carry, "mix": mix, "trained": mine}

    def personal(self, a: Tensor) -> Tensor:
        """Which layers are personal: bool `[layers]`."""
        if self.knobs.k:
            rank = torch.argsort(torch.argsort(a, stable=True), stable=True)
            return rank < self.knobs.k
        return a < self.knobs.tau

    def hat(self, mix: Carry) -> Tree:
        """Where training would start now: personal layers mixed by W, the others global."""
        a, personal = mix[A], self.personal(mix[A])
        return {
            name: torch.where(
                personal[i],
                torch.lerp(mix["local"][name], mix["global"][name], a[i] + mix["W - a"][name]),
                mix["global"][name],
            )
            for name, i in self.mixed.items()
        }

    # -- F ------------------------------------------------------------------------------

    def phases(self, purpose: str) -> list[Phase]:
        if purpose == "warm-up":
            return []
        names, rule = tuple(self.mixed), self.local.optimiser  # a and W have steps of their own
        phases = [Phase("layers", names, self.loss, rule, self.step_a, plans=self.held_once)]
        if self.knobs.eta_w:
            elements = Phase("elements", names, self.loss, rule, self.step_w, plans=self.rest_once)
            phases.append(elements)
        for train in super().phases(purpose):
            phases.append(replace(train, step=self.step_local, plans=self.rest))
            if self.knobs.rejoin:
                phases.append(replace(train, name="rejoin", plans=self.held))
        return phases

    def step_a(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """Step 1: one update of the layers' coefficients."""
        mix = carry["mix"]
        ours, mine, a = mix["global"], mix["local"], mix[A]
        theta = {n: torch.lerp(mine[n], ours[n], a[i]) for n, i in self.mixed.items()}
        got, _ = grad(theta)
        parts = [torch.zeros_like(a[0])] * len(self.layers)
        for name, i in self.mixed.items():
            parts[i] = parts[i] + (got[name] * (ours[name] - mine[name])).sum()
        g = torch.stack(parts)
        length = g.square().sum().sqrt()
        a = (a - self.knobs.eta * g / torch.where(length > 0, length, 1.0)).clamp(0.0, 1.0)
        mix = {**mix, A: a}
        return self.hat(mix), opt, {**carry, "mix": mix}

    def step_w(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """Step 3: one update of W, which has an effect in personal layers alone."""
        mix = carry["mix"]
        got, _ = grad(params)
        step = {}
        for name, i in self.mixed.items():
            w = mix[A][i] + mix["W - a"][name]
            moved = w - self.knobs.eta_w * got[name] * (mix["global"][name] - mix["local"][name])
            step[name] = moved.clamp(0.0, 1.0) - mix[A][i]
        mix = {**mix, "W - a": step}
        return self.hat(mix), opt, {**carry, "mix": mix}

    def step_local(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """Step 4: one update; the last one's outcome is local."""
        params, opt, carry = self.step(grad, params, opt, carry, batch)
        return params, opt, {**carry, "trained": {name: params[name] for name in self.mixed}}

    # -- which items each phase sees ------------------------------------------------------

    @property
    def once(self) -> Local:
        """One pass in the run's batches."""
        return replace(self.local, epochs=1, steps=None)

    def held_once(self, keys: np.ndarray, sizes: np.ndarray) -> Plan:
        return self.part(self.once, keys, sizes, held=True)

    def rest_once(self, keys: np.ndarray, sizes: np.ndarray) -> Plan:
        return self.part(self.once, keys, sizes, held=False)

    def held(self, keys: np.ndarray, sizes: np.ndarray) -> Plan:
        return self.part(self.local, keys, sizes, held=True)

    def rest(self, keys: np.ndarray, sizes: np.ndarray) -> Plan:
        return self.part(self.local, keys, sizes, held=False)

    def part(self, local: Local, keys: np.ndarray, sizes: np.ndarray, held: bool) -> Plan:
        """Plans over each client's held-out items, or over its others: the same in every visit.

        Of n items those `floor(held n)` are held out whose positions have the smallest hashes.
        """
        widest = int(sizes.max(initial=0))
        draws = np.broadcast_to(
            seeds.bits(seeds.key("held"), (widest,)).numpy(), (len(sizes), widest)
        )
        outside = np.arange(widest) >= sizes[:, None]
        order = np.lexsort((draws, outside), axis=1)
        out = np.floor(sizes * self.knobs.held).astype(np.int64)
        own = local.plans(keys, out if held else sizes - out)
        place = own.index.numpy() + (0 if held else out[:, None, None])
        place = np.minimum(place, max(widest - 1, 0))  # padding may point behind the last item
        return Plan(
            torch.from_numpy(order[np.arange(len(sizes))[:, None, None], place]), own.weight
        )

    # -- U ------------------------------------------------------------------------------

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, own = super().finish(visit, params, down, carry, kept)
        local = {LOCAL + name: x for name, x in carry["trained"].items()}
        return update, {**own, **local, A: carry["mix"][A], VISITS: kept[VISITS] + 1}
