"""How many tokens to draft: expected tokens of a round, its speed, and the best length.

Time is in any one unit, so in seconds or in verifications of the target. A round that drafts g
tokens, each accepted with probability alpha, takes

    T(g) = base + g load + (1 - alpha^g) row      E(g) = (1 - alpha^(g+1)) / (1 - alpha)

`load` is what one drafted token adds (drafting it, sending its row), `base` the rest of a round
(one verification, latencies), `row` what a rejection adds (the row that DSSD sends down). The
speed is S(g) = E(g) / T(g). In verifications and with base = 1, row = 0 this is TK-SLT
(arXiv:2509.04576): its theorem 2 is `best`, its test S <= 1 against the target alone is
S(g) <= S(0). A base above 1 and the row of DSSD (arXiv:2507.12000) are (reconstructed).
"""

from __future__ import annotations

import math

from isthmus.errors import InputError

PRIOR = (4, 5)
"""Tokens that count as accepted, and as judged, before any has been."""


def estimate(judged: int, accepted: int) -> float:
    """The acceptance of one token from what was judged so far.

    With a prior (reconstructed): from a bare mean, one unlucky first round would end all
    drafting, and with it all evidence.

    >>> estimate(1, 0), estimate(995, 496)
    (0.6666666666666666, 0.5)
    """
    return (accepted + PRIOR[0]) / (judged + PRIOR[1])


def tokens(alpha: float, gamma: int) -> float:
    """Expected tokens of a round, E: the accepted ones and the one that always follows.

    >>> round(tokens(0.8, 4), 4), tokens(1.0, 4), tokens(0.0, 4)
    (3.3616, 5.0, 1.0)
    """
    if alpha <= 0:
        return 1.0
    if alpha >= 1:
        return gamma + 1.0
    return math.expm1((gamma + 1) * math.log(alpha)) / (alpha - 1)


def speed(alpha: float, gamma: int, load: float, base: float = 1.0, row: float = 0.0) -> float:
    """Expected tokens per unit of time, S. With base = 1 and times in verifications, the
    speed-up over the target alone. Raises `InputError` for times below 0.

    >>> speed(0.4, 1, load=0.4)
    1.0
    """
    for name, time in (("load", load), ("base", base), ("row", row)):
        if not 0 <= time < math.inf:
            raise InputError(name, time, "a time of 0 or more")
    rejected = 1.0 - min(max(alpha, 0.0), 1.0) ** gamma
    time = base + gamma * load + rejected * row
    return tokens(alpha, gamma) / time if time else math.inf


def scan(alpha: float, load: float, base: float = 1.0, row: float = 0.0, most: int = 64) -> int:
    """The g of 1 to `most` with the largest S(g), the smallest of equals.

    >>> scan(0.8, load=0.1), scan(0.8, load=0.1, row=2.0), scan(0.8, load=0.1, base=3.0, row=2.0)
    (6, 4, 9)
    """
    return max(range(1, most + 1), key=lambda g: speed(alpha, g, load, base, row))


def best(alpha: float, load: float, base: float = 1.0, most: int = 64) -> int:
    """`scan` without a row in closed form: the better neighbour of the real maximiser

        g0 = (W_{-1}(-a^(base/load - 1) / e) + 1) / ln a - base/load

    within 1 to `most`, W_{-1} the lower branch of Lambert's function (TK-SLT, theorem 2 and
    algorithm 1 at base = 1). Where the argument of W underflows, it does scan.

    >>> [best(0.8, load) for load in (0.01, 0.1, 0.2, 0.4, 0.6)]
    [14, 6, 4, 2, 1]
    """
    if alpha <= 0 or load >= base:
        return 1
    if alpha >= 1 or load <= 0:
        return most
    from scipy.special import lambertw

    ratio = base / load
    argument = -math.exp((ratio - 1) * math.log(alpha) - 1)
    if argument > -1e-300:
        return scan(alpha, load, base, most=most)
    top = (float(lambertw(argument, -1).real) + 1) / math.log(alpha) - ratio
    low = min(max(math.floor(top), 1), most)
    return max(low, min(low + 1, most), key=lambda g: speed(alpha, g, load, base))
