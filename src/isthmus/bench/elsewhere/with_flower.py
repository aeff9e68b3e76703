"""The round in Flower's own simulation on Ray: its `FedAvg` over a torch client app.

Unlike its neighbours it is imported, in this environment, so that Ray's processes find the client's
half by its name and read the items once each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

NAMES = ("w1", "b1", "w2", "b2")


@cache
def items(path: str) -> dict[str, torch.Tensor]:
    """The work; read once by each process, which also keeps to one thread."""
    torch.set_num_threads(1)
    return {name: torch.as_tensor(x) for name, x in np.load(path).items()}


@cache
def net(path: str) -> nn.Sequential:
    (wide, pixels), classes = items(path)["w1"].shape, len(items(path)["w2"])
    return nn.Sequential(nn.Linear(pixels, wide), nn.ReLU(), nn.Linear(wide, classes))


def fill(model: nn.Module, arrays: list[np.ndarray]) -> None:
    with torch.no_grad():
        for p, x in zip(model.parameters(), arrays, strict=True):
            p.copy_(torch.as_tensor(x))


def fit(path: str, message: Any, context: Any) -> Any:
    """One local epoch."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    work, model = items(path), net(path)
    mine = int(context.node_config["partition-id"])
    start, stop = work["starts"][mine : mine + 2].tolist()
    x, y = work["x"][start:stop], work["y"][start:stop]
    fill(model, message.content["arrays"].to_numpy_ndarrays())
    optimiser = torch.optim.SGD(model.parameters(), lr=float(work["lr"]))
    for index in torch.randperm(len(x)).split(int(work["batch"])):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimiser.step()
    arrays = ArrayRecord([p.detach().numpy() for p in model.parameters()])
    metrics = MetricRecord({"num-examples": len(x)})
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    return Message(content=content, reply_to=message)


def main(path: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    from isthmus.federated.flower import ready

    ready()
    from flwr.app import ArrayRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    work, server, client = items(path), ServerApp(), ClientApp()
    clients, cohort = len(work["starts"]) - 1, int(work["cohort"])

    @client.train()
    def train(message: Any, context: Any) -> Any:
        return fit(path, message, context)

    @server.main()
    def play(grid: Any, context: Any) -> None:
        strategy = FedAvg(
            fraction_train=cohort / clients,
            fraction_evaluate=0.0,
            min_train_nodes=cohort,
            min_available_nodes=clients,
        )
        arrays = ArrayRecord([work[name].numpy() for name in NAMES])
        for line in sys.stdin:
            start = time.perf_counter()
            result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=int(line))
            seconds, arrays = time.perf_counter() - start, result.arrays
            model = net(path)
            fill(model, arrays.to_numpy_ndarrays())
            with torch.no_grad():
                right = float((model(work["test_x"]).argmax(1) == work["test_y"]).float().mean())
                first = torch.cat([work[name].flatten() for name in NAMES])
                norm = float((nn.utils.parameters_to_vector(model.parameters()) - first).norm())
            print(json.dumps({"seconds": seconds, "accuracy": right, "moved": norm}), file=answers)
            answers.flush()

    resources = {"num_cpus": 1.0, "num_gpus": 0.0}
    backend: Any = {"client_resources": resources, "init_args": {"include_dashboard": False}}
    run_simulation(server, client, clients, backend_config=backend)
