"""Peers that move: islands of like labels, joined by random or by label-driven travel.

Paper claims: decentralised training converges in sparse networks once some users move,
that a small moving share already helps much, and that motion induced by label distributions beats
random motion (by up to 8 % where labels differ most).

Run here: digits, softmax regression, 24 peers with two classes each, laid out by label in the unit
square, range 0.14, four movers, at most 0.5 a round, 5 steps of 20 items at 0.3, 150 rounds; the
mean accuracy of all peers' own models on all test items, over four seeds. A peer that stays put
hears of few classes. Thresholds: random at least 0.05 above static, dcm at least 0.1 above random.
With a smaller step (0.25) and a wider range (0.2) greedy routes cycle inside the reachable part:
there distribution-aware motion is expected to lose to random motion, and is shown as it is.
"""

from __future__ import annotations

from statistics import mean

from torch import nn

from isthmus.claims.claim import Check, Progress
from isthmus.models.nets import mlp
from isthmus.run.api import train
from isthmus.tasks.contract import Size
from isthmus.tasks.digits import Digits

SEEDS = 4
KEYS = {
    "clients": 24, "partition": "shards:2", "rounds": 150, "steps": 5, "batch": 20, "lr": 0.3,
    "evaluate": 0, "link": "ideal",
}  # fmt: skip


class Softmax(Digits):
    """Digits with softmax regression."""

    def build(self, size: Size = "small", seed: int = 0) -> nn.Module:
        return mlp([64, 10], seed=seed)


def accuracy(schedule: str) -> float:
    """Mean over seeds and peers at the end."""
    return mean(
        train(Softmax(), seed=seed, schedule=schedule, **KEYS).accuracy for seed in range(SEEDS)
    )


def claim(progress: Progress) -> list[Check]:
    """Static, random, both kinds of aware motion, and the complete graph as the upper bound."""
    here: dict[str, float] = {}
    for motion in ("static", "random", "dam", "dcm"):
        progress(f"{motion}, {SEEDS} seeds")
        here[motion] = accuracy(f"mobility:motion={motion}")
    progress("complete graph")
    here["complete"] = accuracy("decentralised-sgd:graph=complete")
    wide = {}
    for motion in ("random", "dcm"):
        progress(f"{motion}, wider range, shorter moves")
        wide[motion] = accuracy(f"mobility:motion={motion},r=0.2,move=0.25")
    said = ", ".join(f"{name} {value:.3f}" for name, value in here.items())
    gain, more = here["random"] - here["static"], here["dcm"] - here["random"]
    return [
        Check("moving helps", "a few moving users help much", f"{said} (0.05 asked)", gain >= 0.05),
        Check(
            "labels guide better than chance",
            "up to 8 % above random motion",
            f"dcm {more:+.3f}, dam {here['dam'] - here['random']:+.3f} (0.1 asked of dcm)",
            more >= 0.1,
        ),
        Check(
            "below everybody with everybody",
            "(bound)",
            f"complete {here['complete']:.3f}, best motion {max(here['dam'], here['dcm']):.3f}",
            here["complete"] > max(here["dam"], here["dcm"]),
        ),
        Check(
            "greedy routes need reach",
            "(not in the papers)",
            f"range 0.2, moves of 0.25: random {wide['random']:.3f}, dcm {wide['dcm']:.3f}",
            wide["dcm"] < wide["random"] + 0.1,
        ),
    ]
