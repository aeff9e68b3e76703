"""Two small benches on which methods keep their order: personal, and with few clients at a time.

`personal`: digits over 30 clients, Dirichlet(0.3) with 12 items or more, a quarter of each client's
items held out, five passes a round in batches of 10, SGD at 0.1, 20 rounds, everyone takes part.
Every method is scored twice, by the mean accuracy over clients on their own held-out items: just
after mixing, and just after the next local training.

`partial`: 20 clients, Dirichlet(0.1), five in a round, 60 rounds, otherwise alike; the mean
accuracy of the global model on the task's test items over the last ten rounds.

Beside each stands what a prototype of the described algorithm had, which scored personal models
after training and global ones after mixing, over two to four seeds.
"""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from isthmus.bench.figure import Figure
from isthmus.run.api import train

SEEDS = (0, 1, 2)
DIGITS: dict[str, Any] = {"task": "digits", "epochs": 5, "batch": 10, "lr": 0.1}
PERSONAL: dict[str, Any] = {
    **DIGITS, "clients": 30, "partition": "dirichlet:0.3,minimum=12", "holdout": 0.25,
    "rounds": 20, "evaluate": 0,
}  # fmt: skip
PARTIAL: dict[str, Any] = {
    **DIGITS, "clients": 20, "cohort": 5, "partition": "dirichlet:0.1,minimum=12", "rounds": 60,
    "evaluate": 1,
}  # fmt: skip

EXPECTED_PERSONAL = {
    "local-only": 0.891, "fedavg": 0.923, "fedavg-ft": 0.950, "fedper": 0.908, "fedrep": 0.904,
    "ditto": 0.942, "fedala": 0.940, "dbe": 0.944, "gpfl": 0.917, "fedcp": 0.913,
}  # fmt: skip
EXPECTED_PARTIAL = {
    "fedavg": 0.917, "fedprox": 0.911, "fedsam": 0.921, "scaffold": 0.962, "feddyn": 0.961,
    "fedspeed": 0.965,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {"fedcp": {"lam": 0.5}}
"""Where the paper's default, for 512 features, is far too strong for 32."""


def figures() -> list[Figure]:
    """Both benches, three seeds of each method."""
    out: list[Figure] = []
    for name, expected in EXPECTED_PERSONAL.items():
        out += row("personal", name, expected, {
            f"after {word}": [personal(name, seed, score) for seed in SEEDS]
            for word, score in (("mixing", "mixed"), ("training", "trained"))
        })  # fmt: skip
    for name, expected in EXPECTED_PARTIAL.items():
        here = {"last ten rounds": [partial(name, seed) for seed in SEEDS]}
        out += row("partial", name, expected, here)
    return out


def personal(method: str, seed: int, score: str) -> float:
    """Mean accuracy over clients on their own items, after the last round."""
    return run(method, seed, {**PERSONAL, "score": score}).accuracy


def partial(method: str, seed: int) -> float:
    """Mean test accuracy of the last ten rounds."""
    rows = run(method, seed, PARTIAL).metrics
    curve = [row["accuracy"] for row in rows if row["scope"] == "global"]
    return mean(curve[-10:])


def run(method: str, seed: int, keys: dict[str, Any]) -> Any:
    return train(method=method, seed=seed, settings=SETTINGS.get(method, {}), **keys)


def row(table: str, name: str, expected: float, here: dict[str, list[float]]) -> list[Figure]:
    """What was expected of a method, and mean and spread of what it has."""
    out = [Figure(f"{table}, {name}, prototype", expected, "", cell=(table, name, "prototype"))]
    for when, found in here.items():
        for what, value in ((when, mean(found)), (f"{when}: +-", stdev(found))):
            out.append(Figure(f"{table}, {name}, {what}", value, "", cell=(table, name, what)))
    return out
