"""A compiled round beside the same round of pfl-research, FedJAX and Flower's Ray simulation.

FedAvg on digits: 10 of 100 clients, one local epoch, batches of 10, an MLP 64-128-10, one thread.
All begin with the same weights and the same clients' items and draw cohorts and orders of their
own; none evaluates. Each rival is a process of its own that plays blocks of rounds on demand, taken
in turns with ours. A round here does all of its accounting (see `isthmus.bench.federated`).

A rival lives in an environment of its own, whose Python is named by a variable: `ISTHMUS_PFL`
(`pip install 'pfl[pytorch]'`) and `ISTHMUS_FEDJAX` (`pip install fedjax 'jax==0.4.23'
'jaxlib==0.4.23' 'numpy<2' 'scipy<1.13' 'dm-haiku==0.0.12' 'optax==0.1.9'`; with later releases of
JAX its last release does not run). Flower's is this one, with the extras `flower` and `ray`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from isthmus.bench import elsewhere
from isthmus.bench.federated import BATCH, CLIENTS, LR, WideDigits, fedavg_on_digits
from isthmus.bench.figure import Figure, at_least, ratio

COHORT = 10
BLOCKS, ROUNDS, WARM = 7, 40, 60
"""Blocks that are timed, rounds in each, and rounds before the first."""

NEAR = 0.05
"""How far below ours a rival's accuracy may end, for it to have done the same work."""


LAYERS = {
    "w1": "features.linear0.weight",
    "b1": "features.linear0.bias",
    "w2": "head.weight",
    "b2": "head.bias",
}
"""The weights as the rivals know them, and as we do."""


class Rival(NamedTuple):
    """A library: its program, the variable that names its Python (empty: this one), the goal."""

    name: str
    program: str
    variable: str
    goal: float


RIVALS = (
    Rival("pfl-research", "with_pfl", "ISTHMUS_PFL", 5.0),
    Rival("FedJAX", "with_fedjax", "ISTHMUS_FEDJAX", 2.0),
    Rival("Flower's Ray simulation", "with_flower", "", 50.0),
)


class Absent(Exception):
    """Why a rival is not measured."""


class Played(NamedTuple):
    """Seconds of some rounds, accuracy after them, how far the weights are from the first ones."""

    seconds: float
    accuracy: float
    moved: float


class Other:
    """A rival's process; raises `Absent` with its last words where it ends before it answers."""

    def __init__(self, command: Sequence[str], words: Path) -> None:
        self.words = words
        one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        alone = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": one, "JAX_PLATFORMS": "cpu"}
        with words.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **alone},
            )

    def play(self, rounds: int) -> Played:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(rounds, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            said = self.words.read_text(errors="replace").split("\n")
            errors = [x.strip() for x in said if "Error" in x or "error" in x] or said
            raise Absent((errors[-1] or f"it ended with {self.process.returncode}")[:200])
        return Played(**json.loads(answer))

    def close(self) -> None:
        """Let it end by itself: no more rounds are asked for."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def command_of(rival: Rival, work: Path) -> list[str]:
    """What starts a rival; raises `Absent` with the reason where it is not here."""
    if not rival.variable:
        for module, extra in (("flwr", "flower"), ("ray", "ray")):
            if importlib.util.find_spec(module) is None:
                raise Absent(f"{module} is not installed (extra {extra})")
        # Imported, not run: Ray's processes have to find the client's half by its name.
        start = f"from {elsewhere.__name__}.{rival.program} import main; main({str(work)!r})"
        return [sys.executable, "-c", start]
    python = os.environ.get(rival.variable, "")
    if not python:
        raise Absent(f"{rival.variable} does not name the Python of its environment")
    if not Path(python).is_file():
        raise Absent(f"{rival.variable} names {python}, which does not exist")
    program = Path(next(iter(elsewhere.__path__))) / f"{rival.program}.py"
    return [python, "-P", str(program), str(work)]


def write(path: Path, federation: Any, cohort: int = COHORT, batch: int = BATCH) -> None:
    """The work as every rival reads it: items by client, first weights, settings, test items."""
    ground, shared = federation.ground, federation.state["shared"]
    order = torch.from_numpy(ground.owned.order)
    test = WideDigits().synthesise(0).test
    np.savez(
        path,
        x=ground.columns["x"][order].flatten(1).numpy(),
        y=ground.columns["y"][order].numpy(),
        starts=ground.owned.starts,
        test_x=test.columns["x"].flatten(1).numpy(),
        test_y=test.columns["y"].numpy(),
        lr=np.float32(LR),
        batch=batch,
        cohort=cohort,
        **{name: shared[full].numpy() for name, full in LAYERS.items()},
    )


def ours(federation: Any, work: Path) -> Callable[[int], Played]:
    """Blocks of our rounds, judged as the others are."""
    held = np.load(work)

    def play(rounds: int) -> Played:
        start = time.perf_counter()
        for _ in range(rounds):
            federation.step()
        seconds = time.perf_counter() - start
        w = {name: federation.state["shared"][full].numpy() for name, full in LAYERS.items()}
        hidden = np.maximum(held["test_x"] @ w["w1"].T + w["b1"], 0.0)
        right = (hidden @ w["w2"].T + w["b2"]).argmax(1) == held["test_y"]
        moved = sum(float(np.square(x - held[name]).sum()) for name, x in w.items()) ** 0.5
        return Played(seconds, float(right.mean()), moved)

    return play


def figures(compile: str = "compile") -> list[Figure]:
    """Milliseconds of a round of each, and how many times faster ours is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            return _measure(Path(name), compile, stack)
    finally:
        torch.set_num_threads(threads)


def _measure(folder: Path, compile: str, stack: ExitStack) -> list[Figure]:
    federation, work = fedavg_on_digits(COHORT, compile, folder), folder / "work.npz"
    stack.callback(federation.ledger.close)
    write(work, federation)
    own = ours(federation, work)
    skipped: dict[str, str] = {}
    players: dict[str, Callable[[int], Played]] = {"isthmus": own}
    for rival in RIVALS:
        try:
            other = Other(command_of(rival, work), folder / f"{rival.program}.log")
            stack.callback(other.close)
            other.play(WARM)
            players[rival.name] = other.play
        except Absent as reason:
            skipped[rival.name] = str(reason)
    own(WARM)
    blocks: dict[str, list[Played]] = {name: [] for name in players}
    for _ in range(BLOCKS):
        for name, play in players.items():
            blocks[name].append(play(ROUNDS))
    return _told(blocks, skipped)


def _told(blocks: dict[str, list[Played]], skipped: dict[str, str]) -> list[Figure]:
    title = f"a round of {COHORT} of {CLIENTS} clients"
    out: list[Figure] = []
    ends = {name: played[-1].accuracy for name, played in blocks.items()}
    for name, played in blocks.items():
        middle = float(np.median([p.seconds for p in played])) / ROUNDS * 1e3
        note = f"accuracy {ends[name]:.3f} after {WARM + BLOCKS * ROUNDS} rounds"
        out.append(Figure(f"{title}, {name} ({note})", middle, "ms", note=note))
    mine = [p.seconds for p in blocks["isthmus"]]
    for rival in RIVALS:
        text = f"{title}, times faster than {rival.name}"
        if rival.name in skipped:
            note = f"not measured: {skipped[rival.name]}"
            out.append(Figure(f"{text}: {note}", float("nan"), "", None, None, note))
            continue
        figure = at_least(
            text, ratio([p.seconds for p in blocks[rival.name]], mine), rival.goal, "x"
        )
        if ends[rival.name] < ends["isthmus"] - NEAR:
            note = f"not comparable: it learned less ({ends[rival.name]:.3f})"
            figure = figure._replace(name=f"{text}: {note}", holds=False, note=note)
        out.append(figure)
    return out
