"""Many draws at once: the hash of `isthmus.seeds`, in cache-sized pieces, 16 bits a draw."""

from __future__ import annotations

import numpy as np
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


class Lanes:
    """16-bit draws for a matrix of `groups` consecutive rows per key, `columns` wide.

    Draw j of a row is lane j mod 4 of the hash of its place j div 4, the first row of a key
    followed by its next: a function of (key, row, column), however the matrix is cut.
    """

    def __init__(self, keys: Tensor, groups: int, columns: int) -> None:
        self._words = -(-columns // 4)
        firsts = np.arange(groups, dtype=np.uint64) * np.uint64(self._words) * _GOLDEN
        self._starts = (keys.numpy().view(np.uint64)[:, None] + firsts).reshape(-1, 1)

    def block(self, rows: slice, columns: slice) -> np.ndarray:
        """The draws of one block, uint16; a block begins at a multiple of 4 columns."""
        places = np.arange(columns.start // 4 + 1, (columns.stop + 3) // 4 + 1, dtype=np.uint64)
        places *= _GOLDEN
        words = mix(self._starts[rows] + places)
        return words.view(np.uint16)[:, : columns.stop - columns.start]


def hashes(keys: Tensor, columns: int) -> np.ndarray:
    """`seeds.bits(key, (columns,))` for every key, as uint64 `[n, columns]`."""
    places = np.arange(1, columns + 1, dtype=np.uint64) * _GOLDEN
    return mix(keys.numpy().view(np.uint64)[:, None] + places)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), in place."""
    spare = np.empty_like(x)
    for by, factor in ((30, _MIX1), (27, _MIX2)):
        x ^= np.right_shift(x, np.uint64(by), out=spare)
        x *= factor
    x ^= np.right_shift(x, np.uint64(31), out=spare)
    return x
