"""A device: what computing costs in seconds and joules, and the meter that adds it up.

Time is that of the slower of arithmetic and memory traffic (Williams, Waterman and Patterson,
"Roofline", CACM 2009):  max(flops / rate, bytes / bandwidth).  A clock scaled by s in (0, 1]
makes arithmetic take 1/s of its time and draw

    P(s) = idle + (busy - idle) s^3

watts: dynamic power goes as f V^2, and the voltage follows the frequency. Every joule is
labelled with its source; those of this file are "modelled".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import InputError, unknown

Array = NDArray[Any]
Unit = Literal["compute", "memory"]


class Tier(NamedTuple):
    """One level of memory: capacity in bytes, bandwidth in bytes/s."""

    capacity: float
    bandwidth: float


class Power(NamedTuple):
    """Watts drawn while idle, while computing at full clock, and while transmitting."""

    idle: float
    busy: float
    tx: float


@dataclass(frozen=True)
class Profile:
    """A kind of device.

    `flops`: FLOP/s sustained, by dtype (`float32`) or by dtype and phase (`float32/decode`, which
    comes first). `tiers`: memories, the fastest first. `battery` in joules, None on the mains.
    `awake`: windows (from, to) in seconds of each `period` in which it can be reached; none
    means always.
    """

    name: str
    flops: Mapping[str, float]
    tiers: Mapping[str, Tier]
    power: Power
    battery: float | None = None
    awake: Sequence[tuple[float, float]] = ()
    period: float = 86400.0


class Spent(NamedTuple):
    """What work came to: numbers, or arrays for an array of FLOPs."""

    seconds: Any
    joules: Any


class Device:
    """One device: a profile and its present clocks. Asking it changes nothing.

    >>> Device.named("phone").spend(2e10, "float32", "train")
    Spent(seconds=2.0, joules=8.0)
    """

    def __init__(self, profile: Profile, name: str = "") -> None:
        self.profile = profile
        self.name = name or profile.name
        self.clocks: dict[Unit, float] = {"compute": 1.0, "memory": 1.0}

    @classmethod
    def named(cls, profile: str, name: str = "") -> Device:
        """A device of a named profile (`PROFILES`)."""
        if profile not in PROFILES:
            raise unknown("device", profile, PROFILES)
        return cls(PROFILES[profile], name)

    def rate(self, dtype: str = "float32", phase: str = "train") -> float:
        """FLOP/s at the present clock. Raises `InputError` for a dtype it cannot compute in."""
        table = self.profile.flops
        known = table.get(f"{dtype}/{phase}", table.get(dtype))
        if known is None:
            raise unknown(f"{self.name} dtype", dtype, {key.partition("/")[0]: 0 for key in table})
        return known * self.clocks["compute"]

    def spend(
        self,
        flops: Any,
        dtype: str = "float32",
        phase: str = "train",
        bytes: Any = 0.0,
        tier: str | None = None,
    ) -> Spent:
        """Seconds and joules of `flops` FLOPs that move `bytes` through `tier` (the first).

        `flops` and `bytes` are numbers or arrays; so are the answers.
        """
        return _spent(
            flops, bytes, self.rate(dtype, phase),
            self.tier(tier).bandwidth * self.clocks["memory"], self.watts(),
        )  # fmt: skip

    def watts(self) -> float:
        """What it draws while computing, at the present clock."""
        power = self.profile.power
        return power.idle + (power.busy - power.idle) * self.clocks["compute"] ** 3

    def tier(self, name: str | None = None) -> Tier:
        """A memory by name; the first without one."""
        tiers = self.profile.tiers
        if name is not None and name not in tiers:
            raise unknown(f"{self.name} memory", name, tiers)
        return tiers[name] if name is not None else next(iter(tiers.values()))

    def available(self, t: Any) -> Any:
        """Whether it can be reached at time t (a number or an array)."""
        if not self.profile.awake:
            return np.ones(np.shape(t), bool) if np.ndim(t) else True
        phase = np.mod(t, self.profile.period)
        open_ = np.any([(a <= phase) & (phase < b) for a, b in self.profile.awake], axis=0)
        return open_ if np.ndim(t) else bool(open_)


def spend_each(
    devices: Sequence[Device], flops: Any, dtype: str = "float32", phase: str = "train"
) -> Spent:
    """`flops` (a number or `[n]`) on each of n devices: arrays of n seconds and joules."""
    rates = np.array([device.rate(dtype, phase) for device in devices])
    return _spent(flops, 0.0, rates, math.inf, np.array([device.watts() for device in devices]))


def _spent(flops: Any, bytes: Any, rate: Any, bandwidth: Any, watts: Any) -> Spent:
    if isinstance(bytes, int | float) and bytes == 0:
        seconds = flops / rate  # nothing moves
    elif np.ndim(flops) or np.ndim(bytes) or np.ndim(rate):
        seconds = np.maximum(np.asarray(flops) / rate, np.asarray(bytes) / bandwidth)
    else:
        seconds = max(flops / rate, bytes / bandwidth)
    return Spent(seconds, seconds * watts)


class Actuator:
    """Sets a device's clocks, as fractions of the full ones.

    >>> device = Device.named("phone")
    >>> with Actuator(device).at(compute=0.5):
    ...     device.spend(2e10)
    Spent(seconds=4.0, joules=3.75)
    >>> device.clocks["compute"]
    1.0
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def set(self, unit: Unit, clock: float) -> None:
        """Set one unit's clock, above 0 and at most 1."""
        if unit not in self.device.clocks:
            raise unknown("unit", unit, self.device.clocks)
        if not 0 < clock <= 1:
            raise InputError(f"clock.{unit}", clock, "above 0, at most 1")
        self.device.clocks[unit] = clock

    @contextmanager
    def at(self, **clocks: float) -> Generator[Device]:
        """Clocks for the length of a `with`; afterwards they are as they were found."""
        before = dict(self.device.clocks)
        try:
            for unit, clock in clocks.items():
                self.set(unit, clock)  # pyright: ignore[reportArgumentType]
            yield self.device
        finally:
            self.device.clocks.update(before)


@dataclass
class Total:
    """What one kind of span came to."""

    count: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    joules: float = 0.0


@dataclass
class Meter:
    """Adds up what a device spends: by kind of span, with peak memory and joules by source."""

    device: Device
    spans: dict[str, Total] = field(default_factory=dict[str, Total])
    joules: dict[str, float] = field(default_factory=dict[str, float])
    peak: dict[str, float] = field(default_factory=dict[str, float])
    held: dict[str, float] = field(default_factory=dict[str, float])

    def spend(self, span: str, flops: float, dtype: str = "float32", phase: str = "train",
              bytes: float = 0.0, tier: str | None = None) -> Spent:  # fmt: skip
        """`Device.spend`, entered under `span` with joules of the source `modelled`."""
        spent = self.device.spend(flops, dtype, phase, bytes, tier)
        self.add(span, float(spent.seconds), float(spent.joules), flops, source="modelled")
        return spent

    def add(
        self, span: str, seconds: float, joules: float = 0.0, flops: float = 0.0, *, source: str
    ) -> None:
        """Enter what was measured or modelled elsewhere; `source` says where joules come from."""
        total = self.spans.setdefault(span, Total())
        total.count += 1
        total.seconds += seconds
        total.flops += flops
        total.joules += joules
        self.joules[source] = self.joules.get(source, 0.0) + joules

    def hold(self, tier: str, bytes: float) -> None:
        """Take `bytes` of a memory (negative: give back). Raises `InputError` when it is full."""
        held = self.held.get(tier, 0.0) + bytes
        capacity = self.device.tier(tier).capacity
        if not 0 <= held <= capacity:
            raise InputError(f"{self.device.name} {tier}", held, f"0 to {capacity:.0f} bytes")
        self.held[tier] = held
        self.peak[tier] = max(self.peak.get(tier, 0.0), held)

    @property
    def battery(self) -> float | None:
        """Joules left in the battery (0 when it is flat); None on the mains."""
        full = self.device.profile.battery
        return None if full is None else max(full - sum(self.joules.values()), 0.0)


def count_flops(function: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """FLOPs of one call (2 per multiply-add; matrix products, convolutions, attention).

    torch's counter does not see the fused attention of the CPU: PyTorch's own
    `scaled_dot_product_attention` is therefore taken apart into matrix products while counting.
    Any other fused kernel is missed: load Hugging Face models with eager attention.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*args, **kwargs)
    return counter.get_total_flops()


# Round numbers of a typical order (sustained, not peak), for comparing methods; not measurements.
_MB, _GB = 1e6, 1e9
PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile(
            "microcontroller",
            {"float32": 1e7, "int8": 1e8},
            {"sram": Tier(0.5 * _MB, 0.2 * _GB), "flash": Tier(2 * _MB, 0.05 * _GB)},
            Power(idle=0.001, busy=0.05, tx=0.1),
            battery=10e3,
        ),
        Profile(
            "phone",
            {"float32": 1e10, "float16": 2e10, "int8": 4e10},
            {"ram": Tier(6 * _GB, 30 * _GB), "storage": Tier(128 * _GB, 1 * _GB)},
            Power(idle=0.5, busy=4.0, tx=1.0),
            battery=50e3,
        ),
        Profile(
            "laptop",
            {"float32": 1e11, "float16": 1e11, "int8": 2e11},
            {"ram": Tier(16 * _GB, 50 * _GB), "storage": Tier(512 * _GB, 3 * _GB)},
            Power(idle=5.0, busy=30.0, tx=2.0),
            battery=200e3,
        ),
        Profile(
            "edge-server",
            {"float32": 1e13, "float16": 5e13, "int8": 1e14},
            {"gpu": Tier(24 * _GB, 600 * _GB), "ram": Tier(64 * _GB, 100 * _GB)},
            Power(idle=60.0, busy=300.0, tx=5.0),
        ),
        Profile(
            "server",
            {"float32": 5e13, "float16": 5e14, "int8": 1e15},
            {"gpu": Tier(80 * _GB, 3000 * _GB), "ram": Tier(512 * _GB, 300 * _GB)},
            Power(idle=150.0, busy=900.0, tx=10.0),
        ),
    )
}
