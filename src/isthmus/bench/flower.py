"""A Flower app on our in-process grid beside Flower's own simulation on Ray, in one run.

FedAvg over softmax regression on digits, NumPy; every client trains and evaluates in every round.
The app adds the replies up in the order of the clients, so that both ways must end with the same
bits. Times are those from one round's end to the next, taken by the server: starting Ray is not
in them.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from isthmus.bench.figure import Figure, at_least
from isthmus.federated.flower import ready
from isthmus.federated.flower.app import play
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

CLIENTS, ROUNDS, WARM = 10, 60, 2
SEED = 7


class Trace(NamedTuple):
    """When each round ended, and the last weights."""

    ends: list[float]
    weights: list[np.ndarray]

    @property
    def seconds(self) -> float:
        """Of the shortest round after the first ones: what else runs here only adds to it."""
        return min(np.diff(self.ends)[WARM:].tolist())


def app(rounds: int, trace: Trace) -> tuple[Any, Any]:
    """The server's and the client's half; `trace` is filled by the server's."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    server, client = ServerApp(), ClientApp()

    @client.train()
    def fit(message: Any, context: Any) -> Any:
        x, y = part(context)
        mine, round = context.node_config["partition-id"], message.content["config"]["server-round"]
        weights = message.content["arrays"].to_numpy_ndarrays()
        weights = trained(weights, x, y, np.random.default_rng([mine, round]))
        metrics = MetricRecord({"num-examples": len(y), "partition": mine})
        content = RecordDict({"arrays": ArrayRecord(weights), "metrics": metrics})
        return Message(content=content, reply_to=message)

    @client.evaluate()
    def score(message: Any, context: Any) -> Any:
        x, y = part(context)
        w, b = message.content["arrays"].to_numpy_ndarrays()
        right = float(((x @ w + b).argmax(1) == y).mean())
        metrics = MetricRecord({"accuracy": right, "num-examples": len(y)})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

    class InOrder(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            ordered = sorted(replies, key=lambda r: r.content["metrics"]["partition"])
            return super().aggregate_train(server_round, ordered)

        def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
            trace.ends.append(time.perf_counter())
            return super().aggregate_evaluate(server_round, replies)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        strategy = InOrder(min_train_nodes=CLIENTS, min_evaluate_nodes=CLIENTS)
        zeros = ArrayRecord([np.zeros((64, 10)), np.zeros(10)])
        result = strategy.start(grid=grid, initial_arrays=zeros, num_rounds=rounds)
        trace.weights.extend(result.arrays.to_numpy_ndarrays())

    return server, client


@cache
def items() -> tuple[np.ndarray, np.ndarray]:
    """Digits with pixels in 0..1, and what they show; read once by each process."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x / 16.0, y


def part(context: Any) -> tuple[np.ndarray, np.ndarray]:
    """The items of one client."""
    x, y = items()
    rows = slice(context.node_config["partition-id"], None, context.node_config["num-partitions"])
    return x[rows], y[rows]


def trained(
    weights: list[np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    draw: np.random.Generator,
    lr: float = 0.5,
) -> list[np.ndarray]:
    """One local epoch of softmax regression, in four batches."""
    w, b = weights
    for rows in np.array_split(draw.permutation(len(y)), 4):
        logits = x[rows] @ w + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(rows)), y[rows]] -= 1.0
        w, b = w - lr * x[rows].T @ p / len(rows), b - lr * p.mean(0)
    return [w, b]


def in_process(rounds: int) -> Trace:
    """On our grid, with a ledger and links."""
    trace = Trace([], [])
    server, client = app(rounds, trace)
    play(server, client, {}, CLIENTS, Link.parse("wifi"), Ledger(), SEED)
    return trace


def on_ray(rounds: int) -> Trace:
    """On Flower's simulation; one actor for each processor."""
    from flwr.simulation import run_simulation

    trace = Trace([], [])
    server, client = app(rounds, trace)
    resources = {"num_cpus": 1.0, "num_gpus": 0.0}
    backend: Any = {"client_resources": resources, "init_args": {"include_dashboard": False}}
    run_simulation(server, client, CLIENTS, backend_config=backend)
    return trace


@contextmanager
def _silent() -> Iterator[None]:
    """Flower without its report of every round."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def figures(ray: Callable[[int], Trace] = on_ray) -> list[Figure]:
    """Seconds of a round both ways, how many times faster ours is, and whether bits agree."""
    title = f"Flower app, {CLIENTS} clients, a round"
    for module, extra in (("flwr", "flower"), ("ray", "ray")):
        if importlib.util.find_spec(module) is None:
            note = f"not measured: {module} is not installed (extra {extra})"
            return [Figure(f"{title}: {note}", float("nan"), "", None, None, note)]
    ready()
    with _silent():
        own, other = in_process(ROUNDS), ray(ROUNDS)
    same = all(map(np.array_equal, own.weights, other.weights)) and len(own.weights) == 2
    name = "final weights have the same bits on both"
    return [
        Figure(f"{title} in process", own.seconds * 1e3, "ms"),
        Figure(f"{title} on Flower's Ray simulation", other.seconds * 1e3, "ms"),
        at_least(f"{title}, times faster in process", other.seconds / own.seconds, 10.0, "x"),
        Figure(f"{title}, {name}", float(same), "", "1: yes", same),
    ]
