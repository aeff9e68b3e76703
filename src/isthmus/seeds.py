"""Randomness as an input: every draw is a pure function of (key, position).

A *key* is a 64-bit integer made from what identifies the draw (seed, party, visit,
step). Draws hash (key, position) with the finaliser of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) in plain int64
tensor arithmetic, so the same key gives the same numbers sequentially, under
`torch.vmap` with one key per client, after a resume and on any device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import overload

import numpy as np
import torch
from torch import Tensor

Key = int | Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_STEPS = tuple((np.uint64(by), np.uint64(factor)) for by, factor in ((30, _MIX1), (27, _MIX2)))
_LAST_SHIFT = np.uint64(31)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _word(part: int | str) -> int:
    return _hashed(part) if isinstance(part, str) else int(part) & _MASK


@lru_cache(maxsize=1024)
def _hashed(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * _MIX1 & _MASK
    x = (x ^ (x >> 27)) * _MIX2 & _MASK
    return x ^ (x >> 31)


def key(*parts: int | str) -> int:
    """A 64-bit key (as a signed integer) from integers and words, order kept.

    >>> key(0, "client", 3) == key(0, "client", 3)
    True
    >>> key(0, "client", 3) == key(0, "client", 4)
    False
    """
    state = 0x243F6A8885A308D3
    for part in parts:
        state = _mix((state + _GOLDEN + _word(part)) & _MASK)
    return _signed(state)


def keys(parent: int, children: Sequence[int] | np.ndarray) -> np.ndarray:
    """The keys of many children of one parent: int64 `[n]`, equal to `fold(parent, child)`."""
    words = np.asarray(children, dtype=np.int64).view(np.uint64)
    return _mix_array(words + np.uint64((parent + _GOLDEN) & _MASK))


def keys_of(parents: np.ndarray, child: int) -> np.ndarray:
    """The keys of one child of many parents: int64 `[n]`, equal to `fold(parent, child)`."""
    return _mix_array(parents.view(np.uint64) + np.uint64((child + _GOLDEN) & _MASK))


def keys_grid(parents: np.ndarray, count: int) -> np.ndarray:
    """The keys of children 0 to count - 1 of many parents: int64 `[n, count]`."""
    children = np.arange(count, dtype=np.uint64) + np.uint64(_GOLDEN)
    return _mix_array(parents.view(np.uint64)[:, None] + children)


def bits_of(parents: np.ndarray, count: int) -> np.ndarray:
    """`bits(key, (count,))` of many keys: int64 `[n, count]`."""
    return _mix_array(parents.view(np.uint64)[:, None] + _positions(count))


@lru_cache(maxsize=16)
def _positions(count: int) -> np.ndarray:
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)


def _mix_array(x: np.ndarray) -> np.ndarray:
    """The hashes of the uint64 array `x`, which is written over."""
    for shift, factor in _STEPS:
        x ^= x >> shift
        x *= factor
    x ^= x >> _LAST_SHIFT
    return x.view(np.int64)


@overload
def fold(parent: int, child: int) -> int: ...
@overload
def fold(parent: Tensor, child: int | Tensor) -> Tensor: ...
@overload
def fold(parent: int, child: Tensor) -> Tensor: ...
def fold(parent: Key, child: int | Tensor) -> Key:
    """The key of a child: of integers, or of int64 tensors (one key per client under vmap)."""
    if isinstance(parent, Tensor):
        return _mix_tensor(parent + _signed(_GOLDEN) + child)
    if isinstance(child, Tensor):
        return _mix_tensor(_signed(parent + _GOLDEN) + child)
    return _signed(_mix((parent + _GOLDEN + _word(child)) & _MASK))


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift of int64: the arithmetic one with the copied sign bits masked off."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix_tensor(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def bits(key: Key, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """64 random bits for each position of `shape`, as int64."""
    count = math.prod(shape)
    where = key.device if isinstance(key, Tensor) else device
    position = torch.arange(1, count + 1, dtype=torch.int64, device=where)
    return _mix_tensor(key + position * _signed(_GOLDEN)).view(tuple(shape))


def uniform(key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform draws in [0, 1): multiples of 2^-24 (2^-53 in float64)."""
    digits = 53 if dtype == torch.float64 else 24
    return _shift(bits(key, shape), 64 - digits).to(dtype) * 2.0**-digits


def normal(key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws by Box and Muller, from two 32-bit halves of one hash."""
    raw = bits(key, shape)
    high = (_shift(raw, 32).to(torch.float64) + 0.5) * 2.0**-32
    low = (raw & 0xFFFFFFFF).to(torch.float64) * 2.0**-32
    return (torch.sqrt(-2.0 * torch.log(high)) * torch.cos(2.0 * math.pi * low)).to(dtype)


def permutation(key: Key, n: int) -> Tensor:
    """A random order of 0..n-1 (int64 `[n]`): the order of n hashes."""
    return torch.argsort(bits(key, (n,)), stable=True)


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator for work outside steps, seeded by `key(*parts)`."""
    return torch.Generator().manual_seed(key(*parts) & (_MASK >> 1))


def rng(*parts: int | str) -> np.random.Generator:
    """A numpy generator for work outside steps, seeded by `key(*parts)`."""
    return np.random.default_rng(key(*parts) & _MASK)
