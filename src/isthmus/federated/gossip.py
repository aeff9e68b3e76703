"""Training without a server: every peer has a model of its own and averages with its neighbours.

    train:  y_i = x_i after the local steps of peer i
    mix:    x_i <- y_i + sum_j W_ij (z_j - z_i)          z: what the receivers decoded of y

The schedule gives W, symmetric with rows that sum to 1, anew for every round. Written with
differences, the mean of the models stays where it is whatever the codec loses (as in Koloskova,
Stich and Jaggi, "Decentralized stochastic optimization and gossip algorithms with compressed
communication", ICML 2019); with the dense codec it is x = W y. A message that is lost takes its
pair out of W, so that W stays symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from isthmus import seeds, tree
from isthmus.contracts import Context, Meta, Updates
from isthmus.errors import InputError
from isthmus.federated.cohort import Cohort
from isthmus.federated.mean import Mean
from isthmus.federated.path import MEMORY, as_it_was
from isthmus.federated.round import Federation, Report
from isthmus.tree import Tree


@dataclass
class Gossip(Federation):
    """`state["peers"]` are the peers' models, stacked; `state["shared"]` is their mean."""

    def __post_init__(self) -> None:
        n = len(self.ground.owned)
        peers = {name: x.expand(n, *x.shape).clone() for name, x in self.state["shared"].items()}
        self.state = {**self.state, "peers": peers}

    @property
    def apart(self) -> bool:
        return True

    def downloads(self, clients: np.ndarray) -> list[Tree]:
        return [tree.row(self.state["peers"], client) for client in clients.tolist()]

    def step(self) -> Report:
        """Everybody trains, sends its model to its neighbours, and mixes what it received."""
        self.round += 1
        w = self.schedule.mixing(self.round)
        everyone = np.arange(len(self.ground.owned))
        key = seeds.key(self.seed, "round", self.round)
        cohort = Cohort(
            clients=everyone,
            keys=seeds.keys(seeds.key(self.seed, "visit", self.round), everyone),
            ranks=self.ranks,
            versions=np.full(len(everyone), self.round - 1),
            round=self.round,
            lr=self.lr(self.round),
            downs=self.downloads(everyone),
            kept=self.store.get(everyone),
        )
        done = self.executor.run(self.method, self.ground, cohort)
        finished = self._work(cohort, done, np.full(len(everyone), self.now))
        sizes = self.ground.owned.sizes(everyone).tolist()
        done.updates.meta = [
            Meta(client, self.round, self.round - 1, size, int(steps))
            for client, size, steps in zip(
                everyone.tolist(), sizes, done.steps.tolist(), strict=True
            )
        ]
        updates, good = self.path.sound(done.updates)
        if good is not None:
            self._all_there(updates)
            done.kept = as_it_was(done.kept, cohort.kept, good)
        origin = partial(self.method.origin, self.state, cohort.downs[0], self.round)
        updates, events = self.path.protected(updates, cohort.keys, seeds.fold(key, 3), origin)
        start = self.state["peers"]
        trained = {name: start[name] + x for name, x in updates.delta.items()}
        held = {name: x for name, x in cohort.kept.items() if name.startswith(MEMORY)}
        models = updates.with_delta(trained)
        sent = self.path.crossed(models, {**done.kept, **held}, cohort.keys, events)
        self._all_there(sent.updates)
        self.store.put(everyone, self.round, sent.kept)
        w = self._sent(w, sent.bytes, sent.values, finished, key)
        for event in sent.events:
            for name in self.named(everyone):
                self.ledger.privacy(self.now, name, event, self.round)
        mixed = self._mixed(trained, sent.updates, torch.from_numpy(w), key)
        peers = {**start, **mixed}
        self.state = {
            **self.state,
            "peers": peers,
            "shared": {name: x.mean(0) for name, x in peers.items()},
        }
        weight = np.array(sizes, dtype=np.float64)
        loss = float(done.loss.double().numpy() @ (weight / weight.sum()))
        clients = everyone.tolist()
        aux = {"consensus": consensus(peers)}
        return Report(self.round, self.now, loss, aux, clients, clients, {})

    def _all_there(self, updates: Updates) -> None:
        """Raise `InputError` where the guard has dropped a peer: without it, W is another one."""
        gone = sorted(set(range(len(self.ground.owned))) - set(updates.clients))
        if gone:
            raise InputError("guard", f"peer {gone[0]} has diverged", "peers that all stay finite")

    def _sent(
        self, w: np.ndarray, sizes: np.ndarray, values: np.ndarray, finished: np.ndarray, key: int
    ) -> np.ndarray:
        """Each peer's model to each of its neighbours; W without the pairs that lost one."""
        senders, receivers = np.nonzero(w * (1 - np.eye(len(w))))
        if not len(senders):
            self.now = float(finished.max())
            return w
        pairs = senders * len(w) + receivers
        delivery = self.link.send_many(
            sizes[senders], "up", finished[senders], key=seeds.fold(key, 4), index=pairs
        )
        delivery.enter(
            self.ledger, sender=self.named(senders), receiver=self.named(receivers), kind="model",
            values=values[senders], round=self.round, sequence=pairs,
        )  # fmt: skip
        self.now = max(float(finished.max()), float(delivery.done.max()))
        lost = ~delivery.delivered
        w = w.copy()
        for i, j in zip(senders[lost], receivers[lost], strict=True):
            w[i, i], w[j, j] = w[i, i] + w[i, j], w[j, j] + w[i, j]
            w[i, j] = w[j, i] = 0.0
        return w

    def _mixed(self, trained: Tree, received: Updates, w: Tensor, key: int) -> Tree:
        """The peers' next models; a rule other than the mean runs once for each receiver."""
        if isinstance(self.method.reducer, Mean) and not self.path.selectors:
            return {
                name: y + (_mix(w, z := received.delta[name]) - z) for name, y in trained.items()
            }
        rows = []
        for i in range(len(w)):
            near = w[i].nonzero().flatten()
            own = received.take(near.tolist())
            own = own.with_delta({n: z - received.delta[n][i] for n, z in own.delta.items()})
            context = Context(self.round, seeds.fold(key, 5 + i), dict(self.extras))
            reduced, _ = self.path.reduce(self.method, self.state, own, context, w[i][near])
            rows.append(tree.add(tree.row(trained, i), reduced.tensors))
        return tree.stack(rows)


def _mix(w: Tensor, stacked: Tensor) -> Tensor:
    return (w.to(stacked.dtype) @ stacked.reshape(len(w), -1)).view_as(stacked)


def consensus(peers: Tree) -> float:
    """mean_i |x_i - mean x|^2 of stacked models."""
    off = [(x - x.mean(0)).double().flatten(1).square().sum(1) for x in peers.values()]
    return float(torch.stack(off).sum(0).mean())
