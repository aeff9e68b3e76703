"""Worlds on disk, as R2R, RxR and the Matterport3D simulator lay them out.

Under `navigation/` of the data folder:

- `connectivity/<scan>_connectivity.json`: a list with one object per viewpoint: `image_id`,
  `pose` (a 4 x 4 matrix row by row; entries 3, 7 and 11 are x, y, z in metres), `included`,
  `unobstructed` (one flag per viewpoint of the list). Others are ignored.
- R2R: `R2R_train.json`, `R2R_val_seen.json`, `R2R_val_unseen.json`: lists of objects with
  `path_id`, `scan`, `heading`, `path`, `instructions`, `distance`.
- RxR: `rxr_train_guide.jsonl.gz`, `rxr_val_seen_guide.jsonl.gz`, `rxr_val_unseen_guide.jsonl.gz`
  (or without `.gz`): lines with `path_id`, `scan`, `heading`, `path`, `instruction`, `language`.
- `features.npz` or `features.safetensors`: one array `[36, D]` per viewpoint under the name
  `<scan>_<viewpoint>`, the views in the simulator's order.

R2R: Anderson et al., CVPR 2018, arXiv:1711.07280. RxR: Ku et al., "Room-across-room", EMNLP 2020,
arXiv:2010.07954. Matterport3D asks for a signed licence; no part of it is shipped.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from isthmus.errors import InputError
from isthmus.tasks.contract import data_file, data_root
from isthmus.tasks.navigation.world import VIEWS, Episode, House, World

FOLDER = "navigation"
SPLITS = ("train", "val_seen", "val_unseen")
R2R, RXR = FOLDER + "/R2R_{}.json", FOLDER + "/rxr_{}_guide.jsonl"
GRAPH = FOLDER + "/connectivity/{}_connectivity.json"
FEATURES = (f"{FOLDER}/features.npz", f"{FOLDER}/features.safetensors")


def read(root: str | Path | None, source: str = "auto", language: str = "en") -> World:
    """The world under `root`: episodes of `source` (`r2r`, `rxr`, `auto`: the one that is there).

    Of RxR, the instructions whose language begins with `language`. Raises `InputError` naming
    the file that is missing, or the file and the field that cannot be read.
    """
    if source not in ("auto", "r2r", "rxr"):
        raise InputError("source", source, "auto, r2r or rxr")
    if source == "auto":
        first = RXR.format("train")
        there = any((data_root(root) / (first + end)).exists() for end in ("", ".gz"))
        plain = (data_root(root) / R2R.format("train")).exists()
        source = "rxr" if there and not plain else "r2r"
    reader = _r2r if source == "r2r" else _rxr
    episodes = {split: list(reader(root, split)) for split in SPLITS}
    if source == "rxr":
        episodes = {s: [e for e in told if e.language.startswith(language)]
                    for s, told in episodes.items()}  # fmt: skip
    if not all(episodes.values()):
        raise InputError("language", language, "one that every split has instructions in")
    scans = sorted({each.scan for told in episodes.values() for each in told})
    with _features(root) as view:
        houses = {scan: _house(root, scan, view) for scan in scans}
    for told in episodes.values():
        for each in told:
            _check(each, houses[each.scan])
    return World(houses, episodes)


def _r2r(root: str | Path | None, split: str) -> Iterator[Episode]:
    path = data_file(root, R2R.format(split))
    for row in _json(path, path.read_text("utf-8")):
        yield _episode(path.name, row, tuple(_get(path.name, row, "instructions", list)), "en")


def _rxr(root: str | Path | None, split: str) -> Iterator[Episode]:
    name = RXR.format(split)
    if (packed := data_root(root) / f"{name}.gz").exists():
        path, text = packed, gzip.decompress(packed.read_bytes()).decode("utf-8")
    else:
        path = data_file(root, name)
        text = path.read_text("utf-8")
    for line in text.split("\n"):
        if line.strip():
            row = _json(path, line)
            words = _get(path.name, row, "instruction", str)
            yield _episode(path.name, row, (words,), _get(path.name, row, "language", str))


def _episode(file: str, row: Any, words: tuple[str, ...], language: str) -> Episode:
    path = tuple(map(str, _get(file, row, "path", list)))
    number, scan = int(_get(file, row, "path_id", int | str)), _get(file, row, "scan", str)
    heading = float(_get(file, row, "heading", int | float))
    return Episode(number, scan, heading, path, words, float(row.get("distance", 0)), language)


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(path.name, error, "JSON") from None


def _get(file: str, row: Any, name: str, kind: Any) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        given = "nothing" if value is None else type(value).__name__
        raise InputError(f"{file}: {name}", given, getattr(kind, "__name__", str(kind)))
    return value


def _house(root: str | Path | None, scan: str, view: Callable[[str], np.ndarray]) -> House:
    path = data_file(root, GRAPH.format(scan))
    rows = _json(path, path.read_text("utf-8"))
    kept = [i for i, row in enumerate(rows) if _get(path.name, row, "included", bool)]
    names = tuple(_get(path.name, rows[i], "image_id", str) for i in kept)
    poses = [_get(path.name, rows[i], "pose", list) for i in kept]
    seen = [_get(path.name, rows[i], "unobstructed", list) for i in kept]
    if any(len(p) != 16 for p in poses) or any(len(s) != len(rows) for s in seen):
        raise InputError(path.name, "a short pose or row", "16 numbers; one flag per viewpoint")
    positions = np.array(poses, dtype=np.float64)[:, [3, 7, 11]]
    edges = np.array(seen, dtype=bool)[:, kept]
    edges = (edges | edges.T) & ~np.eye(len(kept), dtype=bool)
    return House(scan, names, positions, edges, np.stack([view(f"{scan}_{n}") for n in names]))


@contextmanager
def _features(root: str | Path | None) -> Iterator[Callable[[str], np.ndarray]]:
    """What reads one viewpoint's features as float32 `[36, D]`."""
    paths = [p for name in FEATURES if (p := data_root(root) / name).exists()]
    path = paths[0] if paths else data_file(root, FEATURES[0])

    def checked(get: Callable[[str], np.ndarray], names: set[str]) -> Callable[[str], np.ndarray]:
        def view(name: str) -> np.ndarray:
            if name not in names:
                raise InputError(path.name, f"no array {name}", f"one [{VIEWS}, D] per viewpoint")
            found = get(name).astype(np.float32)
            if found.ndim != 2 or len(found) != VIEWS:
                raise InputError(f"{path.name}: {name}", list(found.shape), f"[{VIEWS}, D]")
            return found

        return view

    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            yield checked(arrays.__getitem__, set(arrays.files))
    else:
        with safe_open(path, framework="np") as arrays:
            yield checked(arrays.get_tensor, set(arrays.keys()))


def _check(episode: Episode, house: House) -> None:
    known = set(house.viewpoints)
    lost = [name for name in episode.path if name not in known]
    if lost or len(episode.path) < 2:
        given = lost[0] if lost else f"{len(episode.path)} viewpoints"
        raise InputError(
            f"path {episode.path_id}", given, f"two or more viewpoints of scan {house.scan}"
        )


def write(world: World, root: str | Path, source: str = "r2r") -> Path:
    """Write a world in the layout of `source` (`r2r` or `rxr`); returns its folder."""
    folder = Path(root) / FOLDER
    (folder / "connectivity").mkdir(parents=True, exist_ok=True)
    for scan, house in world.houses.items():
        (Path(root) / GRAPH.format(scan)).write_text(json.dumps(_graph(house)), "utf-8")
    for split, told in world.episodes.items():
        if source == "r2r":
            rows = [{**_row(each), "instructions": list(each.instructions)} for each in told]
            (Path(root) / R2R.format(split)).write_text(json.dumps(rows), "utf-8")
        else:
            rows = [
                {**_row(each), "split": split, "language": "en-US", "instruction": words}
                for each in told
                for words in each.instructions
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            packed = gzip.compress(text.encode("utf-8"), mtime=0)
            (Path(root) / f"{RXR.format(split)}.gz").write_bytes(packed)
    views: Mapping[str, np.ndarray] = {
        f"{house.scan}_{name}": house.views[i]
        for house in world.houses.values()
        for i, name in enumerate(house.viewpoints)
    }
    np.savez(Path(root) / FEATURES[0], allow_pickle=False, **views)
    return folder


def _row(each: Episode) -> dict[str, Any]:
    return {
        "path_id": each.path_id,
        "scan": each.scan,
        "heading": each.heading,
        "path": list(each.path),
        "distance": each.distance,
    }


def _graph(house: House) -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(house.viewpoints):
        pose = np.eye(4)
        pose[:3, 3] = house.positions[i]
        rows.append(
            {
                "image_id": name,
                "pose": pose.reshape(-1).tolist(),
                "included": True,
                "visible": house.edges[i].tolist(),
                "unobstructed": house.edges[i].tolist(),
                "height": 1.5,
            }
        )
    return rows
