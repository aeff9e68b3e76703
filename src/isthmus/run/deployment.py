"""A run as a Flower deployment: the server's and a client's half of one configuration.

Both halves build the same run from the same keys. The server's then asks the nodes who they are
and how many examples they have, holds no training data, and plays the rounds; a client's cuts the
data to its own rows and runs one visit a message. What a client keeps stays in its node.

An upload goes its path in both places: clip, local noise, codec and error memory on the client,
the rest on the server. Noise is drawn from the operating system unless the app's configuration
says `noise-source = "seed"`: who knows the seed can take seeded noise away again, which is right
for repeating a run and for nothing else. What cannot be done on real nodes is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from isthmus.contracts import Updates
from isthmus.errors import InputError, unknown
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.cohort import Ground, Owned
from isthmus.federated.executors.flower import Deployed, Failed, roll
from isthmus.federated.flower import ready
from isthmus.federated.flower.visit import Half, OnNode, client_app
from isthmus.federated.method import Method
from isthmus.federated.path import PARTS
from isthmus.federated.path import Path as Route
from isthmus.federated.score import personal, score
from isthmus.federated.store import ClientStore
from isthmus.models.bind import tensors_of
from isthmus.run import api, saved
from isthmus.run.build import Built, build, environment, first_upload
from isthmus.run.config import Config, assign
from isthmus.run.folder import Folder
from isthmus.tree import Tree
from isthmus.wire.ledger import Ledger

if TYPE_CHECKING:
    from flwr.app import Context

PATIENCE = 300
"""Seconds in which the nodes have to be there."""

OUT, SOURCE = "out", "noise-source"
"""The keys of an app's configuration that are not keys of a run: the new folder it writes, and
where privacy noise comes from."""

SOURCES = ("system", "seed")


def server_app() -> Any:
    """The server's half, a Flower `ServerApp`."""
    ready()
    from flwr.serverapp import ServerApp

    app = ServerApp()

    def main(grid: Any, context: Context) -> None:
        keys, source = _parted(context.run_config)
        out = str(context.run_config.get(OUT, ""))
        serve(grid, config_of(keys), Path(out) if out else None, source)

    app.main()(main)
    return app


def node_app() -> Any:
    """A client's half, a Flower `ClientApp`. Its node says `partition-id` and, if its data are
    real, `data-dir`."""
    ready()

    def site(context: Context) -> OnNode:
        (keys, source), node = _parted(context.run_config), context.node_config
        config = config_of(keys)
        if "data-dir" in node:
            config = config.model_copy(update={"data_dir": Path(str(node["data-dir"]))})
        part = _part(config.model_dump_json(), int(node["partition-id"]))
        ground = replace(part.ground, base=dict(part.ground.base))  # a run changes its own
        noised = part.half.path.local is not None
        half = part.half._replace(path=_sourced(part.half.path, source))
        once = noised and source == "system"
        return OnNode(part.method, ground, part.initial, context.state, half, once)

    return client_app(site)


def _parted(given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The keys of a run, and where noise comes from."""
    source = str(given.get(SOURCE, "")) or SOURCES[0]
    if source not in SOURCES:
        raise unknown(SOURCE, source, SOURCES)
    return {key: value for key, value in given.items() if key not in (OUT, SOURCE)}, source


def _sourced(path: Route, source: str) -> Route:
    """The path with mechanisms that draw from the operating system, unless from the seed."""
    if source == "seed":
        return path
    made = {
        place: None if mechanism is None else replace(cast(Any, mechanism), real=True)
        for place, mechanism in (("local", path.local), ("central", path.central))
    }
    return replace(path, **cast(Any, made))


def config_of(keys: Mapping[str, Any]) -> Config:
    """A configuration from the flat keys of an app; words are read as YAML, empty ones left out.

    >>> config_of({"method": "fedprox", "settings.mu": 0.1, "devices": "[phone, laptop]"}).devices
    ('phone', 'laptop')
    """
    texts = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in keys.items()
        if value != ""
    ]
    return Config.make(assign({}, texts))


class _Part(NamedTuple):
    """A client's part of a run: `initial` is what a new client keeps."""

    method: Method
    ground: Ground
    initial: Tree
    half: Half


@lru_cache(maxsize=8)
def _part(text: str, client: int) -> _Part:
    """The method, the ground cut to the client's own rows, and its half of the path."""
    config = Config.model_validate_json(text)
    if not 0 <= client < config.clients:
        raise InputError("partition-id", client, f"0 to {config.clients - 1} (the clients)")
    fed = build(config, Ledger()).federation
    rows = torch.from_numpy(fed.ground.owned.rows(client))
    sizes = np.zeros(config.clients, np.int64)
    sizes[client] = len(rows)
    columns = {name: x[rows] for name, x in fed.ground.columns.items()}
    owned = Owned(np.arange(len(rows)), np.concatenate([[0], np.cumsum(sizes)]))
    ground = replace(fed.ground, columns=columns, owned=owned)
    silent = config.privacy == "local" and "scalars" not in config.public
    half = Half(fed.path, fed.state["shared"], fed.schedule.needs_loss, silent)
    return _Part(fed.method, ground, fed.store.initial, half)


def serve(grid: Any, config: Config, out: Path | None = None, source: str = SOURCES[0]) -> Built:
    """Play a run over the nodes of `grid`; `out` is a new folder for all that it writes, and
    `source` where noise comes from.

    Raises `InputError` for what a deployment cannot do, `Failed` for nodes that fail.
    """
    config = config.model_copy(update={"executor": "flower"})
    folder = Folder.new(out) if out is not None else None
    ledger = folder.ledger() if folder is not None else Ledger()
    try:
        built = build(config, ledger)
        _refuse(built)
        built.federation.path = _sourced(built.federation.path, source)
        noise = {"noise": source} if config.privacy != "none" else {}
        if folder is not None:
            folder.begin(built.config, {**environment(), **noise})
        _deploy(built, grid)
        _play(built, folder)
        return built
    finally:
        ledger.close()
        if folder is not None:
            folder.close()


def _refuse(built: Built) -> None:
    """Raise `InputError` for what would not be true, or cannot be done, on real nodes."""
    config, fed = built.config, built.federation
    for field, value, allowed in (
        ("attack", config.attack, None),
        ("mask", config.mask, None),
        ("download", config.download, "dense"),
    ):
        if value != allowed:
            raise InputError(field, value, f"{allowed} in a deployment (train simulates it)")
    if fed.schedule.kind != "sync":
        raise InputError("schedule", config.schedule, "a synchronous one in a deployment")
    from_state = type(fed.method).origin is LoraMethod.origin
    sliced = from_state and fed.method.slices_download and len(set(fed.ranks.tolist())) > 1
    if sliced and config.clip is not None:
        # The norm is that of the change at the largest rank, of which a client holds its slice.
        raise InputError("clip", config.clip, "none with unequal ranks in a deployment")
    if fed.method.names.recalibrate:
        raise InputError("model", "one with batch statistics", "one without them in a deployment")


def _forms(built: Built) -> dict[str, Updates]:
    """The shape of an upload of each kind of visit: zeros, in one row."""
    fed, tensors = built.federation, tensors_of(built.module)
    made: dict[str, Updates] = {}
    for purpose in ("train", "warm-up"):
        if not fed.method.phases(purpose):
            continue
        update = first_upload(fed.method, tensors, fed.store.initial, purpose)
        parts = {part: getattr(update, part) for part in PARTS}
        rows = {
            part: {name: torch.zeros_like(x).unsqueeze(0) for name, x in held.items()}
            for part, held in parts.items()
        }
        made[purpose] = Updates(**cast(Any, rows))
    return made


class _Counted(ClientStore):
    """The server's side of what clients keep: nothing but the round that last counted for each."""

    def __init__(self) -> None:
        super().__init__({})
        self.rounds: dict[int, int] = {}

    def put(self, clients: np.ndarray, round: int, kept: Mapping[str, Any]) -> None:
        self.rounds.update(dict.fromkeys(clients.tolist(), round))

    def of(self, client: int) -> int:
        return self.rounds.get(client, 0)


def _deploy(built: Built, grid: Any) -> None:
    """Put the nodes in the place of the data, the store and the executor."""
    until = time.monotonic() + PATIENCE

    def wait() -> None:
        if time.monotonic() > until:
            raise Failed(f"fewer than {built.config.clients} nodes after {PATIENCE} seconds")
        time.sleep(0.5)

    fed, forms = built.federation, _forms(built)
    nodes, sizes = roll(grid, built.config.clients, wait)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    fed.ground = replace(fed.ground, columns={}, owned=Owned(np.zeros(0, np.int64), starts))
    counted = _Counted()
    fed.store = counted
    fed.executor = Deployed(grid, nodes, counted.of, fed.ground.base, forms)


def _play(built: Built, folder: Folder | None) -> None:
    """All rounds. Models of the clients' own cannot be scored here: they are not here."""
    config, fed = built.config, built.federation
    _scored(built, folder)
    while fed.round < config.rounds:
        report = fed.step()
        last = fed.round == config.rounds
        due = last or (config.evaluate and fed.round % config.evaluate == 0)
        scores = _scored(built, folder) if due else {}
        words = [f"training loss {report.loss:.4f}"]
        words += [f"test {name} {value:.4g}" for name, value in scores.items()]
        print(f"round {report.round}: {', '.join(words)}", flush=True)
    if folder is not None:
        saved.save(folder.path, built, api.finished(fed, built.task))


def _scored(built: Built, folder: Folder | None) -> dict[str, float]:
    """The shared model's metrics on the server's test items, also written down."""
    fed = built.federation
    if personal(fed):
        return {}
    rows = list(score(fed, built.task, built.splits.test, None, "test"))
    if folder is not None:
        folder.write_metrics(rows)
    return {name: value for name, value in rows[0].items() if name not in _WHERE}


_WHERE = ("round", "t", "scope", "split")
