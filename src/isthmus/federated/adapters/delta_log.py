"""The backbone as versioned state: the low-rank changes of each version, for who was away.

Version v + 1 is version v plus one list of pairs per layer. A client that replays the pairs
it missed, in their order, ends with the bits of one that was always there. Once the pairs
since a version outweigh the layer itself, the layer is sent whole, and the pairs that no
client can be sent any more are dropped: a layer's log never outgrows the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.contracts import LowRank
from isthmus.errors import InputError
from isthmus.federated.adapters.product import recompress
from isthmus.tree import Tree


@dataclass(frozen=True)
class _Entry:
    version: int
    pairs: list[LowRank]


class DeltaLog:
    """The changes of layers `[d, k]` (`shapes`) by version; starts at version 0, empty.

    `cap`: joined pairs of more directions than this are recompressed to their own rank before
    they are sent; lossless up to rounding, but no longer the same bits.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], cap: int | None = None) -> None:
        self.shapes, self.cap = dict(shapes), cap
        self.version = 0
        self._entries: dict[str, list[_Entry]] = {layer: [] for layer in shapes}
        self._dropped = dict.fromkeys(shapes, 0)

    def append(self, deltas: Mapping[str, Sequence[LowRank]]) -> int:
        """Record the next version; layers not named did not change. Returns its number."""
        for layer, pairs in deltas.items():
            if layer not in self.shapes:
                raise InputError("layer", layer, ", ".join(self.shapes))
            d, k = self.shapes[layer]
            for left, right in pairs:
                if left.shape != (d, right.shape[0]) or right.shape[1] != k:
                    given = f"{list(left.shape)} and {list(right.shape)}"
                    raise InputError(layer, given, f"[{d}, m] and [m, {k}]")
        self.version += 1
        for layer, pairs in deltas.items():
            if any(left.shape[1] for left, _ in pairs):
                self._entries[layer].append(_Entry(self.version, list(pairs)))
                self._prune(layer)
        return self.version

    def _prune(self, layer: str) -> None:
        """Drop what lies before the point from which the whole layer is the smaller message."""
        d, k = self.shapes[layer]
        values = 0
        entries = self._entries[layer]
        for i in range(len(entries) - 1, -1, -1):
            values += _rank(entries[i].pairs) * (d + k)
            if values > d * k:
                self._dropped[layer] = entries[i].version
                self._entries[layer] = entries[i + 1 :]
                return

    def pairs_since(self, version: int) -> dict[str, list[LowRank] | None]:
        """What a backbone at `version` lacks, by layer, in order; None: send the layer whole.

        Layers that did not change are left out.
        """
        if not 0 <= version <= self.version:
            raise InputError("version", version, f"0 to {self.version}")
        missing: dict[str, list[LowRank] | None] = {}
        for layer, entries in self._entries.items():
            if version < self._dropped[layer]:
                missing[layer] = None
                continue
            pairs = [pair for e in entries if e.version > version for pair in e.pairs]
            if self.cap is not None and _rank(pairs) > self.cap:
                pairs = [recompress(pairs)]
            if pairs:
                missing[layer] = pairs
        return missing

    def values(self, version: int) -> int:
        """Parameters that `pairs_since(version)` puts on the wire."""
        total = 0
        for layer, pairs in self.pairs_since(version).items():
            d, k = self.shapes[layer]
            total += d * k if pairs is None else _rank(pairs) * (d + k)
        return total

    def nbytes(self, version: int, width: int = 4) -> int:
        """Bytes of those values at `width` bytes each, without framing."""
        return self.values(version) * width

    def state(self) -> Tree:
        """The log as named tensors, for a checkpoint."""
        tree = {"version": torch.tensor(self.version)}
        for layer, entries in self._entries.items():
            tree[f"{layer}|dropped"] = torch.tensor(self._dropped[layer])
            for entry in entries:
                for i, (left, right) in enumerate(entry.pairs):
                    tree[f"{layer}|{entry.version}|{i}|left"] = left
                    tree[f"{layer}|{entry.version}|{i}|right"] = right
        return tree

    def load_state(self, tree: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, for a log of the same layers."""
        self.version = int(tree["version"])
        self._dropped = {layer: int(tree[f"{layer}|dropped"]) for layer in self.shapes}
        self._entries = {layer: [] for layer in self.shapes}
        for name in tree:
            layer, *place = name.split("|")
            if len(place) != 3 or place[2] != "left":
                continue
            version, entries = int(place[0]), self._entries[layer]
            if not entries or entries[-1].version != version:
                entries.append(_Entry(version, []))
            pair = LowRank(tree[name], tree[name.removesuffix("left") + "right"])
            entries[-1].pairs.append(pair)


def _rank(pairs: Sequence[LowRank]) -> int:
    return sum(left.shape[1] for left, _ in pairs)
