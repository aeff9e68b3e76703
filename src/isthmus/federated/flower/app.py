"""A Flower app from its folder, as it is, run on the in-process `Grid`."""

from __future__ import annotations

import gc
import importlib
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.federated.flower import internals, ready
from isthmus.federated.flower.grid import Grid, nodes
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

NODES = 10
"""Nodes where neither the caller nor the app says how many."""


class App(NamedTuple):
    """An app: its two halves, its configuration, and how many nodes it wants (0: no word)."""

    name: str
    server: Any
    client: Any
    config: dict[str, Any]
    nodes: int


class Ran(NamedTuple):
    """What a run came to. `failed` counts the clients' answers that were errors."""

    name: str
    nodes: int
    messages: int
    failed: int
    bytes_down: int
    bytes_up: int
    seconds: float


@contextmanager
def opened(folder: Path | str, run_config: str = "") -> Iterator[App]:
    """The app in a folder; what it imports from there is forgotten afterwards.

    `run_config` is `key=value ...` over the app's own configuration, as with `flwr run -c`.
    Raises `InputError` for a folder without an app, halves that do not exist, unknown keys, and
    `MissingExtra` without the extra `flower`.
    """
    ready()
    folder = Path(folder).resolve()
    try:
        about = internals.project(folder)
    except (FileNotFoundError, ValueError) as error:
        allowed = "a folder whose pyproject.toml has [tool.flwr.app]"
        raise InputError("app", f"{folder.name}: {' '.join(str(error).split())}", allowed) from None
    flwr = about["tool"]["flwr"]
    try:
        config = internals.fused(flwr["app"].get("config", {}), run_config)
    except ValueError as error:
        keys = ", ".join(flwr["app"].get("config", {})) or "nothing"
        raise InputError("run-config", f"{run_config} ({error})", f"key=value of {keys}") from None
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        from flwr.clientapp import ClientApp
        from flwr.serverapp import ServerApp

        parts = flwr["app"]["components"]
        server = _load(parts, "serverapp", ServerApp)
        client = _load(parts, "clientapp", ClientApp)
        yield App(about["project"]["name"], server, client, config, _wanted(flwr))
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).is_relative_to(folder):
                del sys.modules[name]


def _load(parts: Mapping[str, str], half: str, kind: type) -> Any:
    """The object that `module:name` stands for."""
    where = str(parts.get(half, ""))
    module, _, path = where.partition(":")
    if not module or not path:
        raise InputError(half, where or "nothing", "module:object")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module and not module.startswith(f"{error.name}."):
            raise  # a package that the app needs
        raise InputError(half, where, "a module in the app's folder") from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise InputError(half, where, f"a name that {module} defines")
        found = getattr(found, name)
    if not isinstance(found, kind):
        raise InputError(half, f"{where}, a {type(found).__name__}", f"a {kind.__name__}")
    return found


def _wanted(flwr: Mapping[str, Any]) -> int:
    """`num-supernodes` of the app's default federation."""
    known = flwr.get("federations", {})
    chosen = known.get(known.get("default"), {})
    return int(chosen.get("options", {}).get("num-supernodes", 0))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators, on which apps and Flower's sampling draw, set and then restored."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@contextmanager
def imports_out_of_sight() -> Iterator[None]:
    """Messages make garbage; collecting it need not look at all imports each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run(
    folder: Path | str,
    run_config: str = "",
    *,
    count: int | None = None,
    link: Link | None = None,
    ledger: Ledger | None = None,
    seed: int = 0,
) -> Ran:
    """Run an app to its end with `count` nodes; every message is entered in `ledger`.

    Without a `count` there are as many nodes as the app's default federation says, or ten.
    Raises what `opened` raises, and whatever the app's server half does.
    """
    if count is not None and count < 1:
        raise InputError("num-supernodes", count, "1 or more")
    ledger = ledger if ledger is not None else Ledger()
    with opened(folder, run_config) as app:
        grid = play(
            app.server, app.client, app.config,
            count or app.nodes or NODES, link or Link(), ledger, seed,
        )  # fmt: skip
    return Ran(
        app.name,
        len(grid.contexts),
        grid.messages,
        grid.failed,
        int(ledger.total("bytes", direction="down")),
        int(ledger.total("bytes", direction="up")),
        grid.now,
    )


def play(
    server: Any,
    client: Any,
    config: Mapping[str, Any],
    count: int,
    link: Link,
    ledger: Ledger,
    seed: int = 0,
) -> Grid:
    """A server's half over `count` nodes that run the client's half; the grid as it is left."""
    from flwr.app import Context, RecordDict

    run_id = int(seeds.key(seed, "run")) & (2**63 - 1)
    grid = Grid(client, nodes(count, run_id, config, seed), ledger, link, seed)
    context = Context(run_id, internals.SERVER_NODE, {}, RecordDict(), dict(config))
    with internals.identity(run_id), seeded(seed), imports_out_of_sight():
        server(grid=grid, context=context)
    return grid
