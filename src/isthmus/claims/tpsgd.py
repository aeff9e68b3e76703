"""tpSGD: within five points of backpropagation on dense nets; not so, here, on the other two kinds.

Paper (Lomnitz et al., arXiv 2208.08503): without backpropagation, within 5 % of its accuracy on
shallow dense, convolutional and recurrent nets, and above other gradient-free methods.

Here: digits in one place, tanh, weights of variance 1 / inputs, batches of 32, 30 epochs of plain
SGD at 0.05 (0.02 for the absolute loss and for the recurrent net, where it was the best of five
rates). Dense nets 64-64x4-10 (means of two seeds), 64-64x8-10 and 64-128-10 (one); two convolutions
of 16 and 32 channels with pooling at 0.2 for 20 epochs; a recurrent layer of 64 that reads the
rows. Then 30 clients of S1 (Dirichlet 0.3, MLP 64-32-10, 20 rounds), with the projections of all
clients from one seed or each client's from its own.

The dense claim holds: over three seeds .965 against .976 (four layers), .966 against .970 (eight),
.965 against .958 (one), where direct random target projection has .870, .619 and .950. The
other two do not: .86 against .93 for convolutions and .84 against .97 for recurrent layers (.68
with the target at every step), no better than training the last layer alone. How targets
apply in these is not in the abstract; both ways that were tried are knobs. Status: not-reproduced.

Thresholds: five points are the paper's; the others are half of the mean gaps (0.095 above direct
projection and 0.156 above the last layer alone, three seeds; 0.098 between one seed for all
clients and seeds of their own, two).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from torch import nn

from isthmus.claims.claim import Check, Progress
from isthmus.models.nets import Net, initialise, mlp
from isthmus.models.recurrent import rnn
from isthmus.run.api import train
from isthmus.tasks.contract import Size
from isthmus.tasks.digits import Digits

NEAR = 0.05
ABOVE_DRTP, ABOVE_LAST, ONE_SEED = 0.047, 0.078, 0.049
CENTRAL: dict[str, Any] = {
    "clients": 1,
    "partition": "iid",
    "rounds": 1,
    "batch": 32,
    "evaluate": 0,
}
S1: dict[str, Any] = {
    "clients": 30,
    "partition": "dirichlet:0.3,minimum=12",
    "holdout": 0.25,
    "rounds": 20,
    "epochs": 5,
    "batch": 10,
    "lr": 0.05,
    "evaluate": 0,
}


class TanhDigits(Digits):
    """Digits with a net of our own, its weights of variance 1 / inputs and its biases zero."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        self.make = make

    def build(self, size: Size = "small", seed: int = 0) -> nn.Module:
        net = self.make(seed)
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.mul_(3**0.5 if name.endswith("weight") else 0.0)
        return net


def dense(*hidden: int) -> TanhDigits:
    return TanhDigits(lambda seed: mlp([64, *hidden, 10], "tanh", seed))


def pictures() -> TanhDigits:
    def make(seed: int) -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (width, after) in enumerate(((1, 16), (16, 32))):
            layers[f"conv{i}"] = nn.Conv2d(width, after, 3, padding=1)
            layers[f"tanh{i}"], layers[f"pool{i}"] = nn.Tanh(), nn.AvgPool2d(2)
        layers["flatten"] = nn.Flatten()
        return initialise(Net(nn.Sequential(layers), nn.Linear(128, 10)), seed)

    return TanhDigits(make)


def accuracy(
    task: TanhDigits, method: str, lr: float = 0.05, seeds: int = 1, epochs: int = 30, **knobs: Any
) -> float:
    keys = {**CENTRAL, "lr": lr, "epochs": epochs, "settings": knobs}
    return mean(train(task, method, seed=seed, **keys).accuracy for seed in range(seeds))


def claim(progress: Progress) -> list[Check]:
    """Dense nets, the other two kinds, and a federation."""
    progress("four hidden layers, two seeds")
    four = dense(64, 64, 64, 64)
    back, local = (accuracy(four, method, seeds=2) for method in ("fedavg", "tpsgd"))
    absolute = accuracy(four, "tpsgd", 0.02, seeds=2, local_loss="absolute")
    direct, last = (accuracy(four, method, seeds=2) for method in ("drtp", "last-layer-only"))
    checks = [
        near("dense, 4 hidden layers", back, local),
        near("dense, absolute loss", back, absolute),
        above("above direct projection", "better than other gradient-free methods", local, direct,
              ABOVE_DRTP),
        above("above the last layer alone", "the hidden layers learn", local, last, ABOVE_LAST),
    ]  # fmt: skip
    for name, task in (
        ("dense, 8 hidden layers", dense(*[64] * 8)),
        ("dense, 1 hidden layer", dense(128)),
    ):
        progress(name)
        checks.append(near(name, accuracy(task, "fedavg"), accuracy(task, "tpsgd")))
    progress("convolutions")
    back, local, last = (
        accuracy(pictures(), method, 0.2, epochs=20)
        for method in ("fedavg", "tpsgd", "last-layer-only")
    )
    checks.append(near("convolutions", back, local, last))
    progress("a recurrent layer")
    rows = TanhDigits(lambda seed: rnn([8, 64, 10], seed))
    back, last = (accuracy(rows, method) for method in ("fedavg", "last-layer-only"))
    checks.append(near("recurrent", back, accuracy(rows, "tpsgd", 0.02), last))
    progress("30 clients")
    one, own = (
        train(dense(32), "tpsgd", settings={"alone": alone}, **S1).accuracy
        for alone in (False, True)
    )
    said = "clients must share the seed of their projections"
    return [*checks, above("one seed for all clients", said, one, own, ONE_SEED)]


def near(name: str, back: float, local: float, last: float | None = None) -> Check:
    """At most five points below backpropagation; `last` is the last layer alone."""
    also = "" if last is None else f", last layer alone {last:.3f}"
    here = f"accuracy {local:.3f}, backpropagation {back:.3f}{also} (0.05 below allowed)"
    return Check(name, "within 5 % of backpropagation", here, local >= back - NEAR)


def above(name: str, paper: str, high: float, low: float, asked: float) -> Check:
    gap = high - low
    here = f"accuracy {high:.3f} and {low:.3f} (gap {gap:.3f}, {asked} asked)"
    return Check(name, paper, here, gap >= asked)
