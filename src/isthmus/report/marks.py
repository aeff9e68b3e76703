"""The two shapes that most charts have, lines with named ends and stacked bars, in Altair."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from isthmus.errors import need
from isthmus.report import theme, units

need("altair", "report")

import altair as alt  # noqa: E402

Chart = alt.LayerChart
HEIGHT = 260
BYTES = "datum.value == 0 ? '0' : replace(format(datum.value, '.3~s'), /([a-zA-Z]?)$/, ' $1B')"
JOULES = "datum.value == 0 ? '0' : replace(format(datum.value, '.3~s'), /([a-zA-Zµ]?)$/, ' $1J')"
_LABEL_GAP = 15 / HEIGHT
_MOST_POINTS = 16
_LEGEND_LETTERS = 46


class Titled(Protocol):
    """What a chart compares: a run, or a method that was served; its title names it alone."""

    @property
    def title(self) -> str: ...


class Bar(NamedTuple):
    """One part of a stacked bar: the bar is the `lane` of a run."""

    run: str
    lane: str
    part: str
    value: float


def lines(
    points: Mapping[str, Sequence[tuple[float, float]]],
    runs: Sequence[Titled],
    value: str,
    axis: alt.Axis,
    log: bool = False,
    levels: Mapping[str, float] | None = None,
) -> Chart | None:
    """One line a run with its name at the right; `levels` are dashed lines across.

    `points` are finite (x, y) by run title; None when no run has one.
    """
    levels = levels or {}
    drawn = [title for title, line in points.items() if line]
    if not drawn:
        return None
    rows = [
        {"run": title, "x": x, "y": y, "said": units.number(y)}
        for title in drawn
        for x, y in points[title]
    ]
    sparse = max(len(line) for line in points.values()) <= _MOST_POINTS
    left, right = min(row["x"] for row in rows), max(row["x"] for row in rows)
    low, high = domain([row["y"] for row in rows] + list(levels.values()))
    ends = [(title, *points[title][-1]) for title in drawn]
    ends += [(title, right, y) for title, y in levels.items()]
    places = spread([y for _, _, y in ends], _LABEL_GAP * (high - low), low, high)
    labels = [
        {"run": title, "x": x, "y": y, "right": right, "place": place}
        for (title, x, y), place in zip(ends, places, strict=True)
    ]
    if log:
        across = alt.Scale(type="log", domain=[left / 1.15, right], nice=False)
    else:
        across = alt.Scale(domain=[left, max(right, left + 1)], nice=False)
    upright = alt.Scale(domain=[low, high], nice=False)
    colour = run_colour(runs, [*drawn, *levels])
    x = alt.X("x:Q", scale=across, axis=axis)
    y = alt.Y("y:Q", scale=upright, title=None, axis=alt.Axis(tickCount=5))
    tips = [
        alt.Tooltip("run:N"),
        alt.Tooltip("x:Q", title=str(axis.title).partition(",")[0], format=",~f"),
        alt.Tooltip("said:N", title=value),
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y, color=colour, tooltip=tips)
    named = alt.Chart(alt.InlineData(values=labels)).encode(color=colour)
    layers: list[Any] = [
        named.mark_rule(strokeWidth=1, opacity=0.4, x2Offset=8).encode(
            x=x, y=y, x2="right:Q", y2="place:Q"
        ),
        base.mark_line(strokeWidth=2),
        base.mark_point(filled=True, size=42, opacity=1 if sparse else 0),
        named.mark_text(align="left", dx=10, limit=130, baseline="middle").encode(
            x=alt.X("right:Q", scale=across, axis=axis),
            y=alt.Y("place:Q", scale=upright, title=None),
            text="run:N",
        ),
    ]
    if levels:
        flat = [{"run": title, "y": at} for title, at in levels.items()]
        dashed = alt.Chart(alt.InlineData(values=flat)).mark_rule(
            strokeDash=[5, 4], strokeWidth=1.5
        )
        layers.insert(0, dashed.encode(y=y, color=colour, tooltip=alt.Tooltip("run:N")))
    return framed(layers, HEIGHT)


def bars(
    given: Iterable[Bar], runs: Sequence[Titled], said: Callable[[float], str], label: str
) -> tuple[Chart, str] | None:
    """Stacked bars under each run's name, one a lane, the total at its end; and the same in words.

    `said` writes an amount, `label` is the axis labels' expression; None when all is zero.
    """
    present = [bar for bar in given if 0 < bar.value < math.inf]
    if not present:
        return None
    lanes = list(dict.fromkeys(bar.lane for bar in present))
    parts = list(dict.fromkeys(bar.part for bar in present))
    heads, totals, order, words = [], [], [], []
    for title in (run.title for run in runs):
        order.append(f"{title}\n\n")
        heads.append({"y": order[-1], "run": title})
        used = [lane for lane in lanes if any(bar[:2] == (title, lane) for bar in present)]
        for lane in used or lanes[:1]:
            order.append(f"{title}\n{lane}")
            total = sum(bar.value for bar in present if bar[:2] == (title, lane))
            totals.append({"y": order[-1], "value": total, "said": said(total)})
            words.append(f"{title} {lane} {said(total)}".replace("  ", " "))
    rows = [
        {**bar._asdict(), "y": f"{bar.run}\n{bar.lane}", "rank": parts.index(bar.part),
         "said": said(bar.value)}
        for bar in present
    ]  # fmt: skip
    names = alt.Axis(labelExpr="split(datum.value, '\\n')[1]", labelOverlap=False, title=None)
    ruler = alt.Axis(labelExpr=label, tickCount=4, ticks=True, title=None)
    y = alt.Y("y:N", scale=alt.Scale(domain=order, paddingInner=0.25), axis=names)
    x = alt.X("value:Q", stack="zero", axis=ruler)
    fill = alt.Color(
        "part:N",
        scale=alt.Scale(domain=parts, range=theme.colours("part", len(parts))),
        legend=alt.Legend(columns=_columns(parts)) if len(parts) > 1 else None,
    )
    tips = [alt.Tooltip("run:N"), alt.Tooltip("part:N", title="what")]
    tips += [alt.Tooltip("lane:N", title="direction")] if any(lanes) else []
    tips += [alt.Tooltip("said:N", title="amount")]
    layers = [
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar(stroke=theme.token("paper"), strokeWidth=1)
        .encode(y=y, x=x, color=fill, order="rank:Q", tooltip=tips),
        alt.Chart(alt.InlineData(values=totals))
        .mark_text(align="left", dx=6)
        .encode(y=y, x="value:Q", text="said:N"),
        alt.Chart(alt.InlineData(values=heads))
        .mark_text(align="left", fontWeight=600, dy=4)
        .encode(y=y, x=alt.value(0), text="run:N"),
    ]
    return framed(layers, alt.Step(24)), "; ".join(words) + "."


def framed(layers: Sequence[alt.Chart], height: int | alt.Step) -> Chart:
    """Layers as one chart, as wide as its container."""
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    chart = Chart(layer=list(layers))
    return chart.properties(width="container", height=height, autosize=fit)


def titled(chart: Chart, title: str, caption: str, words: str) -> Chart:
    """The chart with its title, its caption and what it shows in words."""
    subtitle = textwrap.wrap(caption, 92)
    return chart.properties(
        title=alt.Title(title, subtitle=subtitle), description=f"{title}. {words}"
    )


def run_colour(runs: Sequence[Titled], shown: Sequence[str], legend: bool = False) -> alt.Color:
    """A run keeps its colour in every chart, whichever runs the chart shows."""
    titles = [run.title for run in runs]
    colour = dict(zip(titles, theme.colours("run", len(titles)), strict=True))
    names = [title for title in titles if title in shown]
    scale = alt.Scale(domain=names, range=[colour[title] for title in names])
    wanted = legend and len(names) > 1
    key = (
        alt.Legend(columns=_columns(names), symbolType="circle", symbolOpacity=1)
        if wanted
        else None
    )
    return alt.Color("run:N", scale=scale, legend=key)


def _columns(names: Sequence[str]) -> int:
    """As many columns of a legend as a narrow screen holds."""
    for columns in range(min(4, len(names)), 1, -1):
        widths = (max(min(len(n), 22) + 4 for n in names[i::columns]) for i in range(columns))
        if sum(widths) <= _LEGEND_LETTERS:
            return columns
    return 1


def domain(values: Sequence[float]) -> list[float]:
    """The span of the values and a little air; around a single value, a span of its own."""
    low, high = min(values), max(values)
    air = 0.07 * (high - low) or 0.05 * abs(high) or 0.5
    return [low - air, high + air]


def spread(
    values: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf
) -> list[float]:
    """Move `values` as little as possible until neighbours are `gap` apart; their order stays.

    With the gaps taken off, the sorted values must not fall (`rising`). Clipping these keeps all
    within [low, high] (where there is room: else they start at `low`) and is still the least.

    >>> [round(x, 6) for x in spread([0.1, 0.0, 5.0], 1.0)]
    [0.55, -0.45, 5.0]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    top = high - (len(values) - 1) * gap
    level = rising([values[i] - place * gap for place, i in enumerate(order)])
    moved = [0.0] * len(values)
    for place, i in enumerate(order):
        moved[i] = max(low, min(top, level[place])) + place * gap
    return moved


def rising(values: Sequence[float]) -> list[float]:
    """The numbers nearest to `values` (least squares) that do not fall.

    Isotonic regression: neighbours that fall are pooled into their mean.

    >>> rising([1.0, 3.0, 2.0, 4.0])
    [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


def finite(value: float | None) -> bool:
    """Whether there is a value that can be drawn."""
    return value is not None and math.isfinite(value)
