"""Training in which clients do not wait for each other, on one event queue.

A visit is a pure function of what was sent, what the client keeps and its key. So a visit that has
begun is left pending: when the first of those under way is due to end, all of them are computed
as one cohort, whatever versions they started from, and each sends when its own time has come.
The times come from the devices and the number of planned steps, so they are known beforehand;
only a visit that may end early is computed at its start.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from isthmus import seeds, tree
from isthmus.contracts import Context, Meta, Updates
from isthmus.errors import InputError
from isthmus.federated.cached import Cache
from isthmus.federated.cohort import Cohort, Done
from isthmus.federated.method import Known
from isthmus.federated.path import MEMORY, PARTS, as_it_was, nothing_sound
from isthmus.federated.round import SERVER, Federation, Report
from isthmus.federated.schedule import Action, Arrival, Mix, Renew, Start, Stop
from isthmus.tree import Tree


@dataclass
class Landed:
    """What a computed visit came to; `updates` and `kept` hold one row."""

    updates: Updates
    kept: Tree
    bytes: int
    values: int
    loss: float
    events: list[dict[str, Any]]


@dataclass
class Flight:
    """A visit under way: who, from which version, sent when, with what, and what it came to."""

    client: int
    version: int
    steps: int | None
    began: float
    key: int
    down: Tree
    landed: Landed | None = None
    lost: bool = False


class Event(NamedTuple):
    """An entry of the queue: `start`, `finish`, `arrive` or `wake`, about a client or a token."""

    time: float
    order: int
    what: str
    about: int
    steps: int | None = None


@dataclass
class Asynchronous(Federation):
    """A federation whose `step` goes on to the next mix; `round` counts mixes.

    `flights` are the visits under way by client, `waiting` the uploads that have arrived and are
    not mixed yet, by number.
    """

    events: list[Event] = field(default_factory=list)
    flights: dict[int, Flight] = field(default_factory=dict)
    waiting: dict[int, Flight] = field(default_factory=dict)
    scheduled: int = 0
    uploads: int = 0
    visits: int = 0
    begun: bool = False
    cache: Cache = field(default_factory=Cache)
    _downs: tuple[int, dict[int, Any]] = (-1, {})
    _diverged: set[int] = field(default_factory=set)

    def step(self) -> Report:
        """Follow the clock until the schedule mixes."""
        if not self.begun:
            if self.method.phases("warm-up"):
                self._exchange(np.arange(len(self.ground.owned)), "warm-up")
            self.begun = True
            self._act(self.schedule.begin(self.now))
        while self.events:
            event = heapq.heappop(self.events)
            self.now = event.time
            report = self._on(event)
            if report is not None:
                return report
        raise InputError("schedule", "nobody left to train", "clients that come back")

    def _on(self, event: Event) -> Report | None:
        if event.what == "start":
            self._start(event.about, event.steps)
            return None
        if event.what == "finish":
            return self._finish(event.about)
        if event.what == "arrive":
            return self._arrive(event.about)
        return self._act(self.schedule.woken(event.about, self.now))

    def _at(self, time: float, what: str, about: int, steps: int | None = None) -> None:
        heapq.heappush(self.events, Event(time, self.scheduled, what, about, steps))
        self.scheduled += 1

    def _act(self, actions: Sequence[Action]) -> Report | None:
        report = None
        for action in actions:
            if isinstance(action, Start):
                self._at(self.now, "start", action.client, action.steps)
            elif isinstance(action, Mix):
                report = self._mix_now(action)
            elif isinstance(action, Renew):
                report = self._renewed(action)
            elif isinstance(action, Stop):
                self._stop(action.client)
            else:
                self._at(action.at, "wake", action.token)
        return report

    def _stop(self, client: int) -> None:
        """Forget what a client is at work on; the work and the bytes so far stay counted."""
        self.flights.pop(client, None)
        own = ("start", "finish", "arrive")
        self.events = [e for e in self.events if e.about != client or e.what not in own]
        heapq.heapify(self.events)

    # -- a visit ------------------------------------------------------------------------

    def _start(self, client: int, steps: int | None) -> None:
        """Send the present model; the work begins when it has arrived."""
        opens = self.fleet.opens(self.now, client)
        if opens is None:
            return  # its battery is flat
        if opens > self.now:
            self._at(opens, "start", client, steps)
            return
        who = np.array([client])
        self.visits += 1
        key = seeds.key(self.seed, "async", self.visits)
        down, size, values = self._download(client)
        delivery = self.link.send_many(
            np.array([size]), "down", self.now, key=seeds.fold(key, 1), index=who
        )
        delivery.enter(
            self.ledger, sender=SERVER, receiver=self.named(who), kind="model",
            values=np.array([values]), round=self.round + 1, sequence=who,
        )  # fmt: skip
        visit_key = int(seeds.keys(seeds.key(self.seed, "visit", self.visits), who)[0])
        flight = Flight(client, self.round, steps, self.now, visit_key, down)
        self.flights[client] = flight
        arrived = float(delivery.done[0])
        flight.lost = not delivery.delivered[0]
        working = 0.0 if flight.lost else self._working(flight, arrived)
        self._at(arrived + working, "finish", client)

    def _download(self, client: int) -> tuple[Tree, int, int]:
        """The present model as this client decodes it, and its bytes; encoded once a version."""
        rank = int(self.ranks[client])
        slot = client if self.method.personal_download else rank
        version, made = self._downs
        if version != self.round:
            self._downs = (self.round, made := {})
        if slot not in made:
            axes = self.method.rank_axes() if self.method.slices_download else None
            sent = self.method.send(self.state, Known(client, rank, 0))
            key = seeds.key(self.seed, "download", self.round)
            (made[slot],) = self.path.down([sent], self.round, key, rank, axes)
        return made[slot]

    def _working(self, flight: Flight, begun: float) -> float:
        """Enter the work of a visit; the seconds that it takes."""
        who, cohort = np.array([flight.client]), self._cohort([flight])
        phases = self.method.phases("train")
        gradients = 0.0
        for number, phase in enumerate(phases):
            keys = seeds.keys_of(cohort.keys, number)
            plan = self.ground.plan(self.method, phase, cohort, keys)
            live = plan.weight > 0
            steps, examples = float(live.any(-1).sum()), float(live.sum())
            gradients += self.ground.gradients(phase, steps, examples, 1)
        if any(phase.until is not None for phase in phases):
            gradients = self._compute([flight])
        flops = np.array([gradients * self.flops])
        spent = self.fleet.spend(who, flops, cohort.keys)
        self.fleet.drain(who, spent.joules)
        names = self.named(who)
        self.ledger.later(
            1, "work", sender=names, receiver=names, kind="train", t=np.array([begun]),
            seconds=spent.seconds, joules=spent.joules, flops=flops, round=self.round + 1,
        )  # fmt: skip
        return float(spent.seconds[0])

    def _finish(self, client: int) -> Report | None:
        """A client is done: compute what is pending, and send what this one has."""
        flight = self.flights[client]
        if flight.lost or self.fleet.vanishes(np.array([flight.key]))[0]:
            del self.flights[client]
            return self._act(self.schedule.lost(client, self.now))
        if flight.landed is None:
            pending = [f for f in self.flights.values() if f.landed is None and not f.lost]
            for rate in sorted({self.lr(f.version + 1) for f in pending}):
                self._compute([f for f in pending if self.lr(f.version + 1) == rate])
        landed = flight.landed
        if landed is None:  # the guard has dropped it
            return self._finish(client)
        who = np.array([client])
        delivery = self.link.send_many(
            np.array([landed.bytes]), "up", self.now, key=seeds.fold(flight.key, 4), index=who
        )
        delivery.enter(
            self.ledger, sender=self.named(who), receiver=SERVER, kind="update",
            values=np.array([landed.values]), round=flight.version + 1, sequence=who,
        )  # fmt: skip
        self.fleet.drain(who, delivery.joules)
        for event in landed.events:
            self.ledger.privacy(self.now, self.named(who)[0], event, flight.version + 1)
        if not delivery.delivered[0]:
            flight.lost = True
            self._at(float(delivery.done[0]), "finish", client)
            return None
        self._at(float(delivery.done[0]), "arrive", client)
        return None

    def _arrive(self, client: int) -> Report | None:
        self._diverged.clear()
        flight = self.flights.pop(client)
        assert flight.landed is not None  # it was sent
        self.store.put(np.array([client]), flight.version + 1, flight.landed.kept)
        number, self.uploads = self.uploads, self.uploads + 1
        self.waiting[number] = flight
        arrival = Arrival(number, client, flight.version, flight.steps, self.now - flight.began)
        return self._act(self.schedule.arrived(arrival, self.now))

    def _cohort(self, flights: Sequence[Flight]) -> Cohort:
        clients = np.array([f.client for f in flights])
        versions = np.array([f.version for f in flights])
        told = [f.steps for f in flights]
        return Cohort(
            clients=clients,
            keys=np.array([f.key for f in flights], np.int64),
            ranks=self.ranks[clients],
            versions=versions,
            round=versions + 1,
            lr=self.lr(flights[0].version + 1),
            downs=[f.down for f in flights],
            kept=self.store.get(clients),
            steps=None if None in told else np.array(told),
        )

    def _compute(self, flights: Sequence[Flight]) -> float:
        """Compute these visits together, and what their uploads are; the gradients they took."""
        cohort = self._cohort(flights)
        done = self.executor.run(self.method, self.ground, cohort)
        gradients = float(done.gradients.sum())
        sizes = self.ground.owned.sizes(cohort.clients).tolist()
        done.updates.meta = [
            Meta(f.client, f.version + 1, f.version, size, int(steps), int(rank) or None)
            for f, size, steps, rank in zip(
                flights, sizes, done.steps.tolist(), cohort.ranks.tolist(), strict=True
            )
        ]
        flights, cohort, done = self._sound(flights, cohort, done)
        if not flights:
            return gradients
        held = {name: x for name, x in cohort.kept.items() if name.startswith(MEMORY)}
        done.kept = {**done.kept, **held}
        origin = partial(self.method.origin, self.state, cohort.downs[0], self.round)
        key = seeds.key(self.seed, "attack", self.visits)
        done.updates, events = self.path.protected(done.updates, cohort.keys, key, origin)
        flights, cohort, done = self._sound(flights, cohort, done)  # what an attacker has made
        if not flights:
            return gradients
        sent = self.path.crossed(done.updates, done.kept, cohort.keys, events)
        for row, flight in enumerate(flights):
            flight.landed = Landed(
                sent.updates.take([row]),
                {name: x[row : row + 1] for name, x in sent.kept.items()},
                int(sent.bytes[row]),
                int(sent.values[row]),
                float(done.loss[row]),
                sent.events,
            )
        return gradients

    def _sound(
        self, flights: Sequence[Flight], cohort: Cohort, done: Done
    ) -> tuple[Sequence[Flight], Cohort, Done]:
        """What the guard leaves of some visits; those that it drops are lost.

        Raises `WireError` when all clients have diverged, one after the other, and none arrived.
        """
        updates, good = self.path.sound(done.updates)
        if good is None:
            return flights, cohort, done
        kept = as_it_was(done.kept, cohort.kept, good)
        if len(updates) == len(flights):
            return flights, cohort, replace(done, updates=updates, kept=kept)
        for flight, fine in zip(flights, good.tolist(), strict=True):
            flight.lost = not fine
        self._diverged |= {flight.client for flight in flights if flight.lost}
        if len(self._diverged) == len(self.ground.owned):
            raise nothing_sound()
        rows = np.flatnonzero(good)
        done = replace(replace(done, kept=kept).take(rows), updates=updates)
        return [flight for flight in flights if not flight.lost], cohort.take(rows), done

    # -- a mix --------------------------------------------------------------------------

    def _mix_now(self, mix: Mix) -> Report:
        flights = [self.waiting.pop(number) for number in mix.arrivals]
        rows = [f.landed.updates for f in flights if f.landed is not None]
        updates = joined(rows)
        if mix.from_now:
            shared = self.state["shared"]
            moved = {
                name: x + torch.stack([f.down[name] for f in flights]) - shared[name]
                for name, x in updates.delta.items()
                if name in shared
            }
            updates = updates.with_delta({**updates.delta, **moved})
        return self._stepped(flights, updates, mix.weights)

    def _renewed(self, renew: Renew) -> Report:
        """Renew the cache and take its mean, as an upload of every entry's distance from now."""
        now, everyone = self.state["shared"], np.arange(len(self.ground.owned))
        if not self.cache.entries:
            self.cache.put({k: now for k in everyone.tolist()})
        picked = [self.waiting.pop(number) for number in renew.picked]
        later = [self.waiting.pop(number) for number in renew.later]
        self.cache.put({**{k: now for k in renew.reset}, **_models(picked, now)})
        sizes = self.ground.owned.sizes(everyone).tolist()
        metas = [Meta(k, self.round + 1, self.round, n) for k, n in enumerate(sizes)]
        updates = Updates(delta=self.cache.from_now(now), meta=metas)
        report = self._stepped(picked, updates, renew.weights)
        self.cache.put(_models(later, now))
        return report

    def _stepped(
        self, flights: Sequence[Flight], updates: Updates, given: Sequence[float]
    ) -> Report:
        """The server's step with these uploads and weights; `flights` brought what is new."""
        self.round += 1
        key = seeds.key(self.seed, "round", self.round)
        context = Context(self.round, key, {**self.extras, "down": flights[0].down})
        weights = torch.tensor(given, dtype=torch.float64)
        reduced, used = self.path.reduce(self.method, self.state, updates, context, weights)
        self.state = self.method.server(self.state, reduced, used.meta)
        losses = [f.landed.loss for f in flights if f.landed is not None]
        clients = [f.client for f in flights]
        return Report(
            self.round, self.now, float(np.mean(losses)), {}, clients, used.clients, reduced.diag
        )

    # -- a checkpoint -------------------------------------------------------------------

    def journal(self) -> tuple[dict[str, Any], dict[str, Any]]:
        about, tensors = super().journal()
        downs: dict[int, Tree] = {}  # one download is shared by all that were sent the same

        def place(down: Tree) -> int:
            downs.setdefault(id(down), down)
            return list(downs).index(id(down))

        held = {f"f{client}": flight for client, flight in self.flights.items()}
        held |= {f"w{number}": flight for number, flight in self.waiting.items()}
        version, made = self._downs
        about |= {
            "events": sorted(self.events),
            "counts": [self.scheduled, self.uploads, self.visits, self.begun],
            "flights": [
                [name, place(flight.down), *_about(flight)] for name, flight in held.items()
            ],
            "made": [version, [[slot, place(down), *size] for slot, (down, *size) in made.items()]],
        }
        about["cache"], tensors["cache"] = self.cache.journal()
        tensors["downs"] = {str(i): down for i, down in enumerate(downs.values())}
        for name, flight in held.items():
            if flight.landed is not None:
                parts = {part: getattr(flight.landed.updates, part) for part in PARTS}
                tensors[name] = {"kept": flight.landed.kept, **parts}
        return about, tensors

    def take_up(self, about: dict[str, Any], tensors: dict[str, Any]) -> None:
        super().take_up(about, tensors)
        self.events = [Event(*event) for event in about["events"]]
        self.scheduled, self.uploads, self.visits, self.begun = about["counts"]
        self.cache.take_up(about["cache"], tensors.get("cache", {}))
        downs = tensors.get("downs", {})
        version, made = about["made"]
        self._downs = version, {slot: (downs[str(at)], *size) for slot, at, *size in made}
        for name, at, client, since, steps, began, key, lost, landed in about["flights"]:
            flight = Flight(client, since, steps, began, key, downs[str(at)], lost=lost)
            if landed is not None:
                meta, *numbers = landed
                held = tensors.get(name, {})
                parts: Any = {part: held.get(part, {}) for part in PARTS}
                updates = Updates(**parts, meta=[Meta(*meta)])
                flight.landed = Landed(updates, held.get("kept", {}), *numbers)
            if name[0] == "f":
                self.flights[client] = flight
            else:
                self.waiting[int(name[1:])] = flight


def _models(flights: Sequence[Flight], like: Tree) -> dict[int, Tree]:
    """The models that these visits ended with, by client: those of the tensors in `like`."""
    return {
        f.client: {name: f.down[name] + f.landed.updates.delta[name][0] for name in like}
        for f in flights
        if f.landed is not None
    }


def _about(flight: Flight) -> list[Any]:
    """A flight in JSON, but for its tensors."""
    row = [flight.client, flight.version, flight.steps, flight.began, flight.key, flight.lost]
    if (it := flight.landed) is None:
        return [*row, None]
    return [*row, [list(it.updates.meta[0]), it.bytes, it.values, it.loss, it.events]]


def joined(rows: Sequence[Updates]) -> Updates:
    """Uploads one behind the other, in one record."""
    parts: Any = {part: tree.cat([getattr(row, part) for row in rows]) for part in PARTS}
    return Updates(**parts, meta=[meta for row in rows for meta in row.meta])
