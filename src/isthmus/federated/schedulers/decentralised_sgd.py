"""D-PSGD: local steps, then averaging over a fixed graph.

Lian, Zhang, Zhang, Hsieh, Zhang, Liu, "Can decentralized algorithms outperform centralized
algorithms? A case study for decentralized parallel stochastic gradient descent", NeurIPS 2017,
arXiv:1705.09056, algorithm 1. Claim: the rate of centralised SGD, with less traffic at the busiest
node.

    x_i <- sum_j W_ij x_j - lr grad F_i(x_i)

Here a peer averages after its steps (as in "adapt then combine"), with W the Metropolis weights;
with the complete graph and equal sizes every round is one of FedAvg. `--steps 1` is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from isthmus import catalogue
from isthmus.federated.schedulers.graph import graph, metropolis


@catalogue.register("decentralised-sgd", place="schedule", status="verified")
@dataclass
class DecentralisedSGD:
    """graph: ring, complete, torus, star or none."""

    population: int
    graph: str = "ring"

    kind: ClassVar[str] = "gossip"

    def __post_init__(self) -> None:
        graph(self.graph, self.population)

    @cached_property
    def w(self) -> np.ndarray:
        return metropolis(graph(self.graph, self.population))

    def mixing(self, round: int) -> np.ndarray:
        """W of a round: float64 `[n, n]`."""
        return self.w

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass
