"""FedAMP: clients with similar models pull each other closer, through clouds kept by the server.

Huang, Chu, Zhou, Wang, Liu, Pei, Zhang, "Personalized cross-silo federated learning on non-IID
data", AAAI 2021, algorithm 1. Claim: adaptive pairwise collaboration beats one global model and
fixed mixtures where clients form unknown groups.

    server:  u_i = xi_ii w_i + sum_{j != i} xi_ij w_j,  xi_ii = 1 - sum_{j != i} xi_ij
             xi_ij = alpha_K A'(||w_i - w_j||^2),  A(x) = 1 - exp(-x / sigma)
    client:  w_i = argmin f_i(w) + (lam / 2) ||w - u_i||^2,  from u_i;  send w_i

Choices (reconstructed): alpha_K = alpha sigma / (N - 1), which keeps every xi_ii at 1 - alpha or
above; lam stands for the paper's lambda / alpha_K; the argmin is the run's local training from u_i;
sigma is a squared distance between models, so it has to suit their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from isthmus import catalogue, tree
from isthmus.contracts import Meta, Reduced
from isthmus.federated.method import Knobs, Known, State
from isthmus.federated.rows import Rows
from isthmus.learn.phase import Carry, Visit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree


class Settings(Knobs):
    """alpha: most that others weigh in a cloud; sigma: reach; lam: strength of the tie to it."""

    alpha: float = Field(0.5, ge=0.0, le=1.0)
    sigma: float = Field(10.0, gt=0.0)
    lam: float = Field(1.0, ge=0.0)


@catalogue.register("fedamp", place="method", status="verified")
class FedAMP(Rows):
    """Overrides D, S, L, V."""

    Settings = Settings

    def sends(self, state: State, known: Sequence[Known]) -> list[Tree]:
        """u_i of each."""
        rows = state["clients"]
        xi = self.attention(rows, torch.tensor([k.client for k in known]))
        mixed = {name: torch.einsum("kn,n...->k...", xi, x) for name, x in rows.items()}
        return tree.unstack(mixed)

    def send(self, state: State, known: Known) -> Tree:
        return self.sends(state, [known])[0]

    def attention(self, rows: Tree, clients: Tensor) -> Tensor:
        """xi of these clients, `[k, N]`; each row sums to 1."""
        flat = tree.flatten_stacked(rows).double()
        # Beside what all models share, their differences would round away in products.
        flat = flat - flat.mean(0)
        square = flat.square().sum(1)
        distance = (square[clients, None] + square - 2.0 * flat[clients] @ flat.T).clamp_min(0.0)
        most = self.knobs.alpha / max(1, self.population - 1)
        own = torch.arange(len(flat)) == clients[:, None]
        others = torch.where(own, 0.0, most * torch.exp(-distance / self.knobs.sigma))
        xi = torch.where(own, 1.0 - others.sum(1, keepdim=True), others)
        return xi.to(next(iter(rows.values())).dtype)

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        params, _ = super().start(visit, down, kept)
        trained = [name for name in self.names.trainable if name in self.names.shared]
        return params, {"u": {name: params[name] for name in trained}}

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        value, aux = super().loss(model, batch, carry)
        w = dict(model.named_parameters())
        for name, u in carry["u"].items():
            value = value + 0.5 * self.knobs.lam * (w[name] - u).square().sum()
        return value, aux

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        return {"clients": self.arrived(state, reduced, meta)}
