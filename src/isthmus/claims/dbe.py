"""DBE: a shift of one's own takes a client's bias out of the features that all share.

Paper (NeurIPS 2023, arXiv 2311.14975): a personal shift of the features and a regulariser towards
their consensus mean make a method both generalise better (a representation that other classifiers
can use, measured by description length; recalled) and personalise better; with them FedAvg passes
ten personalised methods by a large margin.

Here: digits, 20 clients with a Dirichlet(0.1) share of each class, the authors' split, and at least
12 items, a quarter of each client's items held out; an MLP 64-32-10, SGD 0.1, batches of 10, 5
passes a round, 20 rounds, everyone takes part; beta 1 and kappa 50, which is 3.1 for 32 features.
Clients are scored on their own held-out items just after the server has mixed: with their shifts,
and FedAvg's with the global model. How features generalise is the loss, on all held-out items, of a
new classifier fitted to the global features of all training items. Feature means are those of the
clients' training items by the models after the next local training. Mean of three seeds.

Thresholds are half of the mean gaps: 3.1 points of accuracy (four seeds, 1.3 to 5.6); 0.015 of the
probe's loss (six seeds, 0.027 to -0.006, one below zero). Distances are 53 and 17 times smaller
than at kappa 0 (three seeds); 10 and 5 times are asked. Not among the checks: the global model with
its own head is no better for it, but 2.7 points worse (four seeds), as that head has learned from
shifted features. A tenth of kappa personalises more, by 5.6 points, and then passes FedAvg tuned by
one pass before it predicts (.964 and .959), which kappa 50 does not (.939). With 30 clients and
Dirichlet(0.3), kappa 50 personalises by 0.2 points and a tenth of it by 2.3 (four seeds).
"""

from __future__ import annotations

from statistics import mean
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus import tree
from isthmus.claims.claim import Check, Progress
from isthmus.claims.fedala import KEYS, SEEDS, accuracy, ahead, own_models, played
from isthmus.federated.score import evaluate, model_of
from isthmus.models.bind import bind
from isthmus.run.build import Built
from isthmus.tasks.contract import Items

AUTHORS: dict[str, Any] = {**KEYS, "clients": 20, "partition": "dirichlet:0.1,minimum=12"}


class Distances(NamedTuple):
    """Squared distances of the clients' feature means, in the mean over clients."""

    consensus: float
    between: float


def ours(seed: int, kappa: float = 50.0, **more: Any) -> Built:
    return played("dbe", seed, keys=AUTHORS, kappa=kappa, **more)


def held_out(built: Built) -> Items:
    """All clients' held-out items."""
    return built.clients.scored.take(np.concatenate(cast(Any, built.clients.tests)))


def features(built: Built, x: Tensor) -> Tensor:
    """The features of the global model, `[n, K]`."""
    fed = built.federation
    unshifted = tree.zeros_like(tree.row(fed.store.get(np.arange(1)), 0))
    model: Any = bind(fed.ground.module, model_of(fed, unshifted))
    with torch.no_grad():
        return model.features(x)


def whole(built: Built) -> float:
    """Accuracy of the global model, without a shift, on all held-out items."""
    fed = built.federation
    unshifted = tree.zeros_like(tree.row(fed.store.get(np.arange(1)), 0))
    tensors = model_of(fed, unshifted)
    sums = evaluate(built.task, fed.method, fed.ground.module, tensors, held_out(built), unshifted)
    return built.task.metric.finish(sums)["accuracy"]


def probe(built: Built) -> float:
    """Held-out loss (nats) of a linear classifier fitted to the global features."""
    columns, rows = built.federation.ground.columns, built.federation.ground.owned.order
    test, own = held_out(built).columns, torch.from_numpy(rows)
    h, g = features(built, columns["x"][own]), features(built, test["x"])
    middle, wide = h.mean(0), h.std(0) + 1e-3
    h, g = (h - middle) / wide, (g - middle) / wide
    w, b = torch.zeros(h.shape[1], 10, requires_grad=True), torch.zeros(10, requires_grad=True)
    rule = torch.optim.LBFGS([w, b], max_iter=60)

    def fit() -> Tensor:
        rule.zero_grad()
        value = F.cross_entropy(h @ w + b, columns["y"][own]) + 1e-3 * w.square().sum()
        value.backward()
        return value

    rule.step(cast(Any, fit))
    with torch.no_grad():
        return float(F.cross_entropy(g @ w + b, test["y"]))


def distances(built: Built) -> Distances:
    """How far the clients' feature means are from the consensus m, and from their own mean."""
    fed, means = built.federation, []
    for rows, tensors in own_models(fed, "trained"):
        model: Any = bind(fed.ground.module, tensors)
        with torch.no_grad():
            means.append(model.features(fed.ground.columns["x"][rows]).mean(0))
    mu, m = torch.stack(means), fed.state["dbe"]["head.m"]
    return Distances(*(float((mu - at).square().sum(1).mean()) for at in (m, mu.mean(0))))


def claim(progress: Progress) -> list[Check]:
    """Personal accuracy, the global features under a new classifier, and where features lie."""
    progress(f"fedavg, {SEEDS} seeds")
    plain = [played("fedavg", seed, keys=AUTHORS) for seed in range(SEEDS)]
    progress(f"dbe, {SEEDS} seeds")
    both = [ours(seed) for seed in range(SEEDS)]
    progress(f"dbe without the regulariser, {SEEDS} seeds")
    free = [distances(ours(seed, 0.0)) for seed in range(SEEDS)]
    a, b = (mean(accuracy(run) for run in runs) for runs in (both, plain))
    served = f"global models {mean(map(whole, both)):.3f} and {mean(map(whole, plain)):.3f}"
    p, q = (mean(probe(run) for run in runs) for runs in (both, plain))
    near = [distances(run) for run in both]
    m, spread = ([mean(d[i] for d in side) for side in (near, free)] for i in (0, 1))
    return [
        ahead("personalises better", a, b, "FedAvg", 0.015, served),
        Check(
            "features generalise better",
            "better representations",
            f"loss of a new classifier {p:.3f}, FedAvg {q:.3f} (gap {q - p:.3f}, 0.007 asked)",
            q - p > 0.007,
        ),
        Check(
            "features move to the consensus",
            "the regulariser aligns their means",
            f"squared distance {m[0]:.2f}, at kappa 0 {m[1]:.2f} (10 times asked)",
            m[0] < m[1] / 10,
        ),
        Check(
            "clients move together",
            "the regulariser aligns their means",
            f"squared distance from their mean {spread[0]:.2f}, at kappa 0 {spread[1]:.2f} "
            "(5 times asked)",
            spread[0] < spread[1] / 5,
        ),
    ]
