"""Tasks from a `.npz` or a `.csv` file, with a small default model.

npz: arrays `x_train`, `y_train`, `x_test`, `y_test`, or `x` and `y` (a fifth becomes the test
items, drawn by a fixed seed); `group_train` or `group` names the owners. Bytes are divided by
255, other numbers are taken as they are.

csv: one header line; the target is the column `y`, `label` or `target`, else the last; a column
`group`, `owner` or `client` names the owners; all other columns are numbers, standardised with
the mean and deviation of the training rows.

Targets that are words or whole numbers are classes, in sorted order; others are regression.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.models.nets import mlp
from isthmus.tasks.own import OwnTask, of

TARGETS = ("y", "label", "target")
OWNERS = ("group", "owner", "client")


def read(path: Path, hidden: int = 64, **options: Any) -> OwnTask:
    """The task of one file; the model is an MLP with `hidden` units, `options` go to `own.of`.

    Raises `InputError` naming the file, the missing array or the line that is not a number.
    """
    if not path.is_file():
        raise InputError("task", path, "an existing .npz or .csv file")
    train, test, owner = _npz(path) if path.suffix == ".npz" else _csv(path)
    (x, y), (x_test, y_test) = train, test
    wide = int(np.prod(x.shape[1:]))
    if y.dtype.kind in "USiub":
        if y.ndim != 1:
            raise InputError(path.name, f"classes of shape {list(y.shape)}", "one class per item")
        classes, index = np.unique(np.concatenate([y, y_test]), return_inverse=True)
        outputs, loss = len(classes), "cross-entropy"
        y, y_test = index[: len(y)], index[len(y) :]
    else:
        outputs, loss = int(np.prod(y.shape[1:])), "squared-error"
        y, y_test = y.astype(np.float32), y_test.astype(np.float32)
    return of(
        lambda seed: mlp([wide, hidden, outputs], seed=seed),
        (torch.from_numpy(x), torch.from_numpy(y)),
        (torch.from_numpy(x_test), torch.from_numpy(y_test)),
        owner=owner,
        **{"loss": loss, "name": path.stem, **options},
    )


Half = tuple[np.ndarray, np.ndarray]


def _npz(path: Path) -> tuple[Half, Half, Sequence[str] | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, BadZipFile) as error:
        raise InputError(path.name, error, "an archive of arrays without objects") from None
    if "x_train" in arrays:
        names = ("x_train", "y_train", "x_test", "y_test")
        for name in names:
            if name not in arrays:
                raise InputError(path.name, f"no array {name}", ", ".join(names))
        x, y, x_test, y_test = (arrays[name] for name in names)
        owner = arrays.get("group_train")
    elif "x" in arrays and "y" in arrays:
        train, test = _fifth(len(arrays["x"]))
        x, y, x_test, y_test = (arrays[n][part] for part in (train, test) for n in ("x", "y"))
        owner = arrays["group"][train] if "group" in arrays else None
    else:
        raise InputError(
            path.name, ", ".join(arrays), "x and y, or x_train, y_train, x_test, y_test"
        )
    return (_scaled(x), y), (_scaled(x_test), y_test), None if owner is None else owner.tolist()


def _csv(path: Path) -> tuple[Half, Half, Sequence[str] | None]:
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = [row for row in csv.reader(file) if row]
    if len(header) < 2 or not rows:
        raise InputError(path.name, f"{len(header)} columns, {len(rows)} rows", "2 or more columns")
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise InputError(
                f"{path.name} line {line}", f"{len(row)} cells", f"{len(header)} cells"
            )
    target = next((name for name in TARGETS if name in header), header[-1])
    group = next((name for name in OWNERS if name in header and name != target), None)
    cells = dict(zip(header, zip(*rows, strict=True), strict=True))
    y = _target(cells.pop(target))
    owners = None if group is None else cells.pop(group)
    x = np.stack([_numbers(path, name, column) for name, column in cells.items()], axis=1)
    train, test = _fifth(len(rows))
    mean, spread = x[train].mean(0), x[train].std(0)
    x = ((x - mean) / np.where(spread > 0, spread, 1.0)).astype(np.float32)
    owner = None if owners is None else [owners[i] for i in train]
    return (x[train], y[train]), (x[test], y[test]), owner


def _fifth(size: int) -> tuple[np.ndarray, np.ndarray]:
    order = seeds.rng(0, "files", "test").permutation(size)
    held = max(1, size // 5)
    return np.sort(order[held:]), np.sort(order[:held])


def _scaled(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) / (255.0 if x.dtype == np.uint8 else 1.0)


def _target(cells: Sequence[str]) -> np.ndarray:
    for kind in (np.int64, np.float64):
        try:
            return np.asarray(cells).astype(kind)
        except ValueError:
            continue
    return np.asarray(cells)


def _numbers(path: Path, name: str, cells: Sequence[str]) -> np.ndarray:
    for line, cell in enumerate(cells, start=2):
        try:
            float(cell)
        except ValueError:
            raise InputError(f"{path.name} line {line}, column {name}", cell, "a number") from None
    return np.asarray(cells).astype(np.float64)
