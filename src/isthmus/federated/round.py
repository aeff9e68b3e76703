"""One round of federated training, from the server's state to its next state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from isthmus import seeds
from isthmus.contracts import Context, Updates
from isthmus.errors import InputError
from isthmus.federated.cohort import Cohort, Done, Executor, Ground
from isthmus.federated.fleet import Fleet
from isthmus.federated.masked import Masked
from isthmus.federated.method import Known, Method, State
from isthmus.federated.path import MEMORY, Path, Sent, as_it_was, nothing_sound
from isthmus.federated.store import ClientStore
from isthmus.learn.phase import Purpose
from isthmus.tree import Tree
from isthmus.wire.device import Device
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Attempts, Delivery, Direction, Link

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
    the rest stays as it was built. `flops` is the work of one gradient on one example, `deadline`
    the seconds after which a round no longer waits for uploads.
    """

    method: Method
    ground: Ground
    path: Path
    executor: Executor
    schedule: Any
    store: ClientStore
    ledger: Ledger
    link: Link
    fleet: Fleet
    server: Device
    seed: int
    flops: float
    lr: Callable[[int], float]
    state: State
    ranks: np.ndarray
    versions: np.ndarray
    round: int = 0
    now: float = 0.0
    deadline: float | None = None
    masked: Masked | None = None
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

    @property
    def apart(self) -> bool:
        """True when each client is sent a model of its own."""
        return self.method.personal_download

    def downloads(self, clients: np.ndarray) -> list[Tree]:
        """What each of these clients would be sent now; one object where it is the same: for
        clients of one rank, unless every client has a model of its own."""
        ranks, versions = self.ranks[clients], self.versions[clients]
        if not self.apart and (ranks == ranks[0]).all():
            one = Known(int(clients[0]), int(ranks[0]), int(versions[0]))
            return self.method.sends(self.state, [one]) * len(clients)
        slots = clients if self.apart else ranks
        _, first, which = np.unique(slots, return_index=True, return_inverse=True)
        known = [Known(int(clients[i]), int(ranks[i]), int(versions[i])) for i in first]
        made = self.method.sends(self.state, known)
        return [made[i] for i in which]

    def step(self) -> Report:
        """Play one round; before the first one, the warm-up of a method that has one."""
        if self.round == 0 and self.method.phases("warm-up"):
            self._exchange(np.arange(len(self.ground.owned)), "warm-up")
        self.round += 1
        return self._exchange(self._chosen(), "train")

    def _chosen(self) -> np.ndarray:
        """Who takes part, of those who can be reached; where nobody can, the clock goes on."""
        if self.fleet.sure:
            return self.schedule.clients(self.round)
        opens = self.fleet.opens(self.now)
        if opens is None:
            raise InputError("battery", "every device is flat", "a larger one, or fewer rounds")
        self.now = opens
        return self.schedule.clients(self.round, self.fleet.reachable(self.now))

    def _exchange(self, clients: np.ndarray, purpose: Purpose) -> Report:
        """Send, work, send back, reduce, update."""
        key, began = seeds.key(self.seed, "round", self.round), self.now
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
            versions=np.full(len(clients), max(0, self.round - 1)),
            round=self.round,
            lr=self.lr(max(1, self.round)),
            downs=downs,
            kept=kept,
            purpose=purpose,
        )
        done = self.executor.run(self.method, self.ground, cohort)
        finished = self._work(cohort, done, arrival.done[here])
        if self.masked is not None:
            finished = np.maximum(finished, self._meet(clients, arrival.done[here], key))
        if not self.fleet.sure:
            back = ~self.fleet.vanishes(cohort.keys)
            if not back.all():
                self.now = max(self.now, float(finished.max()))  # that it waited for them
                cohort, done = cohort.take(np.flatnonzero(back)), done.take(np.flatnonzero(back))
                kept, finished = _rows(kept, back), finished[back]
            if not len(cohort):
                return self._nobody(key)
        return self._receive(cohort, done, kept, finished, key, began)

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
        axes = self.method.rank_axes() if self.method.slices_download else None
        made = self.downloads(clients)
        slots = list(zip(map(id, made), self.ranks[clients].tolist(), strict=True))
        crossed: dict[tuple[int, int], tuple[Tree, int, int]] = {}
        for alike in _alike(dict(zip(slots, made, strict=True))):
            (_, rank), *_ = alike
            arrived = self.path.down([*alike.values()], self.round, key, rank, axes)
            crossed.update(zip(alike, arrived, strict=True))
        downs, sizes, values = zip(*map(crossed.__getitem__, slots), strict=True)
        sizes, values = np.array(sizes, np.int64), np.array(values, np.int64)
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
        return list(downs), self._catch_up(clients, names, delivery, key)

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
        spent = self.fleet.spend(cohort.clients, flops, cohort.keys)
        self.fleet.drain(cohort.clients, spent.joules)
        names = self.named(cohort.clients)
        self.ledger.later(
            len(names), "work", sender=names, receiver=names, kind="train", t=begun,
            seconds=spent.seconds, joules=spent.joules, flops=flops, round=self.round,
        )  # fmt: skip
        return begun + spent.seconds

    # -- up -----------------------------------------------------------------------------

    def _receive(
        self,
        cohort: Cohort,
        done: Done,
        kept: Tree,
        finished: np.ndarray,
        key: int,
        began: float,
    ) -> Report:
        """Carry the uploads up, reduce them and update the server.

        A client that has diverged keeps what it had, and sends nothing where the guard drops it;
        one that codes its uploads itself has seen to that.
        """
        updates, asked = done.updates, cohort.clients.tolist()
        sizes = self.ground.owned.sizes(cohort.clients)
        updates.meta = done.declared(cohort, sizes.tolist(), self.schedule.needs_loss)
        updates, good = (updates, None) if done.posted is not None else self.path.sound(updates)
        if good is not None:
            done = replace(done, kept=as_it_was(done.kept, kept, good))
            if not len(updates):
                raise nothing_sound()
            if len(updates) < len(cohort):
                rows = np.flatnonzero(good)
                cohort, done, kept = cohort.take(rows), done.take(rows), _rows(kept, good)
                finished, sizes = finished[rows], sizes[rows]
        share = sizes / max(sizes.sum(), 1)
        loss = float(done.loss.numpy() @ share)
        aux = {name: float(x.numpy() @ share) for name, x in done.aux.items()}
        left = {**done.kept, **{name: x for name, x in kept.items() if name.startswith(MEMORY)}}
        if not self.method.communicates:
            self.store.put(cohort.clients, self.round, left)
            self.now = float(finished.max())
            return Report(self.round, self.now, loss, aux, asked, cohort.clients.tolist(), {})
        if done.posted is not None:
            sent = self.path.arrived(done.posted, updates.meta)
            return self._upload(asked, cohort, sent, finished, loss, aux, key, began)
        origin = partial(self.method.origin, self.state, cohort.downs[0], self.round)
        updates, events = self.path.protected(updates, cohort.keys, seeds.fold(key, 3), origin)
        if self.masked is not None:
            weights = self.masked.weights(self.method, updates.meta)
            updates = self.masked.hide(updates, weights, cohort.keys)
        sent = self.path.crossed(updates, left, cohort.keys, events)
        return self._upload(asked, cohort, sent, finished, loss, aux, key, began)

    def _upload(
        self,
        asked: list[int],
        cohort: Cohort,
        sent: Sent,
        finished: np.ndarray,
        loss: float,
        aux: dict[str, float],
        key: int,
        began: float,
    ) -> Report:
        """Send what was coded; what arrives, and in time where there is a deadline, is mixed.

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
        self.fleet.drain(senders, delivery.joules)
        if self.deadline is not None:
            late = delivery.done > began + self.deadline
            delivery = delivery._replace(
                done=np.minimum(delivery.done, began + self.deadline),
                delivered=delivery.delivered & ~late,
            )
        self.now = max(self.now, float(delivery.done.max()))
        for event in sent.events:
            for name in names:
                self.ledger.privacy(self.now, name, event, self.round)
        arrived, kept, who = sent.updates, sent.kept, cohort.clients
        if self.schedule.needs_loss:
            here = np.flatnonzero(delivery.delivered)
            losses = np.array([arrived.meta[i].loss for i in here.tolist()])
            self.schedule.seen(self.round, senders[here], losses, delivery.done[here] - began)
        if not delivery.delivered.all():
            arrived = arrived.take(np.flatnonzero(delivery.delivered).tolist())
        if len(arrived) < len(cohort):
            here = np.isin(who, arrived.clients)
            who, kept = who[here], _rows(kept, here)
        if not len(arrived):
            return self._nobody(key)
        report = self._mix(arrived, cohort.downs[0], asked, loss, aux, seeds.fold(key, 5))
        self.store.put(who, self.round, kept)
        return report

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
        if self.masked is not None:
            self._unmasking(np.array(arrived.clients), key)
            shapes = {f"delta/{name}": x.dtype for name, x in self.state["shared"].items()}
            reduced, used = self.masked.reveal(arrived, shapes), arrived
        else:
            reduced, used = self.path.reduce(self.method, self.state, arrived, context)
        if "privacy" in reduced.diag:
            self.ledger.privacy(self.now, SERVER, reduced.diag["privacy"], self.round)
        self.state = self.method.server(self.state, reduced, used.meta)
        return Report(self.round, self.now, loss, aux, clients, used.clients, reduced.diag)

    # -- secure aggregation -------------------------------------------------------------

    def _meet(self, clients: np.ndarray, begun: np.ndarray, key: int) -> np.ndarray:
        """Exchange keys and shares, while the clients train: when each has those of all."""
        assert self.masked is not None  # only called with a mask
        self.masked.meeting = meeting = self.masked.mask.meet(clients.tolist(), key)
        ready = begun
        for i, kind in enumerate(("keys", "shares")):
            there = self._pass(clients, kind, meeting.up[i], "up", ready, seeds.fold(key, 20 + i))
            all_there = np.full(len(clients), there.max())
            down = meeting.down[i]
            ready = self._pass(clients, kind, down, "down", all_there, seeds.fold(key, 30 + i))
        return ready

    def _unmasking(self, clients: np.ndarray, key: int) -> None:
        """The survivors are told who they are, and give the shares that open the sum."""
        assert self.masked is not None and self.masked.meeting is not None
        up, down = self.masked.meeting.closing()
        now = np.full(len(clients), self.now)
        told = self._pass(clients, "survivors", down, "down", now, seeds.fold(key, 40))
        given = self._pass(clients, "opening", up, "up", told, seeds.fold(key, 41))
        self.now = float(given.max())

    def _pass(
        self,
        clients: np.ndarray,
        kind: str,
        size: int | np.ndarray,
        way: Direction,
        now: np.ndarray,
        key: int,
        values: np.ndarray | None = None,
    ) -> np.ndarray:
        """A message of `size` bytes to or from each client, sent until it arrives; when it has."""
        names, sizes = self.named(clients), np.broadcast_to(np.asarray(size), len(clients))
        values = sizes if values is None else values
        done, left = now, np.arange(len(clients))
        while len(left):
            some = self.link.send_many(sizes[left], way, done[left], key=key, index=clients[left])
            mine = [names[i] for i in left.tolist()]
            some.enter(
                self.ledger,
                sender=mine if way == "up" else SERVER,
                receiver=SERVER if way == "up" else mine,
                kind=kind,
                values=values[left],
                round=self.round,
                sequence=clients[left],
            )
            done = done.copy()
            done[left] = some.done
            left, key = left[~some.delivered], seeds.fold(key, 1)
        return done

    # -- a checkpoint -------------------------------------------------------------------

    def journal(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint keeps beside state, versions and clock: JSON values and tensors."""
        return {"schedule": self.schedule.state()}, {"spent": torch.from_numpy(self.fleet.spent)}

    def take_up(self, about: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Take up a `journal` again."""
        self.schedule.restore(about["schedule"])
        self.fleet.spent = tensors["spent"].numpy().copy()


def _alike(made: dict[tuple[int, int], Tree]) -> list[dict[tuple[int, int], Tree]]:
    """Downloads (by identity and rank) in groups of one rank and the same shapes."""
    groups: dict[Any, dict[tuple[int, int], Tree]] = {}
    for slot, sent in made.items():
        shapes = tuple([(name, x.shape, x.dtype) for name, x in sent.items()])
        groups.setdefault((slot[1], shapes), {})[slot] = sent
    return list(groups.values())


def _rows(stacked: Tree, keep: np.ndarray) -> Tree:
    index = torch.from_numpy(np.flatnonzero(keep))
    return {name: x[index] for name, x in stacked.items()}
