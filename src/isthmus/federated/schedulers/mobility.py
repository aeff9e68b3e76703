"""Peers that move: a few carry models between neighbourhoods, at random or where labels call them.

"Decentralized federated learning with user mobility", ICASSP 2026, arXiv:2505.18866 (random
motion), and its continuation with distribution-aware motion, arXiv:2512.24694. Claims: training
converges in sparse networks thanks to mobility, already a small moving share of the users helps
much, and motion induced by label distributions beats random motion.

Unit square, N peers of which M move, radio range r, at most R_m a round. In round t:

    move:  random    a uniform point in the disc of radius R_m, clipped to the square
           waypoint  R_m towards a random goal; a new goal once it is reached
           dam       to the static peer within R_m whose surroundings make the mix of labels met
                     so far (h <- 0.8 h + met) the most like all labels (L1)
           dcm       the same among the centres of a greedy cover of the static peers by discs of r
    link:  A_ij = 1 if |p_i - p_j| <= r;   W = Metropolis weights of A

(reconstructed): dam and dcm as above, the defaults, and the layout, in which peers of like labels
live near each other. With nothing within R_m a peer moves R_m towards the nearest candidate.
`explore` is the chance of a random move instead, because greedy routes can cycle within an island.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from isthmus import catalogue, seeds
from isthmus.errors import InputError, unknown
from isthmus.federated.schedulers.graph import metropolis

MOTIONS = ("static", "random", "waypoint", "dam", "dcm")
LAYOUTS = ("by-label", "random")
FADING = 0.8


@catalogue.register("mobility", place="schedule", status="miniature")
@dataclass
class Mobility:
    """motion: static, random, waypoint, dam, dcm; mobile: M; r: radio range; move: R_m;
    explore: chance of a random move in dam and dcm; layout: by-label or random.

    `histograms` `[n, classes]` are the peers' label counts.
    """

    population: int
    seed: int
    histograms: np.ndarray
    motion: str = "random"
    mobile: int = 4
    r: float = 0.14
    move: float = 0.5
    explore: float = 0.0
    layout: str = "by-label"
    places: np.ndarray = field(init=False)
    met: np.ndarray = field(init=False)
    goals: np.ndarray = field(init=False)

    kind: ClassVar[str] = "gossip"

    def __post_init__(self) -> None:
        if self.motion not in MOTIONS:
            raise unknown("motion", self.motion, MOTIONS)
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        if not 0 <= self.mobile < self.population:
            raise InputError("mobile", self.mobile, f"0 to {self.population - 1}: some stay")
        if not self.r > 0 or self.move < 0 or not 0 <= self.explore <= 1:
            given = f"r={self.r}, move={self.move}, explore={self.explore}"
            raise InputError("mobility", given, "r above 0, move 0 or more, explore 0 to 1")
        draw = seeds.rng(self.seed, "places")
        places = draw.random((self.population, 2))
        shares = self.histograms / np.maximum(self.histograms.sum(1, keepdims=True), 1)
        if self.layout == "by-label":  # those of the lowest classes live furthest left
            middle = shares @ np.arange(shares.shape[1])
            places = places[np.argsort(places[:, 0])][np.argsort(np.argsort(middle))]
        self.places, self.shares, self.met = places, shares, shares.copy()
        self.movers = np.sort(draw.permutation(self.population)[: self.mobile])
        self.static = np.setdiff1d(np.arange(self.population), self.movers)
        self.goals = draw.random((self.population, 2))
        self.all = self.histograms.sum(0) / max(self.histograms.sum(), 1)
        stays = places[self.static]
        self.spots = cover(stays, self.r) if self.motion == "dcm" else stays

    def mixing(self, round: int) -> np.ndarray:
        """Move, and give W of the new places: float64 `[n, n]`."""
        draw = seeds.rng(self.seed, "motion", round)
        for i in self.movers if self.motion != "static" else ():
            self.places[i] = self._next(i, draw)
        near = self.near()
        for i in self.movers:
            if near[i].any():
                self.met[i] = FADING * self.met[i] + self.shares[near[i]].mean(0)
        return metropolis(near)

    def near(self) -> np.ndarray:
        """Who is in range of whom: bool `[n, n]`, nobody of itself."""
        near = _distances(self.places, self.places) <= self.r
        np.fill_diagonal(near, False)
        return near

    def _next(self, i: int, draw: np.random.Generator) -> np.ndarray:
        here = self.places[i]
        if self.motion == "random" or draw.random() < self.explore:
            angle, radius = draw.random() * 2 * np.pi, self.move * np.sqrt(draw.random())
            away = radius * np.array([np.cos(angle), np.sin(angle)])
            return np.clip(here + away, 0.0, 1.0)
        if self.motion == "waypoint":
            if np.linalg.norm(self.goals[i] - here) < 1e-9:
                self.goals[i] = draw.random(2)
            return _towards(here, self.goals[i], self.move)
        far = np.linalg.norm(self.spots - here, axis=1)
        if not (far <= self.move).any():
            return _towards(here, self.spots[far.argmin()], self.move)
        within = np.flatnonzero(far <= self.move)
        stays = _distances(self.spots[within], self.places[self.static]) <= self.r
        around = stays @ self.shares[self.static] / np.maximum(stays.sum(1, keepdims=True), 1)
        mix = self.met[i] + around
        off = np.abs(mix / mix.sum(1, keepdims=True) - self.all).sum(1)
        return self.spots[within[off.argmin()]].copy()

    def state(self) -> dict[str, Any]:
        held = {"places": self.places, "met": self.met, "goals": self.goals}
        return {name: array.tolist() for name, array in held.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, rows in state.items():
            setattr(self, name, np.array(rows))


def cover(points: np.ndarray, r: float) -> np.ndarray:
    """Points whose discs of radius r cover all, chosen greedily: the most uncovered first."""
    covers = _distances(points, points) <= r
    left, chosen = np.ones(len(points), bool), []
    while left.any():
        best = int((covers & left).sum(1).argmax())
        chosen.append(best)
        left &= ~covers[best]
    return points[chosen]


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=2)


def _towards(here: np.ndarray, goal: np.ndarray, most: float) -> np.ndarray:
    way = goal - here
    far = np.linalg.norm(way)
    return goal.copy() if far <= most else here + way * (most / far)
