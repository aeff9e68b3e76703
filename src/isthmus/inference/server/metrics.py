"""Counters of the server in the text format that Prometheus reads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.inference.server.text import Figures

COUNTERS = {
    "isthmus_requests_total": "HTTP requests answered, by path and status.",
    "isthmus_texts_total": "Texts that have ended, by how.",
    "isthmus_tokens_total": "Tokens told, by who produced them.",
    "isthmus_bytes_total": "Bytes that crossed the link, framing and repeats included.",
    "isthmus_virtual_seconds_total": "Seconds on the texts' own clocks.",
    "isthmus_wall_seconds_total": "Seconds that the texts really took, each by itself.",
    "isthmus_joules_total": "Joules of device (with its radio) and edge; modelled, not measured.",
    "isthmus_judged_tokens_total": "Drafted tokens that the edge judged.",
    "isthmus_accepted_tokens_total": "Drafted tokens that the edge accepted.",
}
GAUGES = {
    "isthmus_sessions_active": "Texts in the making.",
    "isthmus_sessions_waiting": "Texts that wait to begin.",
    "isthmus_acceptance_ratio": "Accepted tokens by judged ones, since the start.",
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Sums by name and labels, added to from any thread.

    >>> metrics = Metrics()
    >>> metrics.add("isthmus_bytes_total", 40, direction="up")
    >>> print(metrics.text({"isthmus_sessions_active": 2}))
    # HELP isthmus_bytes_total Bytes that crossed the link, framing and repeats included.
    # TYPE isthmus_bytes_total counter
    isthmus_bytes_total{direction="up"} 40
    # HELP isthmus_sessions_active Texts in the making.
    # TYPE isthmus_sessions_active gauge
    isthmus_sessions_active 2
    <BLANKLINE>
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, Labels], float] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to one counter of `COUNTERS`. Raises `KeyError` for another name."""
        COUNTERS[name]
        slot = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._sums[slot] = self._sums.get(slot, 0) + value

    def add_figures(self, before: Figures, after: Figures, origin: str) -> None:
        """Add by what a text's figures have grown; a new token is that of `origin`."""
        d = after._make(b - a for a, b in zip(before, after, strict=True))
        for name, value, labels in (
            ("tokens", d.tokens, {"origin": origin}),
            ("bytes", d.up, {"direction": "up"}),
            ("bytes", d.down, {"direction": "down"}),
            ("virtual_seconds", d.seconds, {}),
            ("wall_seconds", d.wall, {}),
            ("joules", d.device_joules, {"party": "device", "source": "modelled"}),
            ("joules", d.edge_joules, {"party": "edge", "source": "modelled"}),
            ("judged_tokens", d.judged, {}),
            ("accepted_tokens", d.accepted, {}),
        ):
            if value:
                self.add(f"isthmus_{name}_total", value, **labels)

    def total(self, name: str) -> float:
        """The sum of one counter over all labels."""
        with self._lock:
            return sum(value for (known, _), value in self._sums.items() if known == name)

    def text(self, gauges: Mapping[str, float]) -> str:
        """All counters that have a value, and `gauges` (of `GAUGES`), as Prometheus reads them."""
        with self._lock:
            rows = sorted(self._sums.items())
        lines: list[str] = []
        for name, told in COUNTERS.items():
            mine = [(labels, value) for (known, labels), value in rows if known == name]
            if mine:
                lines += [f"# HELP {name} {told}", f"# TYPE {name} counter"]
                lines += [f"{name}{_labels(labels)} {value!r}" for labels, value in mine]
        for name, told in GAUGES.items():
            if name in gauges:
                lines += [
                    f"# HELP {name} {told}",
                    f"# TYPE {name} gauge",
                    f"{name} {gauges[name]!r}",
                ]
        return "\n".join([*lines, ""])


def _labels(labels: Labels) -> str:
    """Labels in braces; `\\`, `"` and line ends in their values are escaped."""
    if not labels:
        return ""
    escapes = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
    return "{" + ",".join(f'{name}="{value.translate(escapes)}"' for name, value in labels) + "}"
