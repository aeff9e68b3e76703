"""FedSynSAM: synthetic data at the server show the global ascent that local gradients miss.

Paper (arXiv 2602.11584): update compression sharpens the loss landscape, most with unlike
clients; SAM with a local perturbation, or along the last update of the global model, misses the
global direction under compression, and FedSynSAM estimates it accurately.

Here: TODO
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.claims.claim import Check, Progress
from isthmus.claims.fedspeed import top_eigenvalue
from isthmus.federated.distilled import soft_loss
from isthmus.federated.methods.fedsynsam import mixed
from isthmus.federated.round import Federation
from isthmus.models.bind import bind
from isthmus.run.build import build
from isthmus.run.config import Config
from isthmus.tree import Tree
from isthmus.wire.ledger import Ledger

SEEDS, R0, LOOKED = 3, 20, 10
KEYS: dict[str, Any] = {
    "task": "digits",
    "method": "fedsynsam",
    "clients": 10,
    "cohort": 5,
    "partition": "dirichlet:0.1,minimum=12",
    "rounds": R0 + LOOKED,
    "epochs": 1,
    "batch": 10,
    "optimiser": "sgd",
    "lr": 0.1,
}
CODECS = {"none": "dense", "Top-10 %": "topk:0.1"}


class Seen(NamedTuple):
    """Mean cosines to the true global gradient; the sharpness after R0 rounds of FedAvg."""

    local: float
    last: float
    synthetic: float
    half: float
    sharpness: float


def look(codec: str, seed: int) -> Seen:
    """The directions that clients could climb in the rounds after the set is there."""
    config = Config.make({**KEYS, "codec": CODECS.get(codec, codec), "seed": seed})
    fed = build(config, Ledger()).federation
    seen: list[list[float]] = []
    sharp = 0.0
    before = fed.state["shared"]
    while fed.round < config.rounds:
        w = fed.state["shared"]
        if fed.round == R0:
            sharp = top_eigenvalue(fed.ground.module, w, fed.ground.columns)
        if fed.round >= R0:
            seen += [at(fed, w, before, int(c)) for c in fed.schedule.clients(fed.round + 1)]
        before = w
        fed.step()
    return Seen(*(mean(column) for column in zip(*seen, strict=True)), sharp)


def at(fed: Federation, w: Tree, before: Tree, client: int) -> list[float]:
    """Cosines at the model w that a client is sent, with the batch that it draws first."""
    columns, held = fed.ground.columns, fed.state["synthetic"]
    rows = torch.from_numpy(fed.ground.owned.rows(client))
    order = seeds.permutation(seeds.key(fed.seed, "look", fed.round, client), len(rows))
    batch = rows[order[:10]]

    def on(rows: Tensor) -> Tree:
        x, y = columns["x"][rows], columns["y"][rows]
        return torch.func.grad(lambda u: F.cross_entropy(bind(fed.ground.module, u)(x), y))(w)

    everyone = torch.from_numpy(np.sort(fed.ground.owned.order))
    true, a = on(everyone), on(batch)
    b = torch.func.grad(lambda u: soft_loss(bind(fed.ground.module, u), held["x"], held["y"]))(w)
    last = tree.sub(before, w)
    return [cosine(d, true) for d in (a, last, b, mixed(a, b, 0.5))]


def cosine(a: Tree, b: Tree) -> float:
    return float(F.cosine_similarity(tree.flatten(a), tree.flatten(b), dim=0))
