"""Houses as graphs of viewpoints, paths through them and the words that tell a path.

A house is a grid of rooms with one viewpoint and one lamp each. All houses show lamps of the same
twelve colours, but each has its own word for every colour: "the red lamp" of one house is what
another calls the blue one. Turns are called the same everywhere. So what an agent must know to
follow an instruction is partly shared by all houses and partly the house's own.

Headings are in radians, clockwise from the y axis, and a panorama is 36 views, 12 headings at
each of the elevations -30, 0 and +30 degrees: the conventions of Anderson et al.,
"Vision-and-language navigation: interpreting visually-grounded navigation instructions in real
environments", CVPR 2018.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from isthmus import seeds
from isthmus.tasks.contract import Size

HEADINGS, VIEWS = 12, 36
COLOURS = (
    "red", "green", "blue", "yellow", "white", "black",
    "brown", "pink", "grey", "orange", "purple", "silver",
)  # fmt: skip
TURNS = ("go straight on", "turn right", "turn around", "turn left")
"""By the number of right angles from the agent's heading, clockwise."""

APPROACHES = ("walk to", "go past", "head for")
ENDINGS = ("stop there", "wait", "stop by the {} lamp")
LANDMARKS = 0.7
"""The share of steps that are told by a lamp, not by a turn."""

DIMENSIONS, NOISE = 32, 0.3
"""Numbers per view (a lamp's are standard normal), and the deviation of the noise on them."""


@dataclass(frozen=True)
class House:
    """A scan: `n` viewpoints, `positions` `[n, 3]` in metres, `edges` `[n, n]` (symmetric).

    `views` `[n, 36, D]` are the features of each panorama; view `12 e + h` looks 30 h degrees
    clockwise from the y axis and 30 (e - 1) degrees up. `table` names each lamp colour (empty in
    a house that was read) and `lamps` `[n]` is the colour of each viewpoint's lamp.
    """

    scan: str
    viewpoints: tuple[str, ...]
    positions: np.ndarray
    edges: np.ndarray
    views: np.ndarray
    table: tuple[str, ...] = ()
    lamps: tuple[int, ...] = ()

    @cached_property
    def _routes(self) -> tuple[np.ndarray, np.ndarray]:
        length = np.linalg.norm(self.positions[:, None] - self.positions[None], axis=-1)
        graph = csr_array(np.where(self.edges, length, 0.0))
        distances, before = dijkstra(graph, directed=False, return_predecessors=True)
        return distances, before

    @property
    def distances(self) -> np.ndarray:
        """Metres along the shortest path between each two viewpoints: `[n, n]`."""
        return self._routes[0]

    def route(self, start: int, goal: int) -> list[int]:
        """The viewpoints of the shortest path."""
        path = [goal]
        while path[-1] != start:
            path.append(int(self._routes[1][start, path[-1]]))
        return path[::-1]

    def bearing(self, a: int, b: int) -> float:
        """The heading from one viewpoint to another."""
        x, y, _ = self.positions[b] - self.positions[a]
        return math.atan2(x, y)

    def facing(self, a: int, b: int) -> int:
        """The view of a's panorama that looks towards b."""
        x, y, z = self.positions[b] - self.positions[a]
        up = round(math.atan2(z, math.hypot(x, y)) / math.radians(30))
        turn = round(self.bearing(a, b) / math.radians(30)) % HEADINGS
        return (min(max(up, -1), 1) + 1) * HEADINGS + turn


@dataclass(frozen=True)
class Episode:
    """A reference path, the heading at its start and one or more instructions that tell it."""

    path_id: int
    scan: str
    heading: float
    path: tuple[str, ...]
    instructions: tuple[str, ...]
    distance: float
    language: str = "en"


@dataclass(frozen=True)
class World:
    """Houses by scan, and episodes by split: `train`, `val_seen` (the same houses, other paths)
    and `val_unseen` (other houses)."""

    houses: dict[str, House]
    episodes: dict[str, list[Episode]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How large a world is: grids of rooms to choose from, houses, moves of a path, paths."""

    grids: Sequence[tuple[int, int]]
    houses: int
    unseen: int
    moves: tuple[int, int]
    paths: int


PLANS: dict[Size, Plan] = {
    "tiny": Plan([(3, 4)], 4, 1, (2, 4), 72),
    "small": Plan([(3, 4), (3, 5), (4, 4), (3, 6), (4, 5)], 12, 3, (3, 6), 120),
    "paper": Plan([(3, 4), (3, 5), (4, 4), (3, 6), (4, 5)], 61, 11, (3, 6), 120),
}
HELD_OUT = 4
"""One in so many paths of a house is no training path."""


def draw(seed: int, size: Size) -> World:
    """A world of one size, a pure function of the seed."""
    plan = PLANS[size]
    world = World({}, {"train": [], "val_seen": [], "val_unseen": []})
    for number in range(plan.houses + plan.unseen):
        rng = seeds.rng(seed, "navigation", size, number)
        house = _house(f"house{number:02d}", plan, rng)
        world.houses[house.scan] = house
        told = _episodes(house, plan, rng, 1000 * number)
        held = len(told) // HELD_OUT
        if number < plan.houses:
            world.episodes["val_seen"] += told[:held]
            world.episodes["train"] += told[held:]
        else:
            world.episodes["val_unseen"] += told[:held]
    return world


def _house(scan: str, plan: Plan, rng: np.random.Generator) -> House:
    rows, columns = plan.grids[int(rng.integers(len(plan.grids)))]
    n = rows * columns
    gaps = [np.cumsum(np.round(rng.uniform(2.2, 4.5, size), 2)) for size in (columns, rows)]
    x, y = (grid.reshape(-1) for grid in np.meshgrid(*gaps))
    positions = np.round(np.stack([x, y, rng.uniform(-0.2, 0.2, n)], 1), 2)
    edges = _doors(rows, columns, rng)
    lamps = _lamps(edges, rng)
    views = rng.normal(0.0, NOISE, (n, VIEWS, DIMENSIONS)).astype(np.float32)
    looks = _looks()
    table = tuple(COLOURS[i] for i in rng.permutation(len(COLOURS)))
    names = tuple(f"{scan}v{i:02d}" for i in range(n))
    house = House(scan, names, positions, edges, views, table, tuple(lamps))
    for a, b in np.argwhere(edges).tolist():
        views[a, house.facing(a, b)] += looks[lamps[b]]
    return house


def _looks() -> np.ndarray:
    """What a lamp of each colour looks like, in every house: float32 `[12, D]`."""
    shape = (len(COLOURS), DIMENSIONS)
    return seeds.rng(0, "navigation", "lamps").normal(size=shape).astype(np.float32)


def _doors(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """A random spanning tree of the grid, and two in five of the other walls opened."""
    room = np.arange(rows * columns).reshape(rows, columns)
    walls = [*zip(room[:, :-1].flat, room[:, 1:].flat, strict=True)]
    walls += [*zip(room[:-1].flat, room[1:].flat, strict=True)]
    joined = np.arange(rows * columns)
    edges = np.zeros((rows * columns, rows * columns), dtype=bool)
    for i in rng.permutation(len(walls)):
        a, b = walls[i]
        if joined[a] != joined[b]:
            joined[joined == joined[a]] = joined[b]
        elif rng.random() > 0.4:
            continue
        edges[a, b] = edges[b, a] = True
    return edges


def _lamps(edges: np.ndarray, rng: np.random.Generator) -> list[int]:
    """A colour for each viewpoint; no two neighbours of one viewpoint have the same."""
    near = (edges.astype(int) @ edges.astype(int)) > 0
    lamps = [-1] * len(edges)
    for i in rng.permutation(len(edges)):
        taken = {lamps[j] for j in np.flatnonzero(near[i])}
        lamps[i] = int(rng.choice([c for c in range(len(COLOURS)) if c not in taken]))
    return lamps


def _episodes(house: House, plan: Plan, rng: np.random.Generator, first: int) -> list[Episode]:
    """Shortest paths between random viewpoints, each told twice."""
    n = len(house.viewpoints)
    routes = [house.route(a, b) for a in range(n) for b in range(n) if a != b]
    least, most = plan.moves
    routes = [route for route in routes if least < len(route) <= most + 1]
    told = []
    for number, i in enumerate(rng.permutation(len(routes))[: plan.paths]):
        path, heading = routes[i], math.pi / 2 * int(rng.integers(4))
        words = tuple(tell(house, path, heading, rng) for _ in range(2))
        names = tuple(house.viewpoints[v] for v in path)
        length = round(float(house.distances[path[0], path[-1]]), 2)
        told.append(Episode(first + number, house.scan, heading, names, words, length))
    return told


def tell(house: House, path: Sequence[int], heading: float, rng: np.random.Generator) -> str:
    """An instruction: for each move a turn, or the next lamp by its name in this house."""
    phrases = []
    for a, b in pairwise(path):
        bearing = house.bearing(a, b)
        if rng.random() < LANDMARKS:
            colour = house.table[house.lamps[b]]
            phrases.append(f"{rng.choice(APPROACHES)} the {colour} lamp")
        else:
            phrases.append(TURNS[round((bearing - heading) / (math.pi / 2)) % 4])
        heading = bearing
    ending = str(rng.choice(ENDINGS)).format(house.table[house.lamps[path[-1]]])
    return ", ".join([*phrases, ending]).capitalize() + "."
