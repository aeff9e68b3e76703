"""What computing a cohort at once gains over one client after the other, for every method.

A round of 100 of 100 clients: digits, one local epoch, batches of 10, an MLP 64-128-10, one
thread, everything counted. The three ways take turns in one run: `sequential`, `vectorised` with
recorded operations (eager) and `vectorised` through the inductor (compiled); the ratio is that of
the medians. LoRA is on both layers of the MLP. What a recording costs once is not in it.

Then the schedules that start visits one by one, whose pending visits are computed together; a
convolution net, where there is least to gain; the part of a round that is not training; and a
million registered clients.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from isthmus import catalogue
from isthmus.bench.federated import BATCH, CLIENTS, LR, Crowd, WideDigits, peak
from isthmus.bench.figure import Figure, at_least, at_most, ratio, turns_of
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.learn.graph import Graphs
from isthmus.models.nets import cnn
from isthmus.run.build import build, method_of
from isthmus.run.config import Config
from isthmus.tasks.contract import Size, Task
from isthmus.wire.ledger import Ledger

TURNS = 5
WAYS = {
    "sequential": {"executor": "sequential", "compile": "none"},
    "eager": {"executor": "vectorised", "compile": "trace"},
    "compiled": {"executor": "vectorised", "compile": "compile"},
    "auto": {},
}
GOALS = {"eager": 5, "compiled": 8}
TABLE = f"Rounds a second over the sequential executor's, {CLIENTS} clients"
SCHEDULES = ("fedasync", "fedbuff:k=10", "fedcompass")


def figures() -> list[Figure]:
    """All of the tables below, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            *over_sequential(catalogue.names("method")),
            *asynchronous(),
            convolution(),
            *besides_training(),
            *crowds(),
        ]
    finally:
        torch.set_num_threads(threads)


def over_sequential(
    names: list[str], turns: int = TURNS, ways: tuple[str, ...] = ("eager", "compiled")
) -> list[Figure]:
    """Each method's ratios, then their median and the smallest; methods that compute no cohort, or
    not at once, are named with the reason."""
    cells: list[Figure] = []
    out: list[Figure] = []
    for name in names:
        kind = method_of(name)
        if kind.gathers or not kind.vectorise:
            why = "the server trains alone" if kind.gathers else kind.why_sequential
            out.append(Figure(f"{name} is sequential: {why}", 1.0, "x"))
            continue
        feds = [federation(name, way) for way in ("sequential", *ways)]
        base, *times = [median(t) for t in turns_of(turns, [fed.step for fed in feds])]
        cells += [
            Figure(f"{name}, {way}", base / seconds, "x", cell=(TABLE, name, way))
            for way, seconds in zip(ways, times, strict=True)
        ]
    for way in ways:
        found = [figure.value for figure in cells if figure.cell and figure.cell[2] == way]
        what = f"{way} rounds over sequential ones, {len(found)} methods"
        out.append(at_least(f"{what}: median", median(found), GOALS[way], "x"))
        out.append(at_least(f"{what}: the least", min(found), 2, "x"))
    return cells + out


def asynchronous(turns: int = TURNS) -> list[Figure]:
    """As many visits as clients under schedules in which every client has a time of its own; as
    `executor: auto` and `compile: auto` choose, beside the sequential executor."""
    out: list[Figure] = []
    for schedule in SCHEDULES:
        keys: dict[str, Any] = {"schedule": schedule, "speeds": "lognormal:0.5"}
        feds = [federation("fedavg", way, **keys) for way in ("sequential", "auto")]
        times = turns_of(turns, [visits(fed, CLIENTS) for fed in feds])
        title = f"{schedule}, pending visits together over one by one"
        out.append(Figure(title, median(times[0]) / median(times[1]), "x"))
    return out


def visits(fed: Any, number: int) -> Callable[[], None]:
    def play() -> None:
        until = fed.uploads + number
        while fed.uploads < until:
            fed.step()

    return play


class ConvolvedDigits(WideDigits):
    """Digits with the small convolution net."""

    def build(self, size: Size = "small", seed: int = 0) -> nn.Module:
        return cnn([8, 16], 10, seed)


def convolution(turns: int = TURNS) -> Figure:
    """A convolution net with what `executor: auto` and `compile: auto` choose for it."""
    task = ConvolvedDigits()
    feds = [federation("fedavg", way, task, cohort=20) for way in ("sequential", "auto")]
    times = turns_of(turns, [fed.step for fed in feds])
    graphs: Graphs = feds[1].executor.graphs
    title = f"convolution net, 20 clients, as chosen (vectorised, {graphs.mode}) over sequential"
    return at_least(title, median(times[0]) / median(times[1]), 0.9, "x")


def besides_training() -> list[Figure]:
    """The part of a round outside the visits of its clients: messages, links, the ledger, mixing.

    A visit begins with the choice of its batches, as a bare loop's does with `randperm`; the part
    outside the recorded operations alone, without that choice, stands beside it.
    """
    digits = f"not training, digits, {CLIENTS} clients"
    usual = federation("fedavg", "eager")
    longer = federation("fedavg", "eager", epochs=5)
    unrecorded = federation("fedavg", "eager", compile="none")
    keys = {"task": "text", "method": "fedit", "clients": 8, "cohort": 8, "lr": 5e-3, "steps": 5}
    config = Config.make({**keys, "evaluate": 0, "executor": "vectorised"})
    text = build(config, Ledger()).federation
    part = "of 1"
    return [
        at_most(digits, outside(usual, 40), 0.25, part),
        Figure(f"{digits}, outside recorded operations", outside(usual, 40, True), part),
        Figure(f"{digits}, 5 local epochs", outside(longer, 40), part),
        Figure(f"{digits}, unrecorded", outside(unrecorded, 40), part),
        at_most("not training, embedded language model with LoRA", outside(text, 2), 0.03, part),
    ]


def outside(fed: Any, rounds: int, recorded: bool = False) -> float:
    """Share of the time of some rounds that is spent outside their visits, or outside what of
    them is `recorded`."""
    fed.step()
    with timed(fed.executor.graphs, "call") if recorded else timed(fed.executor, "run") as inside:
        start = time.perf_counter()
        for _ in range(rounds):
            fed.step()
        whole = time.perf_counter() - start
    return 1.0 - sum(inside) / whole


@contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """The seconds of every outermost call of a method of `owner` while it is open."""
    spent: list[float] = []
    call, deep = getattr(owner, name), False

    def measured(*given: Any) -> Any:
        nonlocal deep
        if deep:
            return call(*given)
        deep, start = True, time.perf_counter()
        try:
            return call(*given)
        finally:
            deep = False
            spent.append(time.perf_counter() - start)

    setattr(owner, name, measured)
    try:
        yield spent
    finally:
        delattr(owner, name)


REGISTERED = (10_000, 1_000_000)
COHORT, BLOCKS, ROUNDS = 1_000, 8, 5


def crowds() -> list[Figure]:
    """A million registered clients beside ten thousand, each in a process of its own, in turns:
    SCAFFOLD, whose clients keep 38 kB each on disk, cohorts of a thousand."""
    commands = [f"from {__name__} import crowd; crowd({registered})" for registered in REGISTERED]
    with ExitStack() as stack:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        players = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", command], **pipes))
            for command in commands
        ]
        blocks = [[_block(player) for player in players] for _ in range(BLOCKS)]
    few, many = ([block[i][0] for block in blocks[1:]] for i in (0, 1))  # the first one records
    low, high = ([block[i][1] for block in blocks] for i in (0, 1))
    cohort = f"cohort {COHORT:,}"
    return [
        Figure(f"round, {REGISTERED[1]:,} registered, {cohort}", median(many), "s"),
        at_most(
            f"the same over that with {REGISTERED[0]:,} registered", ratio(many, few), 1.25, "x"
        ),
        Figure(f"peak memory, {REGISTERED[1]:,} registered, {cohort}", high[-1], "GiB"),
        Figure(f"the same with {REGISTERED[0]:,} registered", low[-1], "GiB"),
        at_most("memory gained between round 10 and round 40", high[-1] - high[1], 0.05, "GiB"),
    ]


def _block(player: subprocess.Popen[str]) -> tuple[float, float]:
    """Have a `crowd` play its rounds: seconds of a round, and its peak memory so far in GiB."""
    assert player.stdin is not None and player.stdout is not None
    print("go", file=player.stdin, flush=True)
    seconds, most = map(float, player.stdout.readline().split())
    return seconds, most


def crowd(registered: int) -> None:
    """Play some rounds for every line of the standard input, and print what `_block` reads."""
    torch.set_num_threads(1)
    keys = {"method": "scaffold", "clients": registered, "cohort": COHORT, "batch": BATCH}
    config = Config.make({**keys, "lr": LR, "evaluate": 0, "executor": "vectorised"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = Ledger(folder / "ledger.jsonl")
        fed = build(config, ledger, folder / "clients.bin", Crowd(registered)).federation
        for _ in sys.stdin:
            start = time.perf_counter()
            for _ in range(ROUNDS):
                fed.step()
            print((time.perf_counter() - start) / ROUNDS, peak(), flush=True)


def federation(name: str, way: str, task: Task | None = None, **more: Any) -> Any:
    keys: dict[str, Any] = {"method": name, "clients": CLIENTS, "cohort": CLIENTS, "batch": BATCH}
    keys |= {"lr": LR, "epochs": 1, "evaluate": 0, **WAYS[way], **more}
    if issubclass(method_of(name), LoraMethod):
        keys["settings"] = {"targets": ("features.0", "head")}
    return build(Config.make(keys), Ledger(), task=task or WideDigits()).federation
