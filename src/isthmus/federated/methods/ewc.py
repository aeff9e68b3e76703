"""EWC: what a former stage needed is held in place, number by number; a baseline of FedMobile.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017,
arXiv:1612.00796, equation 3. Claim: old tasks are remembered by slowing down learning on the
weights that matter to them.

    loss:  l(w) + [s > 0] lam / 2 sum_i F_i (w_i - w*_i)^2
    w*:    the model at the end of stage s - 1
    F_i:   mean over the client's items of stage s - 1 of (d l(x, y) / d w_i)^2, at the end of its
           last visit in that stage

Stages, labels and weights are those of FedMobile, whose terms are off by default; lam = 0 is
FedMobile to the bit.

(reconstructed): the federated form. The Fisher diagonal is the client's own and the empirical one
(its items' own labels); it is taken in every visit, since a client does not know which is its last;
w* is the first model that it is sent in the new stage; only the former stage counts. lam is ours:
as in any such penalty, lr lam F has to stay below 2.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue
from isthmus.contracts import Update
from isthmus.federated.method import Data
from isthmus.federated.methods.fedmobile import STAGE, FedMobile, labelled, mask
from isthmus.federated.methods.fedmobile import Settings as Stages
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Plan, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

NOW, FISHER, STAR = "ewc/now/", "ewc/fisher/", "ewc/star/"


class Settings(Stages):
    """lam: strength of the penalty; the rest as in FedMobile, without its two terms."""

    lam: float = Field(10.0, ge=0.0)
    lam_u: float = Field(0.0, ge=0.0)
    lam_k: float = Field(0.0, ge=0.0)


@catalogue.register("ewc", place="method", status="reconstructed")
class EWC(FedMobile):
    """Overrides S (w* and F of the former stage), F (a pass that takes F), B, L and U."""

    Settings = Settings

    def keep(self, tensors: Tree) -> Tree:
        zeros = {n: torch.zeros_like(tensors[n]) for n in self.held}
        named = {NOW: zeros, FISHER: zeros, STAR: {n: tensors[n] for n in self.held}}
        own = {prefix + n: x for prefix, held in named.items() for n, x in held.items()}
        return {**super().keep(tensors), **own}

    @property
    def held(self) -> list[str]:
        """The tensors that are held in place."""
        return [n for n in self.names.trainable if n in self.names.shared]

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, carry = super().start(visit, down, kept)
        turned = self.stage_of(visit) > kept[STAGE]
        fisher = {n: torch.where(turned, kept[NOW + n], kept[FISHER + n]) for n in self.held}
        star = {n: torch.where(turned, down[n], kept[STAR + n]) for n in self.held}
        sums = {n: torch.zeros_like(x) for n, x in fisher.items()}
        items = torch.zeros_like(visit.examples)
        return params, {**carry, "fisher": fisher, "star": star, "sums": sums, "items": items}

    def phases(self, purpose: str) -> list[Phase]:
        phases = super().phases(purpose)
        if purpose == "train" and self.knobs.lam:
            names, rule = tuple(self.held), self.local.optimiser
            phases.append(Phase("fisher", names, self.supervised, rule, self.squared))
        return phases

    def plan(self, phase: Phase, visit: Visit, data: Data, kept: Tree) -> Plan:
        if phase.name != "fisher":
            return super().plan(phase, visit, data, kept)
        stage = data.columns.get("stage")
        rows = torch.arange(len(next(iter(data.columns.values()))))
        if stage is not None:
            rows = rows[stage == int(self.stage_of(visit))]
        return Plan(rows.view(-1, 1), torch.ones(len(rows), 1))

    def loss(self, model: object, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        value, aux = super().loss(model, batch, carry)
        if self.knobs.lam:
            w = dict(model.named_parameters())  # type: ignore[attr-defined]
            for n, f in carry["fisher"].items():
                away = (f * (w[n] - carry["star"][n]).square()).sum()
                value = value + 0.5 * self.knobs.lam * carry["on"] * away
        return value, aux

    def supervised(
        self, model: object, batch: Batch, carry: Carry
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's loss alone, of which F is taken."""
        return self.stage.loss(model, labelled(batch))

    def squared(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """Add one item's squared gradient; nothing moves."""
        grads, _ = grad(params)
        known = ((batch.weight > 0).to(batch.weight.dtype) * mask(batch)).sum()
        sums = {n: x + known * grads[n].square() for n, x in carry["sums"].items()}
        return params, opt, {**carry, "sums": sums, "items": carry["items"] + known}

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        mean = {NOW + n: x / carry["items"].clamp_min(1.0) for n, x in carry["sums"].items()}
        fisher = {FISHER + n: x for n, x in carry["fisher"].items()}
        return update, {
            **local,
            **mean,
            **fisher,
            **{STAR + n: x for n, x in carry["star"].items()},
        }
