"""Small federations: ragged clients, a net with two halves and dropout, in either precision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.round import Federation
from isthmus.models.nets import Net, initialise
from isthmus.run.build import Built, build, method_of
from isthmus.run.checkpoint import flat
from isthmus.run.config import Config
from isthmus.tasks.contract import Items, Task
from isthmus.tree import Tree
from isthmus.wire.ledger import Ledger

RAGGED = (3, 40, 1, 17, 8)
"""Items of each client: one step and ten, whole and short batches, one client with one item."""

WIDE, HIDDEN, CLASSES = 6, 9, 4
LAYERS = ("lower", "head")


def net(seed: int, dropout: float = 0.0) -> Net:
    """6 - 9 - 4 with tanh; both layers can carry an adapter."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.device("meta"):
        layers["lower"], layers["act"] = nn.Linear(WIDE, HIDDEN), nn.Tanh()
        if dropout:
            layers["drop"] = nn.Dropout(dropout)
        made = Net(nn.Sequential(layers), nn.Linear(HIDDEN, CLASSES))
    return initialise(made.to_empty(device="cpu"), seed)


def data(sizes: Sequence[int], dtype: torch.dtype, seed: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), WIDE, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (sum(sizes),), generator=g)


def task(
    sizes: Sequence[int] = RAGGED,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    module: Any = None,
    **options: Any,
) -> Task:
    """Client i owns the next `sizes[i]` items, in order."""
    x, y = options.pop("data", None) or data(sizes, dtype)
    owner = [f"{i:03d}" for i, size in enumerate(sizes) for _ in range(size)]
    made = module or (lambda seed: net(seed, dropout).to(dtype))
    return Task.of(made, (x, y), (x[:30], y[:30]), val=(x[:2], y[:2]), owner=owner, **options)


def owned(task: Task, client: int) -> Items:
    """The training items of one client."""
    items = task.synthesise().train
    return items.take([i for i, name in enumerate(items.group) if name == f"{client:03d}"])


def config(method: str, **keys: Any) -> Config:
    """SGD on the owners' data; adapters of rank 2 on both layers."""
    kind = method_of(method)
    settings = dict(keys.pop("settings", {}))
    if issubclass(kind, LoraMethod):
        settings = {"rank": 2, "alpha": 3.0, "targets": LAYERS, **settings}
    given: dict[str, Any] = {
        "task": "own",
        "method": method,
        "partition": "natural",
        "optimiser": "sgd",
        "lr": 0.1,
        "batch": 8,
        "executor": "sequential",
        "compile": "none",
        "link": "wifi",
        "settings": settings,
    }
    return Config.make(given | keys)


def built(
    method: str, task: Task, ledger: Path | None = None, store: Path | None = None, **keys: Any
) -> Built:
    clients = keys.pop("clients", None) or len(set(task.synthesise().train.group))
    return build(config(method, clients=clients, **keys), Ledger(ledger), store, task)


def federation(method: str, task: Task, **keys: Any) -> Federation:
    return built(method, task, **keys).federation


def play(method: str, task: Task, rounds: int, **keys: Any) -> Federation:
    """A federation after some rounds."""
    fed = federation(method, task, **keys)
    for _ in range(rounds):
        fed.step()
    return fed


def state(fed: Federation) -> Tree:
    """Everything the server holds, flat."""
    return flat(fed.state)


def kept(fed: Federation) -> Tree:
    """What all clients keep, stacked."""
    return fed.store.get(np.arange(len(fed.ground.owned)))


def apart(a: Tree, b: Tree) -> float:
    """The largest relative distance (Frobenius) between tensors of the same name."""
    assert a.keys() == b.keys()
    distances = [
        float((x.double() - b[n].double()).norm() / x.double().norm().clamp_min(1e-30))
        for n, x in a.items()
        if x.numel() and bool(x.any() or b[n].any())
    ]
    return max(distances, default=0.0)
