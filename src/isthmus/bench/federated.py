"""What a federated round costs beside a bare torch loop over the same clients, in one run.

FedAvg on digits: 100 clients, one local epoch, batches of 10, an MLP 64-128-10. The loop copies
the weights, trains each client with `torch.optim.SGD` and averages; it encodes nothing and
counts nothing. A round here does all of its accounting: encoded, checked and decoded messages,
links, devices, and a ledger on disk. Both run on one thread, taken in turns.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from isthmus.bench.figure import Figure
from isthmus.models.nets import mlp
from isthmus.run.build import build
from isthmus.run.config import Config
from isthmus.tasks.contract import Items, Size, Splits
from isthmus.tasks.digits import Digits
from isthmus.wire.ledger import Ledger

CLIENTS, BATCH, LR = 100, 10, 0.1
BLOCKS, TURNS, ROUNDS = {10: 27, 100: 9}, 5, 8  # more of what is soon over


class WideDigits(Digits):
    """Digits with an MLP 64-128-10."""

    def build(self, size: Size = "small", seed: int = 0) -> nn.Module:
        return mlp([64, 128, 10], seed=seed)


class Crowd(WideDigits):
    """The same pictures over and over, until there are `items` of them to train on."""

    def __init__(self, items: int) -> None:
        self.items = items

    def synthesise(self, seed: int = 0, size: Size = "small") -> Splits:
        splits = super().synthesise(seed, size)
        rows = torch.arange(self.items) % len(splits.train)
        columns = {name: x[rows] for name, x in splits.train.columns.items()}
        return splits._replace(train=Items(columns))


def bare_loop(items: Items, parts: list[np.ndarray]) -> Callable[[int], None]:
    """A round of the first n clients as one would write it without a library."""
    model = mlp([64, 128, 10])
    weights = [p.detach().clone() for p in model.parameters()]
    x, y = items.columns["x"], items.columns["y"]
    data = [(x[part], y[part]) for part in parts]
    draw = torch.Generator().manual_seed(0)

    def round(n: int) -> None:
        total = [torch.zeros_like(p) for p in weights]
        optimiser = torch.optim.SGD(model.parameters(), lr=LR)
        for own_x, own_y in data[:n]:
            with torch.no_grad():
                for p, w in zip(model.parameters(), weights, strict=True):
                    p.copy_(w)
            for index in torch.randperm(len(own_x), generator=draw).split(BATCH):
                optimiser.zero_grad()
                F.cross_entropy(model(own_x[index]), own_y[index]).backward()
                optimiser.step()
            with torch.no_grad():
                for t, p in zip(total, model.parameters(), strict=True):
                    t.add_(p, alpha=1.0 / n)
        for w, t in zip(weights, total, strict=True):
            w.copy_(t)

    return round


def fedavg_on_digits(cohort: int, compile: str, folder: Path, **more: Any) -> Any:
    ledger = Ledger(folder / f"ledger-{cohort}-{compile}.jsonl")
    keys = {
        "method": "fedavg",
        "clients": CLIENTS,
        "cohort": cohort,
        "batch": BATCH,
        "lr": LR,
        "executor": "vectorised",
        "compile": compile,
        "evaluate": 0,
        **more,
    }
    store = folder / f"clients-{cohort}-{compile}.bin"
    return build(Config.make(keys), ledger, store, WideDigits()).federation


def _ratio(
    base: Callable[[], object], works: dict[str, Callable[[], object]], many: int
) -> dict[str, float]:
    """Time of each piece of work over that of `base`: the median of `many` blocks of rounds.

    A block is long, since rows of the ledger are written many rounds at a time, and it is played
    in short turns, so that all meet the machine in the same moods.
    """
    pieces = {"base": base, **works}
    blocks: list[dict[str, float]] = []
    for _ in range(many):
        block = dict.fromkeys(pieces, 0.0)
        for _ in range(TURNS):
            for name, work in pieces.items():
                work()
                start = time.perf_counter()
                for _ in range(ROUNDS):
                    work()
                block[name] += time.perf_counter() - start
        blocks.append(block)
    return {name: float(np.median([b[name] / b["base"] for b in blocks])) for name in works}


GOALS = {("eager", 10): 0.5, ("eager", 100): 0.25, ("compiled", 10): 0.2, ("compiled", 100): 0.15}
MODES = {"eager": "trace", "compiled": "compile"}


def figures(compiled: bool = True) -> list[Figure]:
    """Rounds beside the bare loop, the time to compile, and memory with many clients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(compiled)
    finally:
        torch.set_num_threads(threads)


def _measure(compiled: bool) -> list[Figure]:
    out: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for cohort in (10, 100):
            modes = {k: v for k, v in MODES.items() if compiled or k == "eager"}
            feds = {mode: fedavg_on_digits(cohort, how, folder) for mode, how in modes.items()}
            ground = feds["eager"].ground
            items = Items(dict(ground.columns))
            loop = bare_loop(items, [ground.owned.rows(i) for i in range(CLIENTS)])
            if compiled:
                start = time.perf_counter()
                feds["compiled"].step()
                seconds = time.perf_counter() - start
                out.append(Figure(f"time to compile, {cohort} clients", seconds, "s", None, None))
            ratios = _ratio(
                lambda loop=loop, n=cohort: loop(n),
                {mode: fed.step for mode, fed in feds.items()},
                BLOCKS[cohort],
            )
            for mode, ratio in ratios.items():
                goal = GOALS[mode, cohort]
                title = f"{mode} round, {cohort} of {CLIENTS} clients, over a bare loop"
                out.append(Figure(title, ratio, "x", f"at most {goal} x", ratio <= goal))
        out.append(_memory(folder))
    return out


def _memory(folder: Path) -> Figure:
    """Resident memory with 100,000 registered clients and SCAFFOLD's state on disk."""
    registered, rounds = 100_000, 20
    keys = {"method": "scaffold", "clients": registered, "cohort": 100, "batch": BATCH, "lr": LR}
    config = Config.make({**keys, "evaluate": 0})
    ledger = Ledger(folder / "crowd.jsonl")
    fed = build(config, ledger, folder / "crowd.bin", Crowd(2 * registered)).federation
    for _ in range(rounds):
        fed.step()
    most = peak()
    title = f"peak memory, {registered:,} clients, scaffold, cohort 100, {rounds} rounds"
    return Figure(title, most, "GiB", "at most 3 GB", most * 2**30 <= 3e9)


def peak() -> float:
    """The most memory that this process had, in GiB.

    As the kernel counts it since the program began; `getrusage` also counts who started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) / 2**20
