"""A run as a Flower deployment: the server's and a client's half of one configuration.

Both halves build the same run from the same keys. The server's then asks the nodes who they are
and how many examples they have, holds no training data, and plays the rounds; a client's cuts the
data to its own rows and runs one visit a message. What a client keeps stays in its node.

What a client does to an upload between its visit and the link (clip, noise, codec, attack) is not
part of its half yet, so configurations with these are refused rather than run as if it were.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from isthmus.errors import InputError
from isthmus.federated.cohort import Ground, Owned
from isthmus.federated.executors.flower import Deployed, Failed, roll
from isthmus.federated.flower import ready
from isthmus.federated.flower.visit import OnNode, client_app
from isthmus.federated.method import Method
from isthmus.federated.score import personal, score
from isthmus.federated.store import ClientStore
from isthmus.run import api, saved
from isthmus.run.build import Built, build, environment
from isthmus.run.config import Config, assign
from isthmus.run.folder import Folder
from isthmus.tree import Tree
from isthmus.wire.ledger import Ledger

if TYPE_CHECKING:
    from flwr.app import Context

PATIENCE = 300
"""Seconds in which the nodes have to be there."""

OUT = "out"
"""The one key of an app's configuration that is not a key of a run: the new folder it writes."""


def server_app() -> Any:
    """The server's half, a Flower `ServerApp`."""
    ready()
    from flwr.serverapp import ServerApp

    app = ServerApp()

    def main(grid: Any, context: Context) -> None:
        keys = dict(context.run_config)
        out = str(keys.pop(OUT, ""))
        serve(grid, config_of(keys), Path(out) if out else None)

    app.main()(main)
    return app


def node_app() -> Any:
    """A client's half, a Flower `ClientApp`. Its node says `partition-id` and, if its data are
    real, `data-dir`."""
    ready()

    def site(context: Context) -> OnNode:
        keys = {key: value for key, value in context.run_config.items() if key != OUT}
        config, node = config_of(keys), context.node_config
        if "data-dir" in node:
            config = config.model_copy(update={"data_dir": Path(str(node["data-dir"]))})
        method, ground, initial = _part(config.model_dump_json(), int(node["partition-id"]))
        ground = replace(ground, base=dict(ground.base))  # a run changes its own
        return OnNode(method, ground, initial, context.state)

    return client_app(site)


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


@lru_cache(maxsize=8)
def _part(text: str, client: int) -> tuple[Method, Ground, Tree]:
    """The method, the ground cut to the client's own rows, and what a new client keeps."""
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
    return fed.method, ground, fed.store.initial


def serve(grid: Any, config: Config, out: Path | None = None) -> Built:
    """Play a run over the nodes of `grid`; `out` is a new folder for all that it writes.

    Raises `InputError` for what a deployment cannot do, `Failed` for nodes that fail.
    """
    config = config.model_copy(update={"executor": "flower"})
    folder = Folder.new(out) if out is not None else None
    ledger = folder.ledger() if folder is not None else Ledger()
    try:
        built = build(config, ledger)
        _refuse(built)
        if folder is not None:
            folder.begin(built.config, environment())
        _deploy(built, grid)
        _play(built, folder)
        return built
    finally:
        ledger.close()
        if folder is not None:
            folder.close()


def _refuse(built: Built) -> None:
    """Raise `InputError` for what is not built or would not be true on real nodes."""
    config = built.config
    for field, value, allowed in (
        ("clip", config.clip, None),
        ("privacy", config.privacy, "none"),
        ("attack", config.attack, None),
        ("feedback", config.feedback, False),
        ("codec", config.codec, "dense"),
        ("download", config.download, "dense"),
    ):
        if value != allowed:
            raise InputError(field, value, f"{allowed} in a deployment (train simulates it)")
    if built.federation.method.names.recalibrate:
        raise InputError("model", "one with batch statistics", "one without them in a deployment")


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

    fed = built.federation
    nodes, sizes = roll(grid, built.config.clients, wait)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    fed.ground = replace(fed.ground, columns={}, owned=Owned(np.zeros(0, np.int64), starts))
    counted = _Counted()
    fed.store = counted
    fed.executor = Deployed(grid, nodes, counted.of, fed.ground.base)


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
