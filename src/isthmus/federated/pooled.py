"""Training in one place: the clients' items cross once, and the server trains on all of them.

A round is one visit of a client that owns everybody's training items, in the order of the pool, so
its result does not depend on who had which. No model crosses: the data have crossed as they are,
each client's in one message before the first round, sent until it has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from isthmus import seeds, tree
from isthmus.contracts import Meta, Reduced
from isthmus.federated.cohort import Cohort, Ground, Owned
from isthmus.federated.method import Known
from isthmus.federated.path import finite_rows, nothing_sound
from isthmus.federated.round import SERVER, Federation, Report
from isthmus.tree import Tree
from isthmus.wire.layouts import decode
from isthmus.wire.message import Message, Schema, encode

_DATA = 4
"""The number of this kind of message; those of a federation are 1 to 3."""


@dataclass
class Pooled(Federation):
    """A federation whose server holds all training items; clients are only scored."""

    pool: Ground | None = None

    def step(self) -> Report:
        """One round of the server; before the first, the data are brought to it."""
        if self.pool is None:
            self.pool = self._gathered(counted=self.round == 0)
        self.round += 1
        one = np.zeros(1, np.int64)
        down = self.method.send(self.state, Known(0, 0, 0))
        cohort = Cohort(
            clients=one,
            keys=seeds.keys(seeds.key(self.seed, "visit", self.round), one),
            ranks=one,
            versions=one + self.round - 1,
            round=self.round,
            lr=self.lr(self.round),
            downs=[down],
            kept={name: x.unsqueeze(0) for name, x in self.store.initial.items()},
        )
        done = self.executor.run(self.method, self.pool, cohort)
        flops = float(done.gradients.sum()) * self.flops
        spent = self.server.spend(flops)
        self.ledger.work_many(
            party=[SERVER], kind="train", t=self.now, seconds=spent.seconds,
            joules=spent.joules, flops=flops, round=self.round,
        )  # fmt: skip
        self.now += float(spent.seconds)
        done.updates.meta = [
            Meta(0, self.round, self.round - 1, len(self.pool.owned.order), int(done.steps[0]))
        ]
        if not finite_rows(done.updates, 1).all():
            raise nothing_sound()
        reduced = Reduced(tree.row(done.updates.delta, 0))
        self.state = self.method.server(self.state, reduced, done.updates.meta)
        aux = {name: float(x[0]) for name, x in done.aux.items()}
        everyone = list(range(len(self.ground.owned)))
        return Report(self.round, self.now, float(done.loss[0]), aux, everyone, everyone, {})

    def _gathered(self, counted: bool) -> Ground:
        """The pool as it was decoded; entered in the ledger unless it has been, before a resume."""
        owned, clients = self.ground.owned, np.arange(len(self.ground.owned))
        arrived: list[Tree] = []
        sizes, values = np.zeros((2, len(clients)), np.int64)
        for client in clients.tolist():
            rows = torch.from_numpy(owned.rows(client))
            own = {name: x[rows] for name, x in self.ground.columns.items()}
            values[client] = tree.nbytes(own)
            room = int(values[client]) + (1 << 20)
            schema = Schema.of_tree("data", _DATA, {}, own, room)
            crossing = encode(Message("data", {}, own), schema)
            sizes[client] = len(crossing)
            arrived.append(dict(decode(crossing, schema, finite=False).tensors))
        if counted:
            key = seeds.key(self.seed, "gather")
            start = np.full(len(clients), self.now)
            self.now = float(self._pass(clients, "data", sizes, "up", start, key, values).max())
        order = torch.from_numpy(np.argsort(owned.order, kind="stable"))
        columns = {name: x[order] for name, x in tree.cat(arrived).items()}
        whole = Owned(np.arange(len(order)), np.array([0, len(order)]))
        return replace(self.ground, columns=columns, owned=whole)
