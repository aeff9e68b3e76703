"""One round of federated training, from the server's state to its next state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from isthmus import seeds
from isthmus.contracts import Context, Meta, Updates
from isthmus.federated.cohort import Cohort, Done, Executor, Ground
from isthmus.federated.method import Known, Method, State
from isthmus.federated.path import MEMORY, Path, Sent
from isthmus.federated.schedulers.sync import Sync
from isthmus.federated.store import ClientStore
from isthmus.tree import Tree
from isthmus.wire.device import Device, spend_each
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Attempts, Delivery, Link

SERVER = "server"


class Report(NamedTuple):
    """What a round came to: mean training loss, seconds of virtual time, and who took part."""

    round: int
    now: float
    loss: float
    aux: dict[str, float]
    clients: list[int]
    accepted: list[int]
    diag: dict[str, Any]


@dataclass
class Federation:
    """A server, its clients and all between them.

    `state`, `round`, `now` and `versions` (the base version each client holds) are what changes;
    the rest stays as it was built. `flops` is the work of one gradient on one example.
    """

    method: Method
    ground: Ground
    path: Path
    executor: Executor
    schedule: Sync
    store: ClientStore
    ledger: Ledger
    link: Link
    devices: Sequence[Device]
    server: Device
    seed: int
    flops: float
    lr: Callable[[int], float]
    state: State
    ranks: np.ndarray
    versions: np.ndarray
    round: int = 0
    now: float = 0.0
    extras: Mapping[str, Any] = field(default_factory=dict)
    names: Sequence[str] = ()
    _named: tuple[bytes, list[str]] = field(default_factory=lambda: (b"", list[str]()))

    def named(self, clients: np.ndarray) -> list[str]:
        """The parties of the ledger for these clients: `client/` and the owner, or the number."""
        held, names = self._named
        if held != (wanted := clients.tobytes()):  # a round asks several times for the same
            if self.names:
                names = [self.names[int(client)] for client in clients]
            else:
                names = [f"client/{client}" for client in clients.tolist()]
            self._named = (wanted, names)
        return names

    def step(self) -> Report:
        """Play one round: send, work, send back, reduce, update."""
        self.round += 1
        clients = self.schedule.clients(self.round)
        key = seeds.key(self.seed, "round", self.round)
        if not len(clients):
            return self._nobody(key)
        kept = self.store.get(clients)
        downs, arrival = self._send(clients, key)
        here = arrival.delivered
        if not here.all():
            clients, downs = clients[here], [d for d, ok in zip(downs, here, strict=True) if ok]
            kept = _rows(kept, here)
        if not len(clients):
            return self._nobody(key)
        self.ground.base.update(self.method.base(self.state))
        cohort = Cohort(
            clients=clients,
            keys=seeds.keys(seeds.key(self.seed, "visit", self.round), clients),
            ranks=self.ranks[clients],
            versions=np.full(len(clients), self.round - 1),
            round=self.round,
            lr=self.lr(self.round),
            downs=downs,
            kept=kept,
        )
        done = self.executor.run(self.method, self.ground, cohort)
        finished = self._work(cohort, done, arrival.done[here])
        return self._receive(cohort, done, kept, finished, key)

    def _nobody(self, key: int) -> Report:
        """A round without clients: the server learns nothing, but its noise is still added."""
        if self.path.central is not None:
            reduced = self.path.noised(self.method.nothing(self.state), key)
            self.ledger.privacy(self.now, SERVER, reduced.diag["privacy"], self.round)
            self.state = self.method.server(self.state, reduced, [])
        return Report(self.round, self.now, float("nan"), {}, [], [], {})

    # -- down ---------------------------------------------------------------------------

    def _send(self, clients: np.ndarray, key: int) -> tuple[list[Tree], Delivery]:
        """Send every client its tensors; equal downloads are encoded once."""
        n = len(clients)
        if not self.method.communicates:
            still = np.zeros(n)
            arrived = np.ones(n, dtype=bool)
            nothing: Tree = {}
            nothing_tried = Attempts(still, still, still, still, still)
            return [nothing] * n, Delivery(
                still, still + self.now, still, still, still, still, arrived, nothing_tried
            )
        made: dict[int, tuple[Tree, int, int]] = {}
        axes = self.method.rank_axes() if self.method.slices_download else None
        ranks = self.ranks[clients].tolist()
        # Who is sent the same: clients of one rank, unless every client has a model of its own.
        slots = clients.tolist() if self.method.personal_download else ranks
        for slot, client, rank in zip(slots, clients.tolist(), ranks, strict=True):
            if slot not in made:
                sent = self.method.send(self.state, Known(client, rank, int(self.versions[client])))
                made[slot] = self.path.down(sent, self.round, key, rank, axes)
        downs = [made[slot][0] for slot in slots]
        sizes = np.array([made[slot][1] for slot in slots], np.int64)
        values = np.array([made[slot][2] for slot in slots], np.int64)
        names = self.named(clients)
        delivery = self.link.send_many(
            sizes, "down", self.now, key=seeds.fold(key, 1), index=clients
        )
        delivery.enter(
            self.ledger,
            sender=SERVER,
            receiver=names,
            kind="model",
            values=values,
            round=self.round,
            sequence=clients,
        )
        return downs, self._catch_up(clients, names, delivery, key)

    def _catch_up(
        self, clients: np.ndarray, names: list[str], delivery: Delivery, key: int
    ) -> Delivery:
        """Send the changes of the base that each client has missed, after the model."""
        now = self.method.version(self.state)
        behind = self.versions[clients]
        if now == 0 or (behind == now).all():
            return delivery
        made = {
            v: self.path.pairs(self.method.catch_up(self.state, v)) for v in set(behind.tolist())
        }
        sizes = np.array([made[v][0] for v in behind.tolist()])
        values = np.array([made[v][1] for v in behind.tolist()])
        more = self.link.send_many(
            sizes, "down", delivery.done, key=seeds.fold(key, 2), index=clients
        )
        more.enter(
            self.ledger,
            sender=SERVER,
            receiver=names,
            kind="base",
            values=values,
            round=self.round,
            sequence=clients,
        )
        both = delivery.delivered & more.delivered
        self.versions[clients[both]] = now
        return more._replace(delivered=both)

    # -- work ---------------------------------------------------------------------------

    def _work(self, cohort: Cohort, done: Done, begun: np.ndarray) -> np.ndarray:
        """Enter what each client computed; when each has finished."""
        flops = np.multiply(done.gradients.numpy(), self.flops, dtype=np.float64)
        if len(self.devices) == 1:
            spent = self.devices[0].spend(flops)
        else:
            owners = [self.devices[c % len(self.devices)] for c in cohort.clients.tolist()]
            spent = spend_each(owners, flops)
        names = self.named(cohort.clients)
        self.ledger.later(
            len(names), "work", sender=names, receiver=names, kind="train", t=begun,
            seconds=spent.seconds, joules=spent.joules, flops=flops, round=self.round,
        )  # fmt: skip
        return begun + spent.seconds

    # -- up -----------------------------------------------------------------------------

    def _receive(
        self, cohort: Cohort, done: Done, kept: Tree, finished: np.ndarray, key: int
    ) -> Report:
        """Carry the uploads up, reduce them and update the server."""
        updates = done.updates
        sizes = self.ground.owned.sizes(cohort.clients).tolist()
        ranks = cohort.ranks.tolist()
        updates.meta = [
            Meta(client, self.round, self.round - 1, size, int(steps), rank or None)
            for client, size, steps, rank in zip(
                cohort.clients.tolist(), sizes, done.steps.tolist(), ranks, strict=True
            )
        ]
        share = np.array(sizes, dtype=np.float64) / max(sum(sizes), 1)
        loss = float(done.loss.numpy() @ share)
        aux = {name: float(x.numpy() @ share) for name, x in done.aux.items()}
        left = {**done.kept, **{name: x for name, x in kept.items() if name.startswith(MEMORY)}}
        clients = cohort.clients.tolist()
        if not self.method.communicates:
            self.store.put(cohort.clients, self.round, left)
            self.now = float(finished.max())
            return Report(self.round, self.now, loss, aux, clients, clients, {})
        origin = partial(self.method.origin, self.state, cohort.downs[0], self.round)
        sent = self.path.up(updates, left, cohort.keys, seeds.fold(key, 3), origin)
        return self._upload(cohort, sent, finished, loss, aux, key)

    def _upload(
        self,
        cohort: Cohort,
        sent: Sent,
        finished: np.ndarray,
        loss: float,
        aux: dict[str, float],
        key: int,
    ) -> Report:
        """Send what was coded; what arrives is mixed.

        A client whose upload does not arrive keeps what it had, as if it had not been asked.
        """
        senders = np.array(sent.updates.clients)
        if len(senders) < len(cohort):
            finished = finished[np.isin(cohort.clients, senders)]
        names = self.named(senders)
        delivery = self.link.send_many(
            sent.bytes, "up", finished, key=seeds.fold(key, 4), index=senders
        )
        delivery.enter(
            self.ledger,
            sender=names,
            receiver=SERVER,
            kind="update",
            values=sent.values,
            round=self.round,
            sequence=senders,
        )
        self.now = float(delivery.done.max())
        for event in sent.events:
            for name in names:
                self.ledger.privacy(self.now, name, event, self.round)
        arrived, kept, who = sent.updates, sent.kept, cohort.clients
        if not delivery.delivered.all():
            arrived = arrived.take(np.flatnonzero(delivery.delivered).tolist())
        if len(arrived) < len(cohort):
            here = np.isin(who, arrived.clients)
            who, kept = who[here], _rows(kept, here)
        self.store.put(who, self.round, kept)
        if not len(arrived):
            return self._nobody(key)
        clients = cohort.clients.tolist()
        return self._mix(arrived, cohort.downs[0], clients, loss, aux, seeds.fold(key, 5))

    def _mix(
        self,
        arrived: Updates,
        down: Tree,
        clients: list[int],
        loss: float,
        aux: dict[str, float],
        key: int,
    ) -> Report:
        context = Context(self.round, key, {**self.extras, "down": down})
        reduced, used = self.path.reduce(self.method, self.state, arrived, context)
        if "privacy" in reduced.diag:
            self.ledger.privacy(self.now, SERVER, reduced.diag["privacy"], self.round)
        self.state = self.method.server(self.state, reduced, used.meta)
        return Report(self.round, self.now, loss, aux, clients, used.clients, reduced.diag)


def _rows(stacked: Tree, keep: np.ndarray) -> Tree:
    index = torch.from_numpy(np.flatnonzero(keep))
    return {name: x[index] for name, x in stacked.items()}
