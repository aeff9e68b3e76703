"""FedPHP: a client's private model is inherited from round to round and teaches the new one.

Li, Zhan, Shao, Li, Song, "FedPHP: federated personalization with inherited private models", ECML
PKDD 2021. Claim: personalisation that a new download would overwrite is kept and used.

    w_i <- w;  E epochs of  w_i <- w_i - lr * grad [(1 - lam) f_i(w_i) + lam KL(p(h_i) || p(w_i))]
    send w_i, averaged as in FedAvg
    h_i <- mu_t h_i + (1 - mu_t) w_i,  mu_t = mu min(1, t / T);  h_i stays and predicts

Written from the paper's idea (reconstructed): transfer by the outputs of h_i (the paper also has
one by features), t is the number of the round, T stands for the planned rounds. lam 0 leaves the
shared path FedAvg's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue
from isthmus.federated.method import Knobs
from isthmus.federated.twin import Twin
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Visit
from isthmus.tasks.contract import Batch
from isthmus.tasks.items import weighted_mean
from isthmus.tree import Tree


class Settings(Knobs):
    """mu: inherited share in the end; T: rounds until then; lam: weight of the teaching."""

    mu: float = Field(0.9, ge=0.0, le=1.0)
    T: int = Field(20, ge=1)
    lam: float = Field(0.1, ge=0.0, le=1.0)


@catalogue.register("fedphp", place="method", status="reconstructed")
class FedPHP(Twin):
    """Overrides S, L and F (train, then inherit)."""

    Settings = Settings

    def __post_init__(self) -> None:
        super().__post_init__()
        self.once = replace(self.local, batch=0, epochs=1, steps=None)

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        t = visit.round.to(visit.lr.dtype)
        return params, {"mu": self.knobs.mu * (t / self.knobs.T).clamp(max=1.0)}

    def phases(self, purpose: str) -> list[Phase]:
        if purpose != "train":
            return []
        (train,) = super().phases(purpose)
        both = (*self.mine, *self.ours)
        inherit = Phase(
            "inherit", both, self.loss, self.local.optimiser, self.inherit, plans=self.once.plans
        )
        return [train, inherit]

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        seen: list[tuple[tuple[Tensor, ...], Tensor]] = []

        def watched(*inputs: Tensor) -> Tensor:
            seen.append((inputs, model(*inputs)))
            return seen[0][1]

        value, aux = self.stage.loss(watched, batch)
        inputs, student = seen[0]
        with torch.no_grad():
            teacher = self.personal(model, batch.key)(*inputs).log_softmax(-1)
        gap = (teacher.exp() * (teacher - student.log_softmax(-1))).sum(-1)
        lam = self.knobs.lam
        return (1 - lam) * value + lam * weighted_mean(gap, batch.weight), aux

    def inherit(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        mu = carry["mu"]
        h = {copy: mu * params[copy] + (1 - mu) * params[name] for copy, name in self.of.items()}
        return {**params, **h}, opt, carry
