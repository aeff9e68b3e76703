"""What clients keep between visits: append-only, and free for a client never visited.

On disk a put is one block: `ISTK`, the length of a JSON header, the header (round, clients,
tensors) and the rows, one a client. A later row of a client replaces the earlier one; the file
is rewritten without the dead rows only when the caller says so (at a checkpoint).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.errors import InputError
from isthmus.tree import Tree

_MAGIC = b"ISTK"
_HEAD = struct.Struct("<4sI")
_LONGEST_HEADER = 1 << 26
_WORTH_COMPACTING = 1 << 26


class ClientStore:
    """The kept tensors of many clients, of one shape each; `initial` for those never put.

    Without a `path` rows stay in memory. Raises `InputError` for a file that is not a store of
    these tensors.
    """

    def __init__(self, initial: Mapping[str, torch.Tensor], path: Path | None = None) -> None:
        self.initial: Tree = dict(initial)
        self.path = path
        self._sizes = {name: x.numel() * x.element_size() for name, x in self.initial.items()}
        self._row = sum(self._sizes.values())
        self._where: dict[int, Any] = {}
        self._length = 0
        self._file: int | None = None
        if path is not None:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._scan()

    @property
    def length(self) -> int:
        """Bytes of the file that are part of the store."""
        return self._length

    def __len__(self) -> int:
        """How many clients have a row of their own."""
        return len(self._where)

    def get(self, clients: np.ndarray) -> Tree:
        """The kept tensors of these clients, stacked `[n, *shape]`."""
        if not self.initial:
            return {}
        first = _bytes(self.initial)
        raw = np.empty((len(clients), self._row), np.uint8)
        for i, client in enumerate(clients.tolist()):
            place = self._where.get(client)
            if place is None:
                raw[i] = first
            elif self._file is None:
                raw[i] = place
            else:
                raw[i] = np.frombuffer(os.pread(self._file, self._row, place), np.uint8)
        out, at = {}, 0
        for name, x in self.initial.items():
            part = torch.from_numpy(np.ascontiguousarray(raw[:, at : at + self._sizes[name]]))
            out[name] = part.view(x.dtype).view(len(clients), *x.shape)
            at += self._sizes[name]
        return out

    def put(self, clients: np.ndarray, round: int, kept: Mapping[str, torch.Tensor]) -> None:
        """Remember the rows of these clients."""
        if not self.initial or not len(clients):
            return
        parts = [
            kept[name].detach().contiguous().reshape(len(clients), -1).view(torch.uint8).numpy()
            for name in self.initial
        ]
        rows = np.concatenate([part.reshape(len(clients), -1) for part in parts], axis=1)
        if self._file is None:
            for i, client in enumerate(clients.tolist()):
                self._where[client] = rows[i].copy()
            return
        self._append(round, clients.tolist(), rows)

    def _append(self, round: int, clients: list[int], rows: np.ndarray) -> None:
        assert self._file is not None  # only called with a file
        head = json.dumps({"round": round, "clients": clients, "tensors": self._layout()}).encode()
        block = _HEAD.pack(_MAGIC, len(head)) + head
        _write(self._file, block + rows.tobytes(), self._length)
        start = self._length + len(block)
        for i, client in enumerate(clients):
            self._where[client] = start + i * self._row
        self._length = start + rows.size

    def _layout(self) -> list[list[Any]]:
        return [[n, str(x.dtype), list(x.shape)] for n, x in self.initial.items()]

    def resume(self, length: int) -> None:
        """Forget everything after the first `length` bytes of the file."""
        if self._file is None:
            raise InputError("store", "in memory", "a store on disk to resume")
        os.ftruncate(self._file, length)
        self._scan()
        if self._length != length:
            raise InputError("store", f"{self._length} bytes", f"{length} bytes")

    def _scan(self) -> None:
        """Rebuild the index from the headers; a block cut short at the end is left out."""
        assert self._file is not None  # only called with a file
        self._where, at = {}, 0
        size = os.fstat(self._file).st_size
        wrong = InputError("store", self.path, "a file of client states")
        while at + _HEAD.size <= size:
            magic, long = _HEAD.unpack(os.pread(self._file, _HEAD.size, at))
            if magic != _MAGIC or long > _LONGEST_HEADER:
                raise wrong
            start = at + _HEAD.size + long
            if start > size:
                break
            try:
                head = json.loads(os.pread(self._file, long, at + _HEAD.size))
                end = start + len(head["clients"]) * self._row
                other = head["tensors"]
            except (ValueError, KeyError, TypeError):
                raise wrong from None
            if other != self._layout():
                raise InputError("store", _shapes(other), f"the shapes {_shapes(self._layout())}")
            if end > size:
                break
            for i, client in enumerate(head["clients"]):
                self._where[client] = start + i * self._row
            at = end
        if at < size:  # what a writer did not finish must not stand behind the next block
            os.ftruncate(self._file, at)
        self._length = at

    def compacted(self, path: Path) -> ClientStore:
        """A new store at `path` with the living rows only; this one is left as it is."""
        other = ClientStore(self.initial, path)
        clients = np.array(sorted(self._where), dtype=np.int64)
        for start in range(0, len(clients), 256):
            part = clients[start : start + 256]
            other.put(part, 0, self.get(part))
        return other

    @property
    def worth_compacting(self) -> bool:
        """True when most of a large file is dead rows."""
        return self._length > max(_WORTH_COMPACTING, 4 * len(self._where) * self._row)

    def sync(self) -> None:
        """Make everything put so far survive a loss of power."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _bytes(tensors: Tree) -> np.ndarray:
    parts = [
        x.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for x in tensors.values()
    ]
    return np.concatenate([part.reshape(-1) for part in parts])


def _write(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done


def _shapes(tensors: list[list[Any]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, _, shape in tensors[:3])
