"""FedALA: a start mixed for each client beats the global model and training alone.

Paper (AAAI 2023, arXiv 2212.01197): learning elementwise how much of the global head to take over
gives up to 3.27 % more accuracy than eleven methods on five data sets, and lifts other methods by
up to 24.19 %.

Here: digits, 30 clients with a Dirichlet(0.3) share of each class and at least 12 items, a quarter
of each client's items held out; an MLP 64-32-10, SGD 0.1, batches of 10, 5 passes a round, 20
rounds, everyone takes part. The head is mixed (eta 1, s 80). Clients are scored on their own
held-out items just after the server has mixed: with FedALA by the start that each has learned,
with FedAvg by the global model. Mean of three seeds.

Thresholds are half of the mean gaps over four seeds: 2.6 points to FedAvg (1.8 to 3.3), 7.1 to
training alone (5.3 to 9.8), 3.4 to FedProx (mu 0.1) as its plug-in (2.7 to 4.0). Not among the
checks, because it is too little or not so: FedAvg tuned by one pass before it predicts is 0.8
points behind (0.2 to 2.0); SCAFFOLD gains 0.6 points by the plug-in, with one of four seeds below
zero; and right after local training FedAvg has .942 and FedALA .936 (two seeds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.claims.claim import Check, Progress
from isthmus.federated.round import Federation
from isthmus.federated.score import Moment, model_of, models_of, score
from isthmus.models.bind import bind
from isthmus.run.build import Built, build
from isthmus.run.config import Config
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree
from isthmus.wire.ledger import Ledger

SEEDS, ROUNDS = 3, 20
KEYS: dict[str, Any] = {
    "task": "digits",
    "clients": 30,
    "partition": "dirichlet:0.3,minimum=12",
    "holdout": 0.25,
    "epochs": 5,
    "batch": 10,
    "lr": 0.1,
}
PROX: dict[str, Any] = {"mu": 0.1}


def played(
    method: str,
    seed: int,
    watch: Callable[[Federation], None] = lambda fed: None,
    rounds: int = ROUNDS,
    keys: dict[str, Any] = KEYS,
    **settings: Any,
) -> Built:
    """A federation of the bench after its rounds; `watch` is shown it after each."""
    given = {**keys, "method": method, "seed": seed, "settings": settings}
    built = build(Config.make(given), Ledger())
    for _ in range(rounds):
        built.federation.step()
        watch(built.federation)
    return built


def accuracy(built: Built, at: Moment = "mixed") -> float:
    """The share of all held-out items that are right, each judged by its owner's model."""
    items, tests = built.clients.scored, built.clients.tests
    return next(iter(score(built.federation, built.task, items, tests, "test", at)))["accuracy"]


def own_models(fed: Federation, at: Moment = "mixed") -> Iterator[tuple[Tensor, Tree]]:
    """Each client's training rows of the pool, and its model."""
    everyone = np.arange(len(fed.ground.owned))
    models = models_of(fed, everyone, fed.store.get(everyone), at)
    for client, model in enumerate(models):
        yield torch.from_numpy(fed.ground.owned.rows(client)), model


def lead(fed: Federation) -> Tensor:
    """By how much each client's next start is below the global model, on its own items: `[n]`."""
    whole = model_of(fed, {})

    def loss(rows: Tensor, tensors: Tree) -> float:
        batch = Batch({n: x[rows] for n, x in fed.ground.columns.items()}, torch.ones(len(rows)))
        with torch.no_grad():
            return float(fed.method.stage.loss(bind(fed.ground.module, tensors), batch)[0])

    return torch.tensor([loss(rows, whole) - loss(rows, own) for rows, own in own_models(fed)])


def leads(seed: int, rounds: int) -> Tensor:
    """`lead` before each round from the second on: `[rounds, n]`."""
    seen: list[Tensor] = []
    played("fedala", seed, lambda fed: seen.append(lead(fed)), rounds)
    return torch.stack(seen)


def claim(progress: Progress) -> list[Check]:
    """Accuracy beside FedAvg and training alone, before FedProx, and where clients start."""
    found: dict[str, float] = {}
    seen: list[Tensor] = []
    for method in ("local-only", "fedavg", "fedavg-ft", "fedala", "fedprox", "fedala+fedprox"):
        progress(f"{method}, {SEEDS} seeds")
        settings = PROX if "fedprox" in method else {}
        watch = (lambda fed: seen.append(lead(fed))) if method == "fedala" else lambda fed: None
        runs = [played(method, seed, watch, **settings) for seed in range(SEEDS)]
        found[method] = mean(accuracy(run) for run in runs)
    alone, whole, tuned, ours, prox, both = found.values()
    return [
        ahead(
            "better than the global model",
            ours,
            whole,
            "FedAvg",
            0.012,
            f"FedAvg tuned {tuned:.3f}",
        ),
        ahead("better than a client alone", ours, alone, "alone", 0.035),
        ahead("lifts another method", both, prox, "FedProx", 0.017),
        started(torch.stack(seen)),
    ]


def ahead(name: str, a: float, b: float, other: str, margin: float, note: str = "") -> Check:
    """One accuracy above another by a margin."""
    here = f"accuracy {a:.3f}, {other} {b:.3f} (gap {a - b:.3f}, {margin:.3f} asked)"
    return Check(name, "higher accuracy", f"{here}; {note}" if note else here, a - b > margin)


def started(leads: Tensor) -> Check:
    """Before every round from the second on, every client's start is the better one for it."""
    least, share = float(leads.min()), float((leads > 0).double().mean())
    here = (
        f"loss below that of the global model for {share:.1%} of all starts (least gap {least:.3f})"
    )
    return Check("every start is below the global model", "lowers the own loss", here, share == 1.0)
