"""One small file from which a run continues with the bits, rows and states it had.

Everything else that a run writes is append-only, so the checkpoint holds the server's state and
the lengths of those files; resuming cuts each to its length. It is written beside the old one
and renamed, so that the last good one survives a kill or a full disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from isthmus.errors import InputError
from isthmus.federated.round import Federation
from isthmus.tree import Tree

NAME = "checkpoint.safetensors"
BESIDE = ".new"
"""Ending of a file that is being written and not renamed yet."""
_LEVEL = "//"


def write(folder: Path, fed: Federation, lengths: Mapping[str, int]) -> None:
    """Write the checkpoint of a run; raises `InputError` when the disk is full."""
    tensors = flat(fed.state, "state" + _LEVEL)
    tensors["versions"] = torch.from_numpy(fed.versions)
    journal, held = fed.journal()
    tensors |= flat(held, "journal" + _LEVEL)
    about = {
        "format": 1,
        "journal": journal,
        "round": fed.round,
        "now": fed.now,
        "lengths": dict(lengths),
    }
    about["order"] = list(tensors)  # the file sorts by name; sums must be taken as before
    data = save(
        {name: x.detach().contiguous() for name, x in tensors.items()},
        metadata={"isthmus": json.dumps(about)},
    )
    replace_file(folder / NAME, data)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in place of the file at `path`, whole or not at all."""
    beside = path.with_name(path.name + BESIDE)
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        allowed = f"a disk with {len(data)} bytes free; the last checkpoint is kept"
        raise InputError("checkpoint", f"{path.name}: {error.strerror}", allowed) from error
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> tuple[dict[str, Any], Tree]:
    """What a checkpoint says and holds. Raises `InputError` for a file that is none."""
    path = folder / NAME
    if not path.exists():
        raise InputError("resume", folder, f"a run folder with {NAME}")
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {}).get("isthmus", "null"))
            if not isinstance(about, dict) or about.get("format") != 1:
                raise InputError("resume", path.name, "a checkpoint of a run")
            return about, {name: file.get_tensor(name) for name in about["order"]}
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError("resume", path.name, "a checkpoint of a run") from error


def restore(fed: Federation, about: Mapping[str, Any], tensors: Tree) -> None:
    """Put a checkpoint's state into a federation built from the same configuration.

    Raises `InputError` naming the first tensor that is missing or has another shape.
    """
    expected = flat(fed.state, "state" + _LEVEL)
    for name, x in expected.items():
        if name.startswith(f"state{_LEVEL}log{_LEVEL}"):
            continue
        given = tensors.get(name)
        shown = name.removeprefix("state" + _LEVEL)
        if given is None:
            raise InputError(
                "resume", f"no tensor {shown}", "a checkpoint of this model and method"
            )
        if given.shape != x.shape or given.dtype != x.dtype:
            shapes = f"{list(given.shape)} for {shown}", f"{list(x.shape)}, the model's own"
            raise InputError("resume", *shapes)
    nested = {n: x for n, x in tensors.items() if n.startswith("state" + _LEVEL)}
    empty = {name: held for name, held in fed.state.items() if isinstance(held, dict) and not held}
    fed.state = {**empty, **nest(nested).get("state", {})}
    fed.round, fed.now = int(about["round"]), float(about["now"])
    versions = tensors["versions"].numpy()
    if versions.shape != fed.versions.shape:
        raise InputError("resume", f"{len(versions)} clients", f"{len(fed.versions)}")
    fed.versions = np.array(versions)
    fed.take_up(about["journal"], nest(tensors).get("journal", {}))


def flat(state: Mapping[str, Any], prefix: str = "") -> Tree:
    """Nested trees as one, names joined by `//`."""
    out: Tree = {}
    for name, held in state.items():
        if isinstance(held, torch.Tensor):
            out[prefix + name] = held
        else:
            out |= flat(held, prefix + name + _LEVEL)
    return out


def nest(tensors: Tree) -> dict[str, Any]:
    """The inverse of `flat`."""
    out: dict[str, Any] = {}
    for name, x in tensors.items():
        at = out
        *parents, last = name.split(_LEVEL)
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = x
    return out
