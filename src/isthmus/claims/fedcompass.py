"""FedCompass: sooner than FedAvg, better than FedAsync; not so beside FedBuff.

Paper (Li et al., ICLR 2024, arXiv:2309.14675): faster convergence and higher accuracy than other
asynchronous algorithms, and more efficient than synchronous ones, when clients are unlike in speed
and in data.

Here: (A) three clients of 1, 2 and 4 seconds a step under the whole engine, beside the mixes as
worked out by hand. (B) Digits, 20 clients by Dirichlet(0.1) with 12 items or more, slowed by
lognormal factors (0.5) with 5 % of jitter, links that take no time, MLP 64-32-10, SGD 0.1, batch
10. A visit has 10 to 50 steps under FedCompass (f = 1.5) and 50 under the others: FedAvg of all
clients, FedAsync (0.6) and FedBuff (K = 3), staleness to the power of -0.5. Every run lasts as
many virtual seconds as nine rounds of FedAvg, and its model is scored at 90 even times: when it
first has 85 %, in rounds of FedAvg, and its mean over the last quarter; means of two seeds.

Thresholds are half of the mean gaps of seeds 0, 1, 2: FedCompass had 85 % after 4.5, 5.5, 2.3
rounds and FedAvg after 7.0, 8.0, 5.0 (0.61 of the time; 0.8 asked); at the end FedCompass had
.868, .880, .960, FedAsync .842, .854, .944 (+.023; .01 asked) after 85 % at 7.4, 6.1, 2.2. FedBuff
as published is the better one: .891, .918, .970 (+.024 above FedCompass), 85 % after 3.3, 3.2, 1.5;
over 20 rounds and with seed 1 it was .937 and .930. So that part of the claim is not reproduced.
It holds where FedBuff's uploads are weighed by one in N and not one in K, as FedCompass's are and
as the authors' framework has it: .735, .770, .918 (-.095; half is asked). Also seen: FedAsync with
0.3 and 0.9 had .828 and .838 with seed 0 (.838 with 0.3 and seed 1); FedCompass with f = 1.2 had
85 % after 6.7 rounds and .855 at the end with seed 0.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import numpy as np

from isthmus.claims.claim import Check, Progress
from isthmus.federated.schedulers.fedcompass import FedCompass
from isthmus.federated.score import evaluate, model_of
from isthmus.run.build import Built, build
from isthmus.run.config import Config
from isthmus.wire.ledger import Ledger

SEEDS, ROUNDS, POINTS, LEVEL = 2, 9, 90, 0.85
"""Runs last as long as this many rounds of FedAvg and are looked at as many times, evenly."""
QMIN, QMAX = 10, 50
DIVIDED = "fedbuff/N"
"""FedBuff whose sum is divided by all 20 clients instead of K."""
SCHEDULES = {
    "fedavg": "sync",
    "fedcompass": f"fedcompass:qmin={QMIN},qmax={QMAX}",
    "fedasync": "fedasync",
    "fedbuff": "fedbuff:k=3",
    DIVIDED: "fedbuff:k=3,server_lr=0.15",
}
KEYS: dict[str, Any] = {
    "clients": 20, "partition": "dirichlet:0.1,minimum=12", "steps": QMAX, "batch": 10, "lr": 0.1,
    "speeds": "lognormal:0.5", "jitter": 0.05, "link": "ideal",
}  # fmt: skip
THREE: dict[str, Any] = {
    "clients": 3, "partition": "iid", "schedule": "fedcompass:qmin=20,qmax=100,f=1.2",
    "speeds": "1,2,4", "batch": 1, "lr": 0.01, "link": "ideal",
}  # fmt: skip
"""Single items, so that every step takes a device the same time."""
BY_HAND = (
    (100, {0}), (200, {1}), (200, {0}), (300, {0}), (320, {0, 1}), (400, {2}), (420, {0, 1}),
    (520, {0}), (540, {0, 1, 2}), (640, {0, 1, 2}), (740, {0, 1, 2}),
)  # fmt: skip
"""When the fastest client's steps are the unit of time: each mix, and who is in it."""


def built(keys: dict[str, Any]) -> Built:
    """A run of FedAvg's clients under some schedule, ready to start."""
    return build(Config.make({"task": "digits", "method": "fedavg", **keys}), Ledger())


def trace() -> tuple[list[tuple[float, set[int]]], list[int]]:
    """The mixes of three clients of 1, 2 and 4 seconds a step; the steps of the last mix."""
    fed = built(THREE).federation
    reports = [fed.step() for _ in BY_HAND]
    assert isinstance(fed.schedule, FedCompass)
    unit = reports[0].now / 100
    return (
        [(report.now / unit, set(report.clients)) for report in reports],
        [fed.schedule.steps[client] for client in range(3)],
    )


def span(seed: int) -> float:
    """Seconds that the rounds of FedAvg take."""
    fed = built({**KEYS, "seed": seed}).federation
    return [fed.step().now for _ in range(ROUNDS)][-1]


def curve(schedule: str, seed: int, seconds: float) -> list[float]:
    """Test accuracy of the server's model at `POINTS` equal steps of virtual time."""
    run = built({**KEYS, "schedule": schedule, "seed": seed})
    fed, task, seen = run.federation, run.task, []
    times = np.linspace(0, seconds, POINTS + 1)[1:]
    while len(seen) < POINTS:
        tensors = model_of(fed, {})
        fed.step()
        over = int((times < fed.now).sum()) - len(seen)
        if over:
            sums = evaluate(task, fed.method, fed.ground.module, tensors, run.splits.test, {})
            seen += [task.metric.finish(sums)["accuracy"]] * over
    return seen


def reached(seen: list[float]) -> float:
    """When `LEVEL` was reached first, in rounds of FedAvg; infinite where it never was."""
    at = next((i for i, accuracy in enumerate(seen) if accuracy >= LEVEL), None)
    return float("inf") if at is None else (at + 1) / POINTS * ROUNDS


def late(seen: list[float]) -> float:
    """Mean accuracy over the last quarter of the time."""
    return mean(seen[-(POINTS // 4) :])


def each(values: list[float], digits: int) -> str:
    return "/".join(f"{value:.{digits}f}" for value in values)


def claim(progress: Progress) -> list[Check]:
    """The mixes by hand, then four ways to mix on the same clients, speeds and seconds."""
    progress("three clients of 1, 2 and 4 seconds a step")
    mixes, last = trace()
    exact = all(
        abs(time - when) < 1e-6 * when and who == there
        for (time, who), (when, there) in zip(mixes, BY_HAND, strict=True)
    )
    seen: dict[str, list[list[float]]] = {name: [] for name in SCHEDULES}
    for seed in range(SEEDS):
        seconds = span(seed)
        for name, schedule in SCHEDULES.items():
            progress(f"{name}, seed {seed}")
            seen[name].append(curve(schedule, seed, seconds))
    times = {name: [reached(one) for one in runs] for name, runs in seen.items()}
    ends = {name: [late(one) for one in runs] for name, runs in seen.items()}
    ratio = mean(times["fedcompass"]) / mean(times["fedavg"])
    above = {name: mean(ends["fedcompass"]) - mean(ends[name]) for name in SCHEDULES}

    def said(name: str) -> str:
        return (
            f"{LEVEL:.0%} after {each(times['fedcompass'], 1)} and {each(times[name], 1)} rounds "
            f"of FedAvg, then {each(ends['fedcompass'], 3)} and {each(ends[name], 3)}"
        )

    return [
        Check(
            "clients of unlike speed come back together",
            "algorithms 1 to 3",
            f"mixes at {', '.join(f'{time:.0f}' for time, _ in mixes)}; at last all three, with "
            f"{last} steps",
            exact and last == [100, 50, 25],
        ),
        Check(
            "sooner than FedAvg",
            "more efficient than synchronous algorithms",
            f"{said('fedavg')}: {ratio:.2f} of the time (0.8 asked)",
            ratio <= 0.8,
        ),
        Check(
            "more accurate than FedAsync",
            "higher accuracy than other asynchronous algorithms",
            f"{said('fedasync')}: {above['fedasync']:+.3f} (0.01 asked)",
            above["fedasync"] >= 0.01,
        ),
        Check(
            "more accurate than FedBuff",
            "higher accuracy than other asynchronous algorithms",
            f"{said('fedbuff')}: {above['fedbuff']:+.3f} (0 asked)",
            above["fedbuff"] >= 0,
        ),
        Check(
            "more accurate than FedBuff that divides by all",
            "higher accuracy than other asynchronous algorithms",
            f"{said(DIVIDED)}: {above[DIVIDED]:+.3f} (0.05 asked)",
            above[DIVIDED] >= 0.05,
        ),
    ]
