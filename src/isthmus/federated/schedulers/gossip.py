"""Gossip: in each round random pairs of neighbours average their models.

Boyd, Ghosh, Prabhakar and Shah, "Randomized gossip algorithms", IEEE Transactions on Information
Theory 2006. Claim: pairwise averages reach consensus at a rate set by the second eigenvalue of
the expected mixing matrix.

    W = I - (1/2) sum over a random matching of (e_i - e_j)(e_i - e_j)^T

The paper wakes one pair at a time; here a round wakes a maximal random matching.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isthmus import catalogue, seeds
from isthmus.federated.schedulers.decentralised_sgd import DecentralisedSGD
from isthmus.federated.schedulers.graph import graph, matching


@catalogue.register("gossip", place="schedule", status="verified")
@dataclass
class Gossip(DecentralisedSGD):
    """graph: ring, complete, torus, star or none; who may pair with whom."""

    graph: str = "complete"
    seed: int = 0

    def mixing(self, round: int) -> np.ndarray:
        near = graph(self.graph, self.population)
        return matching(near, seeds.fold(seeds.key(self.seed, "gossip"), round))
