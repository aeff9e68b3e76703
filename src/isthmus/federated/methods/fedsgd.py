"""FedSGD: one step of synchronised gradient descent a round.

McMahan et al., AISTATS 2017, section 2 (the baseline of FedAvg): each client takes the gradient
of its whole data at the global model, the server steps along the weighted mean.

    w <- w - lr * sum_i (n_i / n) grad F_i(w)

It is FedAvg with one local step on the full batch of plain SGD, and is written as that.
"""

from __future__ import annotations

from dataclasses import replace

from isthmus import catalogue
from isthmus.federated.method import Method
from isthmus.models import optim


@catalogue.register("fedsgd", place="method", status="verified")
class FedSGD(Method):
    """One full-batch step of plain SGD; the run's batch size and epochs do not apply."""

    def __post_init__(self) -> None:
        plain = optim.sgd(self.local.optimiser.lr)
        self.local = replace(self.local, optimiser=plain, batch=0, epochs=1, steps=1)
