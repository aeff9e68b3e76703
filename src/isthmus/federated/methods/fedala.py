"""FedALA: before it trains, a client learns how much of the global head to take over.

Zhang, Hua, Wang, Song, Xue, Ma, Guan, "FedALA: adaptive local aggregation for personalized
federated learning", AAAI 2023, section 3. Claim: up to 3.27 % more accuracy than eleven methods;
local aggregation alone lifts others by up to 24.19 %.

    client i, named layers:  hat = theta_i + (theta_g - theta_i) * W,    W = 1 at first
        W <- clip(W - eta (dL/dhat) * (theta_g - theta_i), 0, 1),  over s % of its own items
    the other layers start from theta_g; then train, send and mix as FedAvg

theta_i is the client's model at the end of its last visit. W is learned over at most `epochs`
passes, until the losses of the last 10 passes have a standard deviation below the threshold, the
first time; later in one pass. In a client's first visit there is no theta_i, so hat = theta_g;
one batch is then spent to no effect.

Layers are named here, where the authors' code counts tensors from the end (2 is weight and bias
of the last layer). The loss of a pass is its mean; `recorded="last"` takes that of its last
batch, as the code does. Code where it differs from the paper: threshold 0.1, there 0.01; a
contiguous slice of the items, here a fresh random sample; no limit on passes, here 50.

As a plug-in (`fedala+scaffold`) the other method sees the training that follows: its steps, and
changes measured from hat. What goes up stays measured from theta_g.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.contracts import Update
from isthmus.errors import InputError
from isthmus.federated.method import Knobs, Method
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Plan, Visit
from isthmus.learn.plan import shuffled_epochs_many
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

THETA, W, VISITS = "theta/", "w/", "visits"
"""What a client keeps: its last model's layers, their weights, and how often it has trained."""

SETTLED = 10
"""The number of passes over which the loss must have settled."""


class Settings(Knobs):
    """eta: rate at which W learns; s: percent of a client's items that it learns from; layers:
    patterns of the tensors that are mixed; threshold: of the standard deviation of ten losses
    (nats); epochs: most passes over the sample, the first time; recorded: which loss of a pass.
    """

    eta: float = Field(1.0, gt=0.0)
    s: int = Field(80, ge=1, le=100)
    layers: tuple[str, ...] = ("head.*",)
    threshold: float = Field(0.1, ge=0.0)
    epochs: int = Field(50, ge=0)
    recorded: Literal["mean", "last"] = "mean"


@catalogue.register("fedala", place="method", status="miniature")
class FedALA(Method):
    """Overrides S and F (mix, then train) and U (keep theta_i and W)."""

    Settings = Settings
    plugs_in: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mixed:
            named = [name for name in self.names.trainable if name in self.names.shared]
            patterns = ", ".join(self.knobs.layers)
            raise InputError("settings.layers", patterns, f"patterns among {', '.join(named)}")

    @property
    def mixed(self) -> list[str]:
        """The tensors that are mixed."""
        return [
            name
            for name in self.names.trainable
            if name in self.names.shared and any(fnmatchcase(name, p) for p in self.knobs.layers)
        ]

    def keep(self, tensors: Tree) -> Tree:
        theta = {THETA + name: tensors[name] for name in self.mixed}
        ones = {W + name: torch.ones_like(tensors[name]) for name in self.mixed}
        none = {VISITS: torch.zeros((), dtype=torch.int64)}
        return {**super().keep(tensors), **theta, **ones, **none}

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, carry = super().start(visit, down, kept)
        visits = kept[VISITS]
        theta_g = {name: down[name] for name in self.mixed}
        theta_i = {n: torch.where(visits > 0, kept[THETA + n], x) for n, x in theta_g.items()}
        w = {name: kept[W + name] for name in self.mixed}
        batches = (self.sampled(visit.examples.double()) / (self.local.batch or torch.inf)).ceil()
        ala = {
            "theta_g": theta_g,
            "theta_i": theta_i,
            "w": w,
            "visits": visits,
            "steps": torch.zeros_like(visit.steps),
            "steps of a pass": batches.clamp_min(1.0).to(visit.steps.dtype),
            "loss": torch.zeros_like(visit.lr),
            "losses": torch.full_like(visit.lr, torch.inf).expand(SETTLED).clone(),
        }
        return {**params, **hat(theta_i, theta_g, w)}, {**carry, "ala": ala}

    def phases(self, purpose: str) -> list[Phase]:
        after = super().phases(purpose)
        if purpose == "warm-up" or not self.knobs.epochs:
            return after
        names, rule = tuple(self.mixed), self.local.optimiser  # W has a step of its own
        adapt = Phase(
            "adapt", names, self.own_loss, rule, self.adapt, until=self.adapted, plans=self.samples
        )
        return [adapt, *after]

    def sampled(self, n: Any) -> Any:
        """How many of n items W learns from: s % of them, rounded up."""
        return -(-n * self.knobs.s // 100)

    def samples(self, keys: np.ndarray, sizes: np.ndarray) -> Plan:
        """Passes over a random sample of each client's items."""
        some = self.sampled(sizes)
        width = self.local.batch or int(some.max(initial=1))
        own = shuffled_epochs_many(keys, some, self.knobs.epochs, width)
        draws = seeds.bits_of(seeds.keys_of(keys, self.knobs.epochs), int(sizes.max(initial=0)))
        outside = np.arange(draws.shape[1]) >= sizes[:, None]
        order = np.lexsort((draws, outside), axis=1)
        index = order[np.arange(len(sizes))[:, None, None], own.index.numpy()]
        return Plan(torch.from_numpy(index), own.weight)

    def own_loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the task alone, whatever the method that follows adds to it."""
        value, _ = self.stage.loss(model, batch)
        return value, {"loss": value}

    def adapt(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """One update of W, and hat by it."""
        ala = carry["ala"]
        theta_i, theta_g = ala["theta_i"], ala["theta_g"]
        g, aux = grad(params)
        w = {
            name: (x - self.knobs.eta * g[name] * (theta_g[name] - theta_i[name])).clamp(0.0, 1.0)
            for name, x in ala["w"].items()
        }
        steps, loss = ala["steps"] + 1, ala["loss"] + aux["loss"]
        mean = loss / ala["steps of a pass"]
        last = aux["loss"] if self.knobs.recorded == "last" else mean
        ends = steps % ala["steps of a pass"] == 0
        ala = {
            **ala,
            "w": w,
            "steps": steps,
            "loss": torch.where(ends, 0.0, loss),
            "losses": torch.where(ends, torch.cat([ala["losses"][1:], last[None]]), ala["losses"]),
        }
        return hat(theta_i, theta_g, w), opt, {**carry, "ala": ala}

    def adapted(self, params: Tree, carry: Carry, loss: Tensor) -> Tensor:
        """True when nothing is left to learn: W has settled, or a pass is over after the first
        time; at once where there is no theta_i yet."""
        ala = carry["ala"]
        ends = ala["steps"] % ala["steps of a pass"] == 0
        settled = ala["losses"].std(correction=0) < self.knobs.threshold
        return (ala["visits"] == 0) | (ends & (settled | (ala["visits"] > 1)))

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        ala = carry["ala"]
        begun = hat(ala["theta_i"], ala["theta_g"], ala["w"])
        trained = replace(visit, steps=visit.steps - ala["steps"])
        update, local = super().finish(trained, params, {**down, **begun}, carry, kept)
        if visit.purpose == "warm-up":
            return update, {**kept, **local}
        for name, x in begun.items():
            update.delta[name] = update.delta[name] + (x - down[name])
        theta = {THETA + name: params[name] for name in self.mixed}
        w = {W + name: x for name, x in ala["w"].items()}
        return update, {**local, **theta, **w, VISITS: kept[VISITS] + 1}


def hat(theta_i: Tree, theta_g: Tree, w: Tree) -> Tree:
    """theta_i + (theta_g - theta_i) * w, elementwise, and exactly so where w is 0 or 1."""
    return {name: torch.lerp(theta_i[name], x, w[name]) for name, x in theta_g.items()}
