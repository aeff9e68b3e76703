"""Secure aggregation: the sum to the bit whoever drops out, nothing below the threshold, and a
single masked vector that says nothing."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from isthmus.errors import InputError
from isthmus.privacy.secagg import PRIME, SecAgg, recover, share, stream

CLIENTS = (3, 8, 11, 20, 42)


def codes(n: int, d: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, (n, d), dtype=np.uint32)


def test_every_set_of_survivors() -> None:
    """All 32 subsets of five: from three on the exact sum, below it an abort."""
    meeting = SecAgg(threshold=0.6).meet(CLIENTS, seed=5)
    x = codes(5)
    y = meeting.mask(x, CLIENTS)
    assert meeting.threshold == 3
    for size in range(6):
        for rows in combinations(range(5), size):
            who = [CLIENTS[i] for i in rows]
            total = y[list(rows)].sum(0, dtype=np.uint32)
            if size < 3:
                with pytest.raises(InputError, match=rf"{size} of 5 uploads given, allowed: 3"):
                    meeting.unmask(total, who)
            else:
                want = x[list(rows)].sum(0, dtype=np.uint32)
                np.testing.assert_array_equal(meeting.unmask(total, who), want)


def test_masks_cancel_only_with_those_of_the_others() -> None:
    """A wrong set of survivors, or a lost share, gives no sum (a mutation check)."""
    meeting = SecAgg().meet(CLIENTS, seed=1)
    x = codes(5)
    total = meeting.mask(x, CLIENTS)[:4].sum(0, dtype=np.uint32)
    right = x[:4].sum(0, dtype=np.uint32)
    assert not np.array_equal(meeting.unmask(total, [3, 8, 11, 42]), right)
    np.testing.assert_array_equal(meeting.unmask(total, [3, 8, 11, 20]), right)
    meeting.shares[42, "s"][0] = (1, (meeting.shares[42, "s"][0][1] + 12345678) % PRIME)
    assert not np.array_equal(meeting.unmask(total, [3, 8, 11, 20]), right)


def test_a_single_masked_vector_is_uniform() -> None:
    """Of a vector of zeros: bytes by chi-square, no correlation with what was hidden, other rounds
    other masks, and without the own mask pairs alone would not be opened either."""
    d = 40_000
    one = SecAgg().meet(CLIENTS, seed=2).mask(np.zeros((1, d), np.uint32), [3])[0]
    counts = np.bincount(one.view(np.uint8), minlength=256)
    assert chisquare(counts).pvalue > 1e-4
    x = np.arange(d, dtype=np.uint32) * np.uint32(100_000)
    hidden = SecAgg().meet(CLIENTS, seed=3).mask(x[None], [3])[0]
    assert abs(np.corrcoef(hidden, x)[0, 1]) < 5 / d**0.5
    assert abs(np.corrcoef(hidden, one)[0, 1]) < 5 / d**0.5


@settings(max_examples=60, deadline=None)
@given(
    secret=st.integers(0, 2**256 - 1),
    n=st.integers(1, 9),
    data=st.data(),
    key=st.binary(min_size=1),
)
def test_shares(secret: int, n: int, data: st.DataObject, key: bytes) -> None:
    """Any t shares give the secret back."""
    t = data.draw(st.integers(1, n))
    points = share(secret, t, n, key)
    chosen = data.draw(st.permutations(points))[:t]
    assert recover(chosen) == secret
    assert len({x for x, _ in points}) == n


def test_fewer_shares_fit_every_secret() -> None:
    """t - 1 shares and any guess lie on a polynomial: they rule nothing out."""
    points = share(12345, 3, 5, b"key")[:2]
    for guess in (0, 1, 12345, 2**200):
        # The third share that this guess would need exists, and differs from guess to guess.
        (x0, y0), (x1, y1) = points
        slope = lambda x: (guess * (x - x0) * (x - x1) * pow(x0 * x1, -1, PRIME)) % PRIME  # noqa
        at = 5
        first = y0 * (at - x1) * pow(x0 - x1, -1, PRIME) * at * pow(x0, -1, PRIME)
        second = y1 * (at - x0) * pow(x1 - x0, -1, PRIME) * at * pow(x1, -1, PRIME)
        line = (first + second) % PRIME
        assert recover([*points, (at, (line + slope(at)) % PRIME)]) == guess


def test_stream_is_chacha20() -> None:
    """The first block of the key of zeros (RFC 8439, appendix A.1, test vector 1)."""
    assert stream(bytes(32), 4).tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_bad_settings() -> None:
    with pytest.raises(InputError, match=r"threshold: 0\.5 given, allowed: above 0\.5"):
        SecAgg(threshold=0.5)
    with pytest.raises(InputError, match="bits: 1 given"):
        SecAgg(bits=1)
