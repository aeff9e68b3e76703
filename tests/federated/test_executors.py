"""Vectorised equals sequential, for every method of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.federated import tiny
from torch import nn

from isthmus import catalogue, tree
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.executors.vectorised import Vectorised
from isthmus.federated.round import Federation

METHODS = catalogue.names("method")
RECORDED = (
    "fedavg", "scaffold", "fednova", "pfedme", "apfl", "ifca", "fedala", "fedcp", "fedmomentum",
    "tpsgd",
)  # fmt: skip
"""One of each kind of visit: one phase and several, dual models, a choice among clusters, mixing,
attached modules, factors, no gradients. The others are left to the slow suite."""
PARTIAL: dict[str, Any] = {"cohort": 4, "epochs": 2}


def mixed_ranks(name: str) -> dict[str, Any]:
    """Ranks 1 and 3 in turn where the method can; a method that keeps a rank has one."""
    kind = catalogue.find("method", name)
    if issubclass(kind, LoraMethod) and not kind.one_rank:
        return {"ranks": (1, 3)}
    return {}


def equal(a: Federation, b: Federation, within: float) -> None:
    assert tiny.apart(tiny.state(a), tiny.state(b)) <= within
    assert tiny.apart(tiny.kept(a), tiny.kept(b)) <= 10 * within
    assert list(a.ledger.rows()) == list(b.ledger.rows())
    assert (a.round, a.now, a.versions.tolist()) == (b.round, b.now, b.versions.tolist())


@pytest.mark.parametrize("name", METHODS)
def test_three_rounds_in_float64(name: str) -> None:
    task = tiny.task(dropout=0.3)
    keys = {**PARTIAL, **mixed_ranks(name)}
    reference = tiny.play(name, task, 3, **keys)
    many = tiny.play(name, task, 3, executor="vectorised", **keys)
    equal(reference, many, 1e-9)
    start = tiny.federation(name, task, **keys)
    moved = tiny.state(start) | tiny.kept(start)
    assert tiny.apart(moved, tiny.state(reference) | tiny.kept(reference)) > 1e-3
    assert len(reference.ledger) >= (8 if reference.method.gathers else 12)


@pytest.mark.parametrize(
    "name",
    [name if name in RECORDED else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_two_rounds_in_float32_recorded(name: str) -> None:
    """The second round replays what the first recorded, on other items and other states."""
    task = tiny.task((3, 16, 1, 7), dtype=torch.float32, dropout=0.3)
    reference = tiny.play(name, task, 2, batch=16)
    recorded = tiny.play(name, task, 2, batch=16, executor="vectorised", compile="trace")
    equal(reference, recorded, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_compiled_equals_sequential(name: str) -> None:
    task = tiny.task(dropout=0.3)
    keys = {**PARTIAL, **mixed_ranks(name)}
    reference = tiny.play(name, task, 2, **keys)
    compiled = tiny.play(name, task, 2, executor="vectorised", compile="compile", **keys)
    equal(reference, compiled, 1e-9)


@pytest.mark.parametrize("name", ["scaffold", "fedmomentum"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_nothing(name: str, chunk: int) -> None:
    task = tiny.task(dropout=0.3)
    keys = {**mixed_ranks(name), "executor": "vectorised", "epochs": 2}
    whole, parts = (tiny.play(name, task, 3, chunk=c, **keys) for c in (0, chunk))
    equal(whole, parts, 1e-12)


def test_recording_gives_the_bits_of_running() -> None:
    task = tiny.task(dropout=0.3)
    for name, epochs in (("fedprox", 1), ("scaffold", 3)):  # one recording, and one of each step
        keys = {"epochs": epochs, "batch": 20, "executor": "vectorised"}
        a = tiny.play(name, task, 3, **keys)
        b = tiny.play(name, task, 3, compile="trace", **keys)
        assert tree.equal(tiny.state(a), tiny.state(b)) and tree.equal(tiny.kept(a), tiny.kept(b))
        assert isinstance(b.executor, Vectorised) and b.executor.graphs.mode == "trace"


def test_dropout_is_really_on() -> None:
    plain, dropped = (tiny.play("fedavg", tiny.task(dropout=p), 2) for p in (0.0, 0.3))
    assert tiny.apart(tiny.state(plain), tiny.state(dropped)) > 1e-2


@pytest.mark.parametrize("optimiser", ["sgd:momentum=0.9", "adamw", "sgd:clip=0.1"])
@pytest.mark.parametrize("plan", [{"steps": 5}, {"batch": 0, "epochs": 3}])
def test_optimisers_and_plans(optimiser: str, plan: dict[str, Any]) -> None:
    task = tiny.task(dropout=0.3)
    keys = {"optimiser": optimiser, "lr": 0.02, **plan}
    compile = "trace" if optimiser == "adamw" and "batch" in plan else "none"
    a = tiny.play("fedavg", task, 3, **keys)
    b = tiny.play("fedavg", task, 3, executor="vectorised", compile=compile, **keys)
    equal(a, b, 1e-9)


def test_learning_rate_decay_reaches_the_steps() -> None:
    task = tiny.task()
    a, b = (tiny.play("fedavg", task, 2, lr=0.2, lr_decay=d) for d in (1.0, 0.5))
    by_hand = tiny.play("fedavg", task, 1, lr=0.2)
    assert tree.equal(tiny.play("fedavg", task, 1, lr=0.2, lr_decay=0.5).state["shared"],
                      by_hand.state["shared"])  # fmt: skip
    assert tiny.apart(tiny.state(a), tiny.state(b)) > 1e-3
    v = tiny.play("fedavg", task, 2, lr=0.2, lr_decay=0.5, executor="vectorised")
    equal(b, v, 1e-12)


class Normed(nn.Module):
    """A convolution net with batch normalisation, whose tail is short of items."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5)
        self.deep, self.last = nn.Conv2d(5, 3, 2), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.last(self.deep(x))).mean((2, 3)))


def normed_task(sizes: tuple[int, ...]) -> Any:
    g = torch.Generator().manual_seed(8)
    y = torch.randint(0, 4, (sum(sizes),), generator=g)
    x = torch.randn(sum(sizes), 1, 6, 6, generator=g, dtype=torch.float64) + y.view(-1, 1, 1, 1)

    def make() -> nn.Module:
        return Normed().double()

    return tiny.task(sizes, module=make, data=(3.0 * x + 1.0, y))


@pytest.mark.parametrize(("compile", "sizes"), [("none", (3, 9, 1, 9, 14)), ("trace", (5, 1, 5))])
def test_batch_statistics_are_those_of_the_real_items(compile: str, sizes: tuple[int, ...]) -> None:
    task = normed_task(sizes)
    keys = {"batch": 4, "lr": 0.05}
    a = tiny.play("fedavg", task, 2, **keys)
    b = tiny.play("fedavg", task, 2, executor="vectorised", compile=compile, **keys)
    equal(a, b, 1e-9)
    assert set(a.method.names.recalibrate) == {
        f"{layer}.{name}"
        for layer in ("norm", "last")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    before = dict(Normed().named_buffers())
    for name, x in a.ground.module.named_buffers():
        assert torch.equal(x, before[name].to(x.dtype))  # no step has moved a statistic
