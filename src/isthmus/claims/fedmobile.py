"""FedMobile: three stages of drifting digits, few of them labelled, nothing old kept.

Paper (arXiv 2312.12666): best among the selected baselines on a real data set of influenza-like
symptoms. No figure of it can be checked without those data; what is checked is the direction that
the abstract's argument needs: distillation guards old knowledge, and consistency adds to it.

Here: digits in three stages, turned by 0, 30 and 60 degrees; eight clients by Dirichlet(1) with a
third of their items in each stage, 15 % of them labelled; 12 rounds of three epochs a stage, MLP
64-32-10, SGD 0.1, batch 10, the method's defaults. After the last stage the model is scored on the
test items turned by each angle. `supervised` is the same run without both terms, `semi` without
distillation, `kd` without consistency. Forgetting is the loss of accuracy on the first domain since
the end of its stage.

Not reproduced at the sizes asked, which were set before these runs: over seeds 0, 1, 2 full reached
.679, .625, .610 on the mean of the domains and supervised .603, .633, .595 (gain .028); it forgot
.167, .158, .292 and supervised .331, .256, .381 (64 %); on the newest domain full had .772, .608,
.669 and supervised .808, .725, .781 (price .088). The directions are the expected ones, but for
the mean with seed 1. With lam_k = 1 and seed 0 full had .680, forgot .100 and paid .102; kd alone
had .664 and semi alone .596.
"""

from __future__ import annotations

from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus import seeds
from isthmus.claims.claim import Check, Progress
from isthmus.run.api import Run, train
from isthmus.tasks import partition
from isthmus.tasks.contract import Items, Size, Splits
from isthmus.tasks.digits import Digits
from isthmus.tasks.losses import IGNORE

SEEDS, CLIENTS, ROUNDS = 3, 8, 12
ANGLES = (0.0, 30.0, 60.0)
LABELLED = 0.15
UNKNOWN = IGNORE
KEYS: dict[str, Any] = {
    "clients": CLIENTS, "partition": "natural", "rounds": ROUNDS * len(ANGLES), "epochs": 3,
    "batch": 10, "lr": 0.1, "link": "ideal",
}  # fmt: skip
VARIANTS: dict[str, dict[str, float]] = {
    "supervised": {"lam_u": 0.0, "lam_k": 0.0},
    "semi": {"lam_k": 0.0},
    "kd": {"lam_u": 0.0},
    "full": {},
}


class Drifting(Digits):
    """Digits whose training items have a stage and an owner and are turned by their stage's angle;
    those without a label have the class that no loss counts. Test items are turned by `angle`."""

    def __init__(self, angle: float) -> None:
        self.angle = angle

    def synthesise(self, seed: int = 0, size: Size = "small") -> Splits:
        splits = super().synthesise(seed, size)
        items, y = splits.train, splits.train.columns["y"]
        draw = seeds.rng(seed, "drift")
        stage = torch.from_numpy(draw.permutation(len(items)) % len(ANGLES))
        known = torch.zeros(len(items), dtype=torch.int64)
        owner = np.empty(len(items), np.int64)
        parts = partition.dirichlet(CLIENTS, seed, labels=y.numpy(), alpha=1.0, minimum=30)
        for client, part in enumerate(parts):
            owner[part] = client
            for s in range(len(ANGLES)):
                mine = part[stage[part].numpy() == s]
                known[draw.permutation(mine)[: max(1, round(LABELLED * len(mine)))]] = 1
        turned = torch.stack([turn(items.columns["x"], angle) for angle in ANGLES])
        x = turned[stage, torch.arange(len(items))]
        y = torch.where(known > 0, y, UNKNOWN)
        columns = {"x": x, "y": y, "labelled": known, "stage": stage}
        held = Items(columns, [f"{client}" for client in owner], items.domain)
        test = splits.test
        shown = {**test.columns, "x": turn(test.columns["x"], self.angle)}
        return Splits(held, splits.val, Items(shown, test.group, test.domain))


def turn(x: Tensor, degrees: float) -> Tensor:
    """Pictures `[n, 1, h, w]` turned about their middle, by linear interpolation."""
    angle = torch.tensor(degrees).deg2rad()
    c, s = angle.cos(), angle.sin()
    zero = torch.zeros(())
    grid = torch.stack([torch.stack([c, -s, zero]), torch.stack([s, c, zero])])
    where = F.affine_grid(grid.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, where, align_corners=False)


class Seen(NamedTuple):
    """Accuracy on each domain at the end, and on the first one at the end of its stage."""

    domains: tuple[float, ...]
    first: float

    @property
    def forgotten(self) -> float:
        return self.first - self.domains[0]


def run(variant: str, seed: int) -> Seen:
    """One run, scored on the first domain each stage and on all at the end."""
    settings = {**VARIANTS[variant], "rounds": ROUNDS, "stages": len(ANGLES)}
    keys = {**KEYS, "evaluate": ROUNDS}
    done = train(Drifting(0.0), "fedmobile", settings=settings, seed=seed, **keys)
    rows = {row["round"]: row["accuracy"] for row in done.metrics if row["scope"] == "global"}
    return Seen(tuple(accuracy(done, angle, seed) for angle in ANGLES), rows[ROUNDS])


def accuracy(done: Run, angle: float, seed: int) -> float:
    """Of the final model on test items turned by an angle."""
    test = Drifting(angle).synthesise(seed).test.columns
    with torch.no_grad():
        return float((done.model(test["x"]).argmax(-1) == test["y"]).double().mean())


def claim(progress: Progress) -> list[Check]:
    """Mean over the domains, forgetting of the first, price on the newest."""
    seen: dict[str, list[Seen]] = {}
    for variant in VARIANTS:
        progress(f"{variant}, {SEEDS} seeds")
        seen[variant] = [run(variant, seed) for seed in range(SEEDS)]
    overall = {n: mean(mean(s.domains) for s in runs) for n, runs in seen.items()}
    lost = {n: mean(s.forgotten for s in runs) for n, runs in seen.items()}
    new = {n: mean(s.domains[-1] for s in runs) for n, runs in seen.items()}
    gain, price = overall["full"] - overall["supervised"], new["supervised"] - new["full"]
    return [
        Check(
            "better over all domains",
            "best among the baselines (no figures)",
            f"{_said(overall)} (gain {gain:+.3f}, 0.025 asked)",
            gain >= 0.025,
        ),
        Check(
            "forgets less",
            "distillation guards old knowledge",
            f"{_said(lost)} (60 % of supervised asked)",
            lost["full"] <= 0.6 * lost["supervised"],
        ),
        Check(
            "at a small price on the newest domain",
            "(not in the abstract)",
            f"{_said(new)} (price {price:.3f}, at most 0.08 asked)",
            price <= 0.08,
        ),
    ]


def _said(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
