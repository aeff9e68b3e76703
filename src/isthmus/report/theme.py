"""One table of colours for page and charts, light and dark.

A chart names its colours as CSS variables, so the page switches scheme (and prints) without
redrawing; an exported file has the same names resolved to one scheme's values. Runs, message
kinds and origins of tokens keep apart under the three common kinds of colour blindness (tested).
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

Scheme = Literal["light", "dark"]
T = TypeVar("T")

TOKENS: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#14171b"),
    "wash": ("#f5f6f7", "#1c2025"),
    "line": ("#dfe2e6", "#31373e"),
    "ink": ("#1b1f24", "#e8eaed"),
    "quiet": ("#59626d", "#a3acb6"),
    "link": ("#0b5cb0", "#7dbbf8"),
    "run-1": ("#0b5cb0", "#5aa9f5"),
    "run-2": ("#d4570a", "#f07f3c"),
    "run-3": ("#00916e", "#4fe0b0"),
    "run-4": ("#a83a8c", "#f7a3dc"),
    "run-5": ("#6b5300", "#f0e06a"),
    "run-6": ("#39404a", "#8d959e"),
    "part-1": ("#27496d", "#8fb8e0"),
    "part-2": ("#6b93bb", "#4c7299"),
    "part-3": ("#b88e3f", "#d2a552"),
    "part-4": ("#7939a0", "#ac77db"),
    "part-5": ("#8b8d7d", "#75797e"),
    "part-6": ("#56654c", "#3bc188"),
    "accepted": ("#0b47a8", "#5aa0f5"),
    "corrected": ("#b64c07", "#f0743c"),
    "bonus": ("#027f53", "#4fe0a8"),
    "target": ("#8a2f71", "#f7a3dc"),
    "device": ("#4f3e00", "#f0e46a"),
}

FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, 'DejaVu Sans', Arial, sans-serif"


def token(name: str) -> str:
    """The name of a colour as charts and styles write it."""
    return f"var(--{name})"


def colours(family: Literal["run", "part"], count: int) -> list[str]:
    """`count` colours of a family, starting over after its last one."""
    size = sum(name.startswith(f"{family}-") for name in TOKENS)
    return [token(f"{family}-{i % size + 1}") for i in range(count)]


def css() -> str:
    """The colours as CSS: light, dark where the reader prefers it, always light on paper."""

    def block(scheme: Scheme) -> str:
        values = "".join(f"--{name}:{_value(name, scheme)};" for name in TOKENS)
        return f":root{{color-scheme:{scheme};{values}}}"

    dark = f"@media screen and (prefers-color-scheme: dark){{{block('dark')}}}"
    return f"{block('light')}\n{dark}"


def resolve(spec: T, scheme: Scheme) -> T:
    """A chart specification with every colour's name replaced by its value in `scheme`."""
    if isinstance(spec, dict):
        return {key: resolve(value, scheme) for key, value in spec.items()}  # type: ignore[return-value]
    if isinstance(spec, list):
        return [resolve(value, scheme) for value in spec]  # type: ignore[return-value]
    if isinstance(spec, str) and spec.startswith("var(--") and spec[6:-1] in TOKENS:
        return _value(spec[6:-1], scheme)  # type: ignore[return-value]
    return spec


def _value(name: str, scheme: Scheme) -> str:
    return TOKENS[name][scheme == "dark"]


CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": FONT,
    "padding": {"left": 2, "right": 4, "top": 6, "bottom": 2},
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "gridColor": token("line"),
        "tickColor": token("line"),
        "tickSize": 4,
        "labelColor": token("quiet"),
        "titleColor": token("quiet"),
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelPadding": 6,
        "titlePadding": 10,
        "labelLimit": 120,
        "labelOverlap": True,
        "labelFlush": False,
    },
    "axisX": {"grid": False, "domain": True, "domainColor": token("line")},
    "legend": {
        "orient": "top",
        "title": None,
        "direction": "horizontal",
        "labelColor": token("ink"),
        "labelFontSize": 12,
        "labelLimit": 150,
        "symbolType": "square",
        "symbolSize": 110,
        "symbolStrokeWidth": 0,
        "columnPadding": 16,
        "offset": 12,
    },
    "title": {
        "anchor": "start",
        "color": token("ink"),
        "fontSize": 15,
        "fontWeight": 600,
        "subtitleColor": token("quiet"),
        "subtitleFontSize": 12,
        "subtitleLineHeight": 16,
        "subtitlePadding": 6,
        "offset": 16,
    },
    "text": {"font": FONT, "fontSize": 12, "color": token("ink")},
}
