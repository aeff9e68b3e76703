"""FedCompass: step counts are handed out so that clients of unlike speed come back together.

Li, Chaturvedi, He, Chen, Singh, Hong, Bourouiba, Kim, Kim, "FedCompass: efficient cross-silo
federated learning on heterogeneous client devices using a computing power-aware scheduler",
ICLR 2024, arXiv:2309.14675, algorithms 1 to 3. Claim: faster convergence and higher accuracy than
other asynchronous algorithms, more efficient than synchronous ones. The schedule is held against a
trace by hand; it was seen to beat FedAvg and FedAsync, and not FedBuff (`claims/fedcompass.py`).

    first return:  s = t / Qmax; mix at once
    later:         s <- (1 - m) s + m elapsed / steps
    join:          over the groups, Q = floor((expected - t) / s); the largest in [Qmin, Qmax]
    create:        over the groups not past their latest, Q = floor((latest + s_f Qmax - t) / s),
                   s_f the speed of its fastest member; the largest up to Qmax, at least Qmin
                   expected = t + Q s;   latest = t + f Q s
    mix:           w <- w + sum_i alpha st(u_i) / N D_i    when all members are there, or at latest

An upload after its group's latest time waits for the next group. s is in seconds a step, so the
fastest client has the smallest. st falls with staleness; the authors' released configuration
has it rise (exponent +0.5 where the text has -0.5), which is not followed. Ties in time go in the
order of scheduling.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.federated.schedule import Action, Arrival, Mix, Start, Wake, staleness


@dataclass
class Group:
    """Clients that are to come back together: when they should, and when they must have."""

    expected: float
    latest: float
    members: list[int]
    arrived: list[int] = field(default_factory=list)


@catalogue.register("fedcompass", place="schedule", status="not-reproduced")
@dataclass
class FedCompass:
    """qmin, qmax: steps a client may be given; f: how far `latest` lies behind `expected`;
    m: momentum of the speeds; alpha, rule, a, b: weight of an update and how it falls with
    staleness. All clients take part."""

    population: int
    qmin: int = 20
    qmax: int = 100
    f: float = 1.5
    m: float = 0.9
    alpha: float = 0.9
    rule: str = "polynomial"
    a: float = 0.5
    b: float = 4.0
    version: int = field(default=0, init=False)
    speeds: dict[int, float] = field(default_factory=dict, init=False)
    steps: dict[int, int] = field(default_factory=dict, init=False)
    groups: dict[int, Group] = field(default_factory=dict, init=False)
    made: int = field(default=0, init=False)
    late: list[tuple[int, int]] = field(default_factory=list, init=False)
    buffers: dict[int, list[tuple[int, int]]] = field(default_factory=dict, init=False)

    kind: ClassVar[str] = "async"

    def __post_init__(self) -> None:
        if not 1 <= self.qmin <= self.qmax:
            raise InputError("qmin", self.qmin, f"1 to qmax ({self.qmax})")
        if self.f < 1:
            raise InputError("f", self.f, "1 or more")
        if not 0 < self.m <= 1:
            raise InputError("m", self.m, "above 0, at most 1")
        if self.rule not in ("polynomial", "hinge", "constant"):
            raise InputError("rule", self.rule, "polynomial, hinge, constant")

    def begin(self, now: float) -> list[Action]:
        return [self._start(client, self.qmax) for client in range(self.population)]

    def arrived(self, arrival: Arrival, now: float) -> list[Action]:
        client, upload = arrival.client, (arrival.number, arrival.version)
        speed = arrival.seconds / self.steps[client]
        if client not in self.speeds:
            self.speeds[client] = speed
            return [self._mixed([upload]), *self.assign(client, now)]
        self.speeds[client] = (1 - self.m) * self.speeds[client] + self.m * speed
        number = self._group_of(client)
        if number is None:
            self.late.append(upload)
            return self.assign(client, now)
        group = self.groups[number]
        group.arrived.append(client)
        self.buffers[number].append(upload)
        return self._close(number, now) if len(group.arrived) == len(group.members) else []

    def lost(self, client: int, now: float) -> list[Action]:
        """The others of its group no longer wait for it, and it starts anew."""
        actions: list[Action] = []
        number = self._group_of(client)
        if number is not None:
            group = self.groups[number]
            group.members.remove(client)
            if len(group.arrived) == len(group.members):
                actions = self._close(number, now)
        if client not in self.speeds:
            return [*actions, self._start(client, self.qmax)]
        return [*actions, *self.assign(client, now)]

    def woken(self, token: int, now: float) -> list[Action]:
        """The latest time of a group: it is mixed with whoever has arrived."""
        return self._close(token, now) if token in self.groups else []

    def assign(self, client: int, now: float) -> list[Action]:
        """Give the client a group and as many steps as bring it back with that group."""
        return self._join(client, now) or self._create(client, now)

    def _join(self, client: int, now: float) -> list[Action]:
        s = self.speeds[client]
        fits = {number: _floor((g.expected - now) / s) for number, g in self.groups.items()}
        fits = {number: q for number, q in fits.items() if self.qmin <= q <= self.qmax}
        if not fits:
            return []
        best = max(fits, key=lambda number: fits[number])
        self.groups[best].members.append(client)
        return [self._start(client, fits[best])]

    def _create(self, client: int, now: float) -> list[Action]:
        s = self.speeds[client]
        reach = []
        for group in self.groups.values():
            if now <= group.latest:
                fastest = min(self.speeds[member] for member in group.members)
                reach.append(_floor((group.latest + fastest * self.qmax - now) / s))
        fits = [q for q in reach if q <= self.qmax]
        q = max(self.qmin, max(fits)) if fits else self.qmax
        self.made += 1
        group = Group(now + q * s, now + self.f * q * s, [client])
        self.groups[self.made], self.buffers[self.made] = group, []
        return [self._start(client, q), Wake(group.latest, self.made)]

    def _close(self, number: int, now: float) -> list[Action]:
        """Mix a group with what came late to others; its members start again, fastest first."""
        group, uploads = self.groups.pop(number), self.buffers.pop(number)
        uploads, self.late = [*uploads, *self.late], []
        actions: list[Action] = [self._mixed(uploads)] if uploads else []
        for client in sorted(group.arrived, key=lambda member: self.speeds[member]):
            actions += self.assign(client, now)
        return actions

    def _mixed(self, uploads: list[tuple[int, int]]) -> Mix:
        weights = [
            self.alpha / self.population * staleness(self.rule, self.a, self.b, self.version - v)
            for _, v in uploads
        ]
        self.version += 1
        return Mix(tuple(number for number, _ in uploads), tuple(weights))

    def _group_of(self, client: int) -> int | None:
        for number, group in self.groups.items():
            if client in group.members and client not in group.arrived:
                return number
        return None

    def _start(self, client: int, steps: int) -> Start:
        self.steps[client] = steps
        return Start(client, steps)

    def state(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "speeds": list(self.speeds.items()),
            "steps": list(self.steps.items()),
            "groups": [(number, asdict(group)) for number, group in self.groups.items()],
            "made": self.made,
            "late": self.late,
            "buffers": list(self.buffers.items()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.version, self.made = state["version"], state["made"]
        self.speeds = {client: speed for client, speed in state["speeds"]}
        self.steps = {client: steps for client, steps in state["steps"]}
        self.groups = {number: Group(**group) for number, group in state["groups"]}
        self.late = [(number, version) for number, version in state["late"]]
        self.buffers = {
            number: [(upload, version) for upload, version in held]
            for number, held in state["buffers"]
        }


def _floor(steps: float) -> int:
    """Whole steps; what is a whole number but for rounding counts as that number."""
    return math.floor(steps + 1e-9)
