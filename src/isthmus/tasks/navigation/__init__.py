"""Following instructions through houses: vision-and-language navigation.

An agent stands in a house, a graph of viewpoints, and is told a path in words; at each viewpoint
it sees the views towards the neighbouring ones and goes on or stops. A client is one house.

The synthetic houses (see `world`) have the same layout as R2R and RxR (see `layout`, which names
the files). (reconstructed) Where a real house has more viewpoints than `viewpoints`, an item
holds those nearest to its path; features wider than `width` are projected by one fixed Gaussian
matrix, so that items stay small enough to be columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.errors import InputError
from isthmus.tasks.contract import Card, Size, Stage, Task
from isthmus.tasks.items import Batch, Items, Splits, weighted_mean
from isthmus.tasks.losses import IGNORE, counts, cross_entropy
from isthmus.tasks.navigation import layout
from isthmus.tasks.navigation.agent import Agent, bearing, candidates, new_agent
from isthmus.tasks.navigation.paths import Navigated, pick
from isthmus.tasks.navigation.world import DIMENSIONS, Episode, House, World, draw

HIDDEN: dict[Size, int] = {"tiny": 48, "small": 64, "paper": 256}
UNKNOWN = 1
"""The number of a word that is not in the vocabulary; 0 fills rows up."""


@catalogue.register("navigation", place="task", status="verified")
class Navigation(Task):
    """Columns: `tokens` `[L]`, `start`, `heading` (radians), the house as `positions` `[V, 3]`
    (metres), `neighbours` `[V, C]` (-1: none) and `views` `[V, C, W]` (towards each neighbour),
    and the reference `path` `[P + 1]` (-1 after its end) with `distances` `[V, V]` (metres).

    `words` and `width` are the sizes of vocabulary and views, `steps` the most that an agent
    walks. `tiny` has 4 houses of 12 viewpoints, `small` 12 and `paper` 61 of up to 20. `test` are
    other paths in the houses of `train`, `val` are paths in houses that `train` has not.
    """

    card = Card(
        "navigation",
        problem="navigation",
        source="R2R, arXiv:1711.07280; RxR, arXiv:2010.07954; Matterport3D features",
        licence="R2R MIT; RxR CC BY 4.0; Matterport3D terms of use",
    )
    metric = Navigated()
    input_names = ("tokens", "start", "heading", "positions", "neighbours", "views")
    target_names = ("path", "distances")

    def __init__(
        self,
        words: int = 1024,
        width: int = DIMENSIONS,
        steps: int = 10,
        viewpoints: int = 32,
        longest: int = 80,
    ) -> None:
        self.words, self.width, self.steps = words, width, steps
        self.viewpoints, self.longest = viewpoints, longest

    def synthesise(self, seed: int = 0, size: Size = "small") -> Splits:
        """A world drawn from `seed`."""
        return self.splits(draw(seed, size))

    def load(
        self, root: str | Path | None = None, source: str = "auto", language: str = "en"
    ) -> Splits:
        """The episodes of R2R or RxR under `root`/navigation; `layout` lists the files."""
        return self.splits(layout.read(root, source, language))

    def export_real(self, root: str | Path, source: str = "r2r") -> Path:
        """Write the small world of seed 0 as R2R (or RxR) that `load` reads; returns the folder."""
        return layout.write(draw(0, "small"), root, source)

    def splits(self, world: World) -> Splits:
        """The episodes of a world as items: one for each instruction."""
        return Splits(*_tabled(world, self.words, self.width, self.viewpoints, self.longest))

    def build(self, size: Size = "small", seed: int = 0) -> Agent:
        return new_agent(self.words, self.width, HIDDEN[size], self.steps, seed)

    def stages(self) -> list[Stage]:
        return [Stage("imitate", self.loss, optimiser="adam", lr=0.01, batch_size=32, epochs=2)]

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy (nats) of the reference's steps, an item's weighing as the item."""
        around, shut, action = lesson(batch.columns)
        scores = model.follow(batch["tokens"], around, shut, action)
        losses, weight = cross_entropy(scores, action), counts(batch.weight, action)
        return weighted_mean(losses.reshape(-1), weight.reshape(-1)), {}

    def labels(self, items: Items) -> np.ndarray:
        """The house's number: partitions by label skew the mixture of houses."""
        return np.unique(items.group, return_inverse=True)[1]


def lesson(columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates along the reference path, and which of them it takes.

    Features `[b, P, C + 1, F]`, what to add to scores `[b, P, C + 1]`, actions int64 `[b, P]`:
    -100 after the end and where the next viewpoint is no neighbour.
    """
    path, positions = columns["path"], columns["positions"]
    around, shut, action = [], [], []
    heading = columns["heading"]
    for t in range(path.shape[1] - 1):
        place, after = path[:, t].clamp_min(0), path[:, t + 1]
        seen, closed = candidates(
            place, heading, positions, columns["neighbours"], columns["views"]
        )
        doors = pick(columns["neighbours"], place)
        taken = (doors == after[:, None]) & (doors >= 0)
        stay = torch.full_like(after, doors.shape[1])
        moved = torch.where(taken.any(1), taken.int().argmax(1), IGNORE)
        there = path[:, t] >= 0
        action.append(torch.where(there, torch.where(after < 0, stay, moved), IGNORE))
        heading = torch.where(after < 0, heading, bearing(positions, place, after.clamp_min(0)))
        around.append(seen)
        shut.append(closed)
    return torch.stack(around, 1), torch.stack(shut, 1), torch.stack(action, 1)


# -- from worlds to columns -----------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words and signs of an instruction, in lower case.

    >>> words_of("Turn left, don't stop.")
    ['turn', 'left', ',', "don't", 'stop', '.']
    """
    return re.findall(r"\w+(?:'\w+)*|[^\w\s]", text.lower())


def _tabled(world: World, words: int, width: int, viewpoints: int, longest: int) -> list[Items]:
    told = [world.episodes[split] for split in ("train", "val_unseen", "val_seen")]
    everything = [(each, text) for part in told for each in part for text in each.instructions]
    vocabulary = _vocabulary([text for each in told[0] for text in each.instructions], words)
    used = {each.scan: world.houses[each.scan] for each, _ in everything}
    tables = {scan: _table(house, width) for scan, house in used.items()}
    length = min(longest, max(len(words_of(text)) for _, text in everything))
    shape = (
        min(viewpoints, max(len(house.viewpoints) for house in used.values())),
        max(int(house.edges.sum(1).max()) for house in used.values()),
        max(len(each.path) for each, _ in everything),
    )
    if shape[0] < shape[2]:
        raise InputError("viewpoints", viewpoints, f"{shape[2]} or more, the longest path")
    parts = []
    for part in told:
        rows = []
        for each in part:
            row = _row(each, used[each.scan], tables[each.scan], shape)
            for text in each.instructions:
                ids = [vocabulary.get(word, UNKNOWN) for word in words_of(text)][:length]
                rows.append({"tokens": np.array(ids + [0] * (length - len(ids))), **row})
        columns = {n: torch.from_numpy(np.stack([row[n] for row in rows])) for n in rows[0]}
        owners = [each for each in part for _ in each.instructions]
        parts.append(Items(columns, [e.scan for e in owners], [e.language for e in owners]))
    return parts


def _vocabulary(texts: Sequence[str], words: int) -> dict[str, int]:
    """Numbers from 2 on for the most frequent words."""
    count = Counter(word for text in texts for word in words_of(text))
    ranked = sorted(count, key=lambda word: (-count[word], word))
    return {word: i for i, word in enumerate(ranked[: words - 2], start=2)}


def _table(house: House, width: int) -> np.ndarray:
    """The views from each viewpoint towards every other that it has an edge to: `[n, n, W]`."""
    views = house.views
    if views.shape[-1] != width:
        size = (views.shape[-1], width)
        matrix = seeds.rng(0, "navigation", "projection", *size).normal(0, width**-0.5, size)
        views = views @ matrix.astype(np.float32)
    n = len(house.viewpoints)
    towards = np.zeros((n, n, width), dtype=np.float32)
    for a, b in np.argwhere(house.edges).tolist():
        towards[a, b] = views[a, house.facing(a, b)]
    return towards


def _row(
    each: Episode, house: House, towards: np.ndarray, shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """One episode's columns but its words, from the viewpoints nearest to its path."""
    most, doors, length = shape
    index = {name: i for i, name in enumerate(house.viewpoints)}
    path = [index[name] for name in each.path]
    near = house.distances[path].min(0)
    kept = np.sort(np.argsort(near, kind="stable")[:most])
    n, place = len(kept), {int(v): i for i, v in enumerate(kept)}
    positions = np.zeros((most, 3), dtype=np.float32)
    positions[:n] = house.positions[kept]
    neighbours = np.full((most, doors), -1)
    views = np.zeros((most, doors, towards.shape[-1]), dtype=np.float32)
    for i, v in enumerate(kept):
        open_ = np.flatnonzero(house.edges[v][kept])
        neighbours[i, : len(open_)] = open_
        views[i, : len(open_)] = towards[v, kept[open_]]
    distances = np.zeros((most, most), dtype=np.float32)
    distances[:n, :n] = house.distances[np.ix_(kept, kept)]
    told = np.full(length + 1, -1)
    told[: len(path)] = [place[v] for v in path]
    return {
        "start": np.array(told[0]),
        "heading": np.array(each.heading, dtype=np.float32),
        "positions": positions,
        "neighbours": neighbours,
        "views": views,
        "path": told,
        "distances": distances,
    }
