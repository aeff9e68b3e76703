"""The promises of a federated method, played on a few digits."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from isthmus import tree
from isthmus.contracts import Updates
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.cohort import Cohort, Done, Executor, Ground
from isthmus.federated.method import Method
from isthmus.federated.round import Federation
from isthmus.federated.score import models_of
from isthmus.models.bind import bind, tensors_of
from isthmus.run.build import Built, build, method_of
from isthmus.run.checkpoint import flat
from isthmus.run.config import Config
from isthmus.run.conformance.promise import Broken, Line, demand, said
from isthmus.tree import Tree
from isthmus.wire.ledger import Ledger

HOOKS = (
    *("send", "start", "phases", "plan", "loss", "step", "finish", "weigh", "server", "predict"),
    *("attach", "roles", "init", "keep", "served", "reduce"),
)
TOLERANCE = 1e-5
"""Between executors in float32 after two rounds, relative to the norm of a tensor."""

CLIENTS, ROUNDS = 4, 2


class Watched:
    """An executor that remembers the uploads and what the hooks changed of what they were given."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.uploads: list[Updates] = []
        self.changed: set[str] = set()

    def params(self, method: Method, ground: Ground, cohort: Cohort) -> Tree:
        return self.inner.params(method, ground, cohort)

    def run(self, method: Method, ground: Ground, cohort: Cohort) -> Done:
        given: dict[str, Tree] = {
            "the download": {
                f"{i}/{name}": x for i, down in enumerate(cohort.downs) for name, x in down.items()
            },
            "what a client keeps": cohort.kept,
            "the frozen tensors": ground.base,
            "the data": ground.columns,
        }
        before = {what: tree.clone(tensors) for what, tensors in given.items()}
        done = self.inner.run(method, ground, cohort)
        self.uploads.append(done.updates)
        self.changed |= {w for w, tensors in given.items() if not _same(before[w], tensors)}
        return done


class Played(NamedTuple):
    """A federation after its rounds: outputs `[clients, ...]` before and after, and what moved."""

    fed: Federation
    watched: Watched
    start: Tensor
    end: Tensor
    moved: list[str]


Play = Callable[..., Played]


def method(reference: str) -> list[Line]:
    """Play two rounds of four unlike clients on 600 digits, in several ways, and look.

    `reference` is a method's name, several joined by `+`, or `path.py:name`.
    """

    @cache
    def play(executor: str, seed: int = 0, again: bool = False) -> Played:
        return played(reference, executor, seed)

    kind = method_of(reference)
    return [
        said("hooks take what they are called with", hooks, kind),
        said("every tensor has one role", names, play),
        said("only shared tensors go up", uploads, play),
        said("training moves the model", moves, play),
        said("nothing given is changed", untouched, play),
        said("the seed decides every bit", deterministic, play),
        said("vectorised equals sequential", executors, play, kind),
    ]


def played(reference: str, executor: str, seed: int) -> Played:
    """Two rounds of the method."""
    lora = {"rank": 2, "alpha": 4.0, "targets": "all-linear"}
    config = Config.make(
        {
            "task": "digits",
            "model": "tiny",
            "method": reference,
            "settings": lora if issubclass(method_of(reference), LoraMethod) else {},
            "clients": CLIENTS,
            "partition": "dirichlet:0.5,minimum=20",
            "steps": 3,
            "batch": 8,
            "optimiser": "sgd",
            "executor": executor,
            "compile": "none",
            "seed": seed,
        }
    )
    built = build(config, Ledger())
    fed = built.federation
    fed.executor = watched = Watched(fed.executor)
    start = _outputs(built)
    settings, before = dict(vars(fed.method)), _generators()
    for _ in range(ROUNDS):
        state, copied = fed.state, tree.clone(flat(fed.state))
        fed.step()
        if not _same(copied, flat(state)):
            watched.changed.add("the server's state")
    watched.changed |= {f"self.{name}" for name in _replaced(settings, vars(fed.method))}
    after = _generators()
    moved = [name for name in before if before[name] != after[name]]
    return Played(fed, watched, start, _outputs(built), moved)


def hooks(kind: type[Method]) -> str:
    """Every hook can be called as the engine calls it."""
    for name in HOOKS:
        hook = getattr(kind, name)
        demand(callable(hook), f"{name} is no function")
        given = list(inspect.signature(getattr(Method, name)).parameters)
        try:
            inspect.signature(hook).bind(*given)
        except TypeError as error:
            raise Broken(f"{name}({', '.join(given)}): {error}") from None
    static = inspect.getattr_static
    theirs = [name for name in HOOKS if static(kind, name) is not static(Method, name)]
    return f"overrides {', '.join(theirs)}" if theirs else "overrides none"


def names(play: Play) -> str:
    """The roles divide the tensors of the model among them."""
    fed = play("sequential").fed
    named = fed.method.names
    roles = ("shared", "local", "frozen", "recalibrate", "follow")
    by: dict[str, tuple[str, ...]] = {role: getattr(named, role) for role in roles}
    listed = [name for held in by.values() for name in held]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    demand(not twice, f"{', '.join(twice)}: two roles")
    missing = sorted(tensors_of(fed.ground.module).keys() - set(listed))
    demand(not missing, f"{', '.join(missing)}: no role")
    stray = sorted(set(named.trainable) - {*named.shared, *named.local})
    demand(not stray, f"{', '.join(stray)}: trained, but neither shared nor local")
    return ", ".join(f"{len(held)} {role}" for role, held in by.items() if held)


def uploads(play: Play) -> str:
    """No tensor that is a client's own or frozen is in an upload, under any prefix."""
    fed, watched, *_ = play("sequential")
    named = fed.method.names
    private = {*named.local, *named.frozen, *named.recalibrate}
    went: set[str] = set()
    for sent in watched.uploads:
        went |= {*sent.delta, *sent.values, *sent.buffers}
    crossed = int(fed.ledger.total("bytes", direction="up"))
    if not fed.method.communicates:
        demand(crossed == 0, f"{crossed} bytes went up, and the method says that nothing does")
        return "nothing crosses"
    if fed.method.gathers:
        other = fed.ledger.sums("bytes", by="kind", what="crossing").keys() - {"data"}
        demand(crossed > 0 and not other, f"not only the data cross: {', '.join(sorted(other))}")
        return f"{crossed:,} bytes of data, once"
    leaked = sorted(name for name in went if name.rpartition("/")[2] in private)
    demand(not leaked, f"{', '.join(leaked)}: went up and is not shared")
    demand(went, "nothing went up")
    return f"{len(went)} tensors, {crossed // (ROUNDS * CLIENTS):,} bytes a client and round"


def moves(play: Play) -> str:
    """After two rounds the outputs are finite and not those of the start."""
    _, _, start, end, _ = play("sequential")
    demand(torch.isfinite(end).all(), "NaN or infinity among the outputs")
    change = float((end - start).norm() / start.norm())
    demand(change > 0, "the outputs are those of the start")
    return f"outputs moved by {change:.2g} of their norm"


def untouched(play: Play) -> str:
    """Hooks change neither tensors that they are given, nor themselves, nor a global generator."""
    _, watched, _, _, moved = play("sequential")
    changed = sorted(watched.changed)
    demand(not changed, f"changed in place: {', '.join(changed)}")
    demand(not moved, f"drew from the global generator of {', '.join(moved)}")
    return "downloads, kept tensors, data, server state, settings, global generators"


def deterministic(play: Play) -> str:
    """A second run gives the same bits, another seed gives others."""
    first, again, other = play("sequential"), play("sequential", again=True), play("sequential", 1)
    for a, b in zip(everything(first), everything(again), strict=True):
        demand(_same(a, b), f"two runs differ in {', '.join(_unlike(a, b))}")
    demand(not torch.equal(first.end, other.end), "another seed gives the same outputs")
    return "two runs agree in every bit, another seed differs"


def executors(play: Play, kind: type[Method]) -> str:
    """One client after the other and all at once: the same within rounding."""
    if not kind.vectorise:
        demand(kind.why_sequential, "vectorise is False, and why_sequential does not say why")
        return f"sequential only: {kind.why_sequential}"
    one, many = play("sequential"), play("vectorised")
    worst = 0.0
    for a, b in zip(everything(one), everything(many), strict=True):
        demand(a.keys() == b.keys(), f"only one of them has {', '.join(a.keys() ^ b.keys())}")
        for name, x in a.items():
            if x.is_floating_point():
                scale = max(float(x.norm()), 1e-3)
                off = float((x - b[name]).norm()) / scale
                demand(off <= TOLERANCE, f"{name} differs by {off:.1e} of its norm")
                worst = max(worst, off)
    return f"within {worst:.0e} of every norm after {ROUNDS} rounds"


def everything(run: Played) -> tuple[Tree, Tree, Tree]:
    """The server's state, what the clients keep, and the outputs."""
    kept = run.fed.store.get(np.arange(CLIENTS))
    return flat(run.fed.state), kept, {"outputs": run.end}


def _outputs(built: Built) -> Tensor:
    """What each client's model says to the test items `[clients, items, ...]`."""
    fed = built.federation
    inputs = built.task.inputs(built.splits.test.columns)
    everyone = np.arange(CLIENTS)
    kept = fed.store.get(everyone)
    said = []
    for client, tensors in enumerate(models_of(fed, everyone, kept)):
        mine, bound = tree.row(kept, client), bind(fed.ground.module, tensors)
        with torch.no_grad():
            said.append(fed.method.predict(built.task, bound, inputs, None, mine))
    return torch.stack(said)


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and not _unlike(a, b)


def _unlike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors differ in any bit, NaN being like itself."""
    return [
        name
        for name, x in a.items()
        if name not in b or not torch.equal(x.nan_to_num(), b[name].nan_to_num())
    ]


def _replaced(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    return {n for n in before.keys() | after.keys() if before.get(n) is not after.get(n)}


def _generators() -> dict[str, Any]:
    return {
        "torch": torch.random.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state(legacy=False)),
        "random": random.getstate(),
    }
