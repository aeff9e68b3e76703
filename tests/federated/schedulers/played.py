"""A schedule alone on a clock: no model, no data, only who works how long."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, NamedTuple

from isthmus.federated.schedule import Action, Arrival, Mix, Renew, Start, Stop, Wake


class Mixed(NamedTuple):
    """A mix of the trace: when, whose, how old, after how many steps, with which weights."""

    time: float
    clients: tuple[int, ...]
    staleness: tuple[int, ...]
    steps: tuple[int | None, ...]
    weights: tuple[float, ...]
    reset: tuple[int, ...] = ()
    later: tuple[int, ...] = ()


def play(
    schedule: Any,
    seconds: Callable[[int, int | None, int], float],
    until: float,
    lost: Callable[[int], bool] = lambda visit: False,
) -> list[Mixed]:
    """The mixes up to a time; `seconds(client, steps, visit)` is how long a visit takes."""
    queue: list[tuple[float, int, str, Any]] = []
    out: list[Mixed] = []
    uploads: dict[int, Arrival] = {}
    order = visits = version = 0
    mixed: set[int] = set()

    def at(time: float, what: str, about: Any) -> None:
        nonlocal order
        heapq.heappush(queue, (time, order, what, about))
        order += 1

    def act(actions: list[Action], now: float) -> None:
        nonlocal version
        assert sum(isinstance(a, Mix | Renew) for a in actions) <= 1
        for action in actions:
            if isinstance(action, Start):
                at(now, "start", action)
            elif isinstance(action, Wake):
                assert action.at >= now
                at(action.at, "wake", action.token)
            elif isinstance(action, Stop):
                busy.remove(action.client)
                ended = [e for e in queue if e[2] == "end" and e[3][0].client == action.client]
                assert len(ended) == 1
                queue.remove(ended[0])
                heapq.heapify(queue)
            else:
                renew = isinstance(action, Renew)
                numbers = action.picked if renew else action.arrivals
                others = action.later if renew else ()
                gone = [uploads[number] for number in numbers]
                assert not mixed & {*numbers, *others}, "mixed twice"
                mixed.update(numbers, others)
                ages = tuple(version - a.version for a in gone)
                who, steps = tuple(a.client for a in gone), tuple(a.steps for a in gone)
                later = tuple(uploads[number].client for number in others)
                reset = action.reset if renew else ()
                out.append(Mixed(now, who, ages, steps, action.weights, reset, later))
                version += 1

    busy: set[int] = set()
    act(schedule.begin(0.0), 0.0)
    while queue and queue[0][0] <= until:
        now, _, what, about = heapq.heappop(queue)
        if what == "start":
            assert about.client not in busy, "started twice"
            busy.add(about.client)
            visits += 1
            ends = now + seconds(about.client, about.steps, visits)
            at(ends, "end", (about, version, now, visits))
        elif what == "end":
            start, began_at, began, visit = about
            busy.discard(start.client)
            if lost(visit):
                act(schedule.lost(start.client, now), now)
                continue
            number = len(uploads)
            uploads[number] = Arrival(number, start.client, began_at, start.steps, now - began)
            act(schedule.arrived(uploads[number], now), now)
        else:
            act(schedule.woken(about, now), now)
    return out
