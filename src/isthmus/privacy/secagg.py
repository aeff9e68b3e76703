"""Secure aggregation: the server learns the sum of the uploads and nothing about a single one.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth, "Practical secure
aggregation for privacy-preserving machine learning", CCS 2017, figure 4 (a server
that is honest but curious).

    keys:    u draws (c_u, C_u), (s_u, S_u) and sends C_u, S_u
    shares:  u draws b_u, and sends every v a share of b_u and of s_u, encrypted under c_u C_v;
             any t of n shares give the secret back (Shamir), fewer say nothing
    masked:  y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_u S_v) - sum_{v < u} PRG(s_u S_v)   mod R
    unmask:  of those who have sent, t or more give the shares of their b, and of the s of those who
             have not; the server takes what is left of the masks off the sum

x are integers mod R = 2^32: weighted uploads on one scale that all share, w_u round(u / S
levels), and behind them the weight itself, so that neither is known of a single client. Key
agreement is X25519, the pseudo-random generator ChaCha20, the encryption ChaCha20-Poly1305 (of the
library `cryptography`; the sealed shares are counted, not sent, where all parties are in one
process). In a simulation secrets come from the run's seed; a deployment draws them from the
operating system.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from isthmus import catalogue
from isthmus.errors import InputError, need

PRIME = 2**521 - 1
"""Of the field of the shares: a Mersenne prime above every 256-bit secret."""

SHARE = 2 + 66
"""Bytes of a share: its index and an element of the field."""

SEALED = 2 * SHARE + 12 + 16
"""Bytes of two encrypted shares: with nonce and tag."""


@catalogue.register("secagg", place="mechanism", status="verified")
@dataclass(frozen=True)
class SecAgg:
    """threshold: share of the clients whose uploads must arrive; bits: of an integer code."""

    threshold: float = 0.6
    bits: int = 16

    def __post_init__(self) -> None:
        if not 0.5 < self.threshold <= 1:
            raise InputError("threshold", self.threshold, "above 0.5, at most 1")
        if not 2 <= self.bits <= 24:
            raise InputError("bits", self.bits, "2 to 24")
        need("cryptography", "trust")

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def meet(self, clients: Sequence[int], seed: int) -> Meeting:
        """The clients of a round agree on keys and hand out shares."""
        least = math.ceil(self.threshold * len(clients) - 1e-9)
        return Meeting(tuple(clients), max(2, least) if len(clients) > 1 else 1, seed)


@dataclass
class Meeting:
    """One round's keys and shares. Everybody here has handed out its shares; who then does not send
    has dropped out.

    `up` and `down` are the bytes of a client's messages before the masked upload: public keys, then
    sealed shares for each of the others.
    """

    clients: tuple[int, ...]
    threshold: int
    seed: int
    _seeds: dict[tuple[int, int], bytes] = field(default_factory=dict)

    @property
    def up(self) -> tuple[int, int]:
        """Bytes that a client sends: its two keys, then the shares."""
        return 2 * 32, SEALED * (len(self.clients) - 1)

    @property
    def down(self) -> tuple[int, int]:
        """Bytes that a client receives: everybody's keys, then the shares meant for it."""
        return 2 * 32 * len(self.clients), SEALED * (len(self.clients) - 1)

    def closing(self) -> tuple[int, int]:
        """Bytes that a survivor sends and receives at the end: shares of all, the list of all."""
        return SHARE * len(self.clients), 4 * len(self.clients)

    def secret(self, client: int, what: str) -> bytes:
        """32 bytes that only this client knows: its keys `c` and `s`, its seed `b`."""
        return hashlib.sha256(f"{self.seed}/{client}/{what}".encode()).digest()

    @cached_property
    def public(self) -> dict[int, Any]:
        """S_u, which everybody knows."""
        x25519 = need("cryptography.hazmat.primitives.asymmetric.x25519", "trust")
        make = x25519.X25519PrivateKey.from_private_bytes
        return {u: make(self.secret(u, "s")).public_key() for u in self.clients}

    @cached_property
    def shares(self) -> dict[tuple[int, str], list[tuple[int, int]]]:
        """The shares of each client's b and s, one for every client in turn."""
        out = {}
        for u in self.clients:
            for what in ("b", "s"):
                key = hashlib.sha512(self.secret(u, f"shares of {what}")).digest()
                whole = int.from_bytes(self.secret(u, what), "big")
                out[u, what] = share(whole, self.threshold, len(self.clients), key)
        return out

    def mask(self, codes: np.ndarray, senders: Sequence[int]) -> np.ndarray:
        """y of each sender: uint32 `[n, d]` from uint32 codes `[n, d]`."""
        out = codes.astype(np.uint32)
        for row, u in enumerate(senders):
            out[row] += self._own(self.secret(u, "b"), codes.shape[1])
            for v in self.clients:
                if v != u:
                    pair = (min(u, v), max(u, v))
                    if pair not in self._seeds:  # both ends agree on the same
                        self._seeds[pair] = self.agreed(v, self.secret(u, "s"))
                    out[row] += signed(self._seeds[pair], u < v, codes.shape[1])
        return out

    def unmask(self, total: np.ndarray, arrived: Sequence[int]) -> np.ndarray:
        """The sum of the codes of those in `arrived`, from the sum of what they sent: uint32 `[d]`.

        Raises `InputError` when fewer than the threshold have arrived: nothing is learned then.
        """
        if len(arrived) < self.threshold:
            given = f"{len(arrived)} of {len(self.clients)} uploads"
            raise InputError("secure aggregation", given, f"{self.threshold} or more (threshold)")
        helpers = [self.clients.index(u) for u in arrived][: self.threshold]
        out = total.astype(np.uint32)
        for u in arrived:
            b = recover([self.shares[u, "b"][i] for i in helpers])
            out -= self._own(b.to_bytes(32, "big"), len(out))
        for v in set(self.clients) - set(arrived):
            s = recover([self.shares[v, "s"][i] for i in helpers]).to_bytes(32, "big")
            for u in arrived:
                out += signed(self.agreed(u, s), v < u, len(out))
        return out

    def _own(self, b: bytes, d: int) -> np.ndarray:
        return stream(hashlib.sha256(b"own" + b).digest(), d)

    def agreed(self, v: int, s: bytes) -> bytes:
        """The seed that the owner of the secret key `s` has in common with client v."""
        x25519 = need("cryptography.hazmat.primitives.asymmetric.x25519", "trust")
        exchanged = x25519.X25519PrivateKey.from_private_bytes(s).exchange(self.public[v])
        return hashlib.sha256(b"pair" + exchanged).digest()


def signed(key: bytes, plus: bool, d: int) -> np.ndarray:
    """The mask of a pair as the lower (`plus`) or the higher of the two adds it."""
    mask = stream(key, d)
    return mask if plus else np.uint32(0) - mask


def stream(key: bytes, d: int) -> np.ndarray:
    """d numbers mod 2^32 from ChaCha20 under a fresh key of 32 bytes: uint32 `[d]`."""
    ciphers = need("cryptography.hazmat.primitives.ciphers", "trust")
    made = ciphers.Cipher(ciphers.algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(made.update(bytes(4 * d)), "<u4").astype(np.uint32)


def share(secret: int, threshold: int, n: int, key: bytes) -> list[tuple[int, int]]:
    """n points of a random polynomial of degree threshold - 1 whose value at 0 is the secret
    (Shamir, "How to share a secret", CACM 1979)."""
    terms = [secret]
    for i in range(1, threshold):
        drawn = hashlib.shake_256(key + i.to_bytes(4, "big")).digest(72)
        terms.append(int.from_bytes(drawn, "big") % PRIME)
    points = []
    for x in range(1, n + 1):
        value = 0
        for term in reversed(terms):
            value = (value * x + term) % PRIME
        points.append((x, value))
    return points


def recover(points: Sequence[tuple[int, int]]) -> int:
    """The secret from a threshold of shares: Lagrange's interpolation at 0."""
    secret = 0
    for x, y in points:
        top = bottom = 1
        for other, _ in points:
            if other != x:
                top, bottom = top * -other % PRIME, bottom * (x - other) % PRIME
        secret = (secret + y * top * pow(bottom, -1, PRIME)) % PRIME
    return secret
