"""Numbers as people read them. The exact value is always kept beside the short one."""

from __future__ import annotations

import math


def _scaled(value: float, step: float, prefixes: str) -> tuple[float, str]:
    """`value` divided by the largest step it reaches after rounding to three figures."""
    power = 0
    while power + 1 < len(prefixes) and abs(float(f"{value:.3g}")) >= step:
        value, power = value / step, power + 1
    return value, prefixes[power].strip()


def _three(value: float) -> str:
    """Three significant figures, so that a column of them lines up.

    >>> [_three(x) for x in (49.849, 7.0, 999.6, 0.01234, 0)]
    ['49.8', '7.00', '1000', '0.0123', '0']
    """
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    places = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{min(max(places, 0), 9)}f}"


def number(value: float | None) -> str:
    """A quality: three significant figures and a fixed look down a column.

    >>> number(49.8493), number(0.91234), number(1234.5), number(None), number(float("nan"))
    ('49.8', '0.912', '1234', '–', 'not finite')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}"
    return f"{value:.{0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def bytes_text(count: float) -> str:
    """Bytes in decimal units.

    >>> bytes_text(0), bytes_text(812), bytes_text(1_234_567), bytes_text(999_999)
    ('0 B', '812 B', '1.23 MB', '1.00 MB')
    """
    value, prefix = _scaled(count, 1000, " kMGTP")
    return f"{_three(value) if prefix else round(value)} {prefix}B"


def seconds_text(seconds: float) -> str:
    """A duration in the unit that a person would use.

    >>> seconds_text(0.0042), seconds_text(3.41), seconds_text(754), seconds_text(12000)
    ('4.20 ms', '3.41 s', '12.6 min', '3.33 h')
    """
    unit, size = clock(seconds)
    return f"{_three(seconds / size)} {unit}"


def clock(seconds: float) -> tuple[str, float]:
    """The unit for a duration, and its length in seconds.

    >>> clock(0.5), clock(754)
    (('ms', 0.001), ('min', 60.0))
    """
    if 0 < seconds < 0.9995:
        return "ms", 1e-3
    steps = ((120, "s", 1.0), (7200, "min", 60.0), (172800, "h", 3600.0))
    return next(((unit, size) for limit, unit, size in steps if seconds < limit), ("d", 86400.0))


def joules_text(joules: float) -> str:
    """Energy, in J, kJ, MJ, or below a joule in mJ.

    >>> joules_text(182.4), joules_text(15_300), joules_text(0.02)
    ('182 J', '15.3 kJ', '20.0 mJ')
    """
    if 0 < joules < 0.9995:
        return f"{_three(joules * 1000)} mJ"
    value, prefix = _scaled(joules, 1000, " kMGT")
    return f"{_three(value)} {prefix}J"


def rate_text(bits: float) -> str:
    """A rate of a link.

    >>> rate_text(5e6), rate_text(5470), rate_text(float("inf"))
    ('5 Mbit/s', '5.47 kbit/s', 'no limit')
    """
    if math.isinf(bits):
        return "no limit"
    value, prefix = _scaled(bits, 1000, " kMGT")
    return f"{value:.3g} {prefix}bit/s"


def exact(value: float | None, unit: str = "") -> str:
    """The full value with its unit: `3,145,728 bytes`.

    >>> exact(3145728, "bytes"), exact(49.849312)
    ('3,145,728 bytes', '49.849312')
    """
    if value is None:
        return "not recorded"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"
    return f"{text} {unit}".strip()
