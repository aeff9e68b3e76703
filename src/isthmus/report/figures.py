"""The charts: pure functions from runs to Altair charts, or None where there is nothing to draw.

A chart carries its title, its caption (as subtitle) and its description in words; page and
export decide how these are shown. Colours are names from `theme`; widths follow the container.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from isthmus.errors import InputError, need
from isthmus.report import account, marks, units
from isthmus.report.account import Quality
from isthmus.report.marks import Bar, Chart
from isthmus.report.read import RunData

need("altair", "report")

import altair as alt  # noqa: E402

_MOST_MARKS = 60
_MOST_METRICS = 4


def over_rounds(runs: Sequence[RunData], quality: Quality) -> Chart | None:
    """Quality over rounds, one line a run, named at its end."""
    curves = {run.title: account.curve(run, quality) for run in runs}
    points = {
        title: [(p.round, p.value) for p in line.points if math.isfinite(p.value)]
        for title, line in curves.items()
    }
    means = [title for title, line in curves.items() if line.points and "mean" in line.scope]
    note = f" Mean of devices for {_and(means)}." if means else ""
    chart = marks.lines(points, runs, quality.metric, _rounds())
    return chart and marks.titled(
        chart,
        f"{_name(quality)} over rounds",
        f"On {quality.split} data; {quality.better} is better. Round 0 is before training.{note}",
        _ends(points),
    )


def quality_bytes(runs: Sequence[RunData], quality: Quality) -> Chart | None:
    """Quality against the bytes moved so far (log scale), one curve a run.

    A run that moved nothing has no place on a logarithmic axis: a dashed line marks what it
    reached.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    still: dict[str, float] = {}
    for run in runs:
        reached = [p for p in account.curve(run, quality).points if math.isfinite(p.value)]
        at = zip(account.moved(run, reached), reached, strict=True)
        points[run.title] = [(count, point.value) for count, point in at if count > 0]
        if reached and reached[-1].round > 0 and not points[run.title]:
            still[run.title] = reached[-1].value
    axis = alt.Axis(labelExpr=marks.BYTES, tickCount=5, title="bytes moved so far, log scale")
    chart = marks.lines(points, runs, quality.metric, axis, log=True, levels=still)
    note = f" Dashed: {_and(still)}, which moved nothing." if still else ""
    return chart and marks.titled(
        chart,
        f"{_name(quality)} against bytes",
        f"One point a round, all crossings counted; {quality.better} is better.{note}",
        _ends(points, units.bytes_text),
    )


def before_after(runs: Sequence[RunData], quality: Quality) -> Chart | None:
    """Each device's quality before and after, the worst device of each run ringed."""
    rows: list[dict[str, Any]] = []
    worst: list[str] = []
    for run in runs:
        scored = [d for d in account.devices(run, quality) if marks.finite(d.after)]
        last = quality.worst(d.after or 0.0 for d in scored) if scored else -1
        for i, d in enumerate(scored):
            row = {"run": run.title, "device": d.name, "after": d.after, "worst": i == last}
            rows.append(row | {"before": d.before if marks.finite(d.before) else None})
        worst += [f"{run.title}: {d.name} {units.number(d.after)}" for d in scored[last:][:1]]
    if not rows:
        return None
    order, total = _devices_shown(rows, quality)
    rows = [row for row in rows if row["device"] in order]
    names = list(dict.fromkeys(row["run"] for row in rows))
    ends = [row[end] for row in rows for end in ("before", "after") if row[end] is not None]
    axis = alt.Axis(title=quality.metric, grid=True, tickCount=5)
    x = alt.X("after:Q", scale=alt.Scale(domain=marks.domain(ends), nice=False), axis=axis)
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("device:N", sort=order, title=None, scale=alt.Scale(paddingInner=0.3)),
        yOffset=alt.YOffset("run:N", sort=names, scale=alt.Scale(paddingOuter=0.1)),
        color=marks.run_colour(runs, names, legend=True),
        tooltip=[
            alt.Tooltip("run:N"),
            alt.Tooltip("device:N"),
            alt.Tooltip("before:Q", format=".4~g"),
            alt.Tooltip("after:Q", format=".4~g"),
        ],
    )
    layers = [
        base.mark_rule(strokeWidth=2, opacity=0.45).encode(x=x, x2="before:Q"),
        base.mark_point(shape="stroke", angle=90, size=60, strokeWidth=2).encode(x="before:Q"),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=x),
        base.mark_point(filled=False, size=190, strokeWidth=1.6, opacity=1)
        .encode(x=x)
        .transform_filter("datum.worst"),
    ]
    cut = f" The {len(order)} worst of {total} devices." if total > len(order) else ""
    return marks.titled(
        marks.framed(layers, alt.Step(max(9, 16 - 2 * len(names)))),
        f"{_name(quality)} of each device",
        f"From before (bar) to after (dot), {quality.better} is better; the worst device of each "
        f"run is ringed.{cut}",
        f"Worst devices after training: {'; '.join(worst)}.",
    )


def bytes_by_kind(runs: Sequence[RunData]) -> Chart | None:
    """Bytes up, down and across by kind of message, stacked, for each run."""

    def parts() -> Iterable[Bar]:
        for way in ("up", "down", "across"):
            for run in runs:
                table = account.crossings(run)
                for kind in dict.fromkeys(table["kind"]):
                    mask = (table["kind"] == kind) & (table["way"] == way)
                    yield Bar(run.title, way, kind or "other", int(table["bytes"][mask].sum()))

    drawn = marks.bars(parts(), runs, units.bytes_text, marks.BYTES)
    return drawn and marks.titled(
        drawn[0],
        "Bytes by kind and direction",
        "Honest count: framing, indices and retransmissions included.",
        drawn[1],
    )


def time_split(runs: Sequence[RunData]) -> Chart | None:
    """Virtual seconds of computing and of sending, summed over the parties of each run."""
    parts = list(_activities(runs, "seconds"))
    longest = max(sum(bar.value for bar in parts if bar.run == run.title) for run in runs)
    unit, size = units.clock(longest)
    drawn = marks.bars(
        (bar._replace(value=bar.value / size) for bar in parts),
        runs,
        lambda amount: units.seconds_text(amount * size),
        f"format(datum.value, ',~r') + ' {unit}'",
    )
    return drawn and marks.titled(
        drawn[0],
        "Where the time goes",
        "Virtual seconds summed over all parties. They work at the same time: the run takes less.",
        drawn[1],
    )


def joules(runs: Sequence[RunData]) -> Chart | None:
    """Joules of computing and of sending for each run, by source where rows name one."""
    parts = _activities(runs, "joules")
    drawn = marks.bars(parts, runs, units.joules_text, marks.JOULES)
    return drawn and marks.titled(
        drawn[0],
        "Where the energy goes",
        f"Joules summed over all parties; source: {_and(account.sources(runs) or ['none'])}.",
        drawn[1],
    )


def epsilon(runs: Sequence[RunData]) -> Chart | None:
    """Privacy spent over rounds, as each run's accountant composed it, for the worst party.

    `privacy.json` is `{"delta": .., "epsilon": [{"round": .., "party": .., "epsilon": ..}, ..]}`;
    each epsilon is that of all events until the end of the round.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    deltas: dict[str, None] = {}
    for run in runs:
        spent: dict[int, float] = {}
        for r, value in _accounted(run):
            spent[r] = max(value, spent.get(r, 0.0))
        points[run.title] = [(r, spent[r]) for r in sorted(spent) if math.isfinite(spent[r])]
        if spent and run.privacy and "delta" in run.privacy:
            deltas[str(run.privacy["delta"])] = None
    chart = marks.lines(points, runs, "epsilon", _rounds())
    at = f" at delta {_and(deltas)}" if deltas else ""
    return chart and marks.titled(
        chart,
        "Privacy spent",
        f"Epsilon{at}, of the party that spent most; lower is more private.",
        _ends(points),
    )


def qualities(runs: Sequence[RunData]) -> dict[str, Chart]:
    """The charts of quality that these runs can fill, by name."""
    measures = account.qualities(runs)
    charts: dict[str, Chart | None] = {}
    for quality in measures[:_MOST_METRICS]:
        name = "".join(c if c.isalnum() else "-" for c in quality.metric.lower())
        charts[f"{name}-over-rounds"] = over_rounds(runs, quality)
    if measures:
        charts["quality-bytes"] = quality_bytes(runs, measures[0])
        charts["devices"] = before_after(runs, measures[0])
    return {name: chart for name, chart in charts.items() if chart is not None}


def costs(runs: Sequence[RunData]) -> dict[str, Chart]:
    """The charts of cost that these runs can fill, by name."""
    charts = {
        "bytes": bytes_by_kind(runs),
        "time": time_split(runs),
        "joules": joules(runs),
        "epsilon": epsilon(runs),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def every(runs: Sequence[RunData]) -> dict[str, Chart]:
    """All charts that these runs can fill, by name."""
    return qualities(runs) | costs(runs)


def _activities(runs: Sequence[RunData], column: str) -> Iterable[Bar]:
    """One bar a run: its own work, then crossings by direction, sources of joules apart."""
    words = {"local": "compute", "up": "upload", "down": "download", "across": "between devices"}
    for way, word in words.items():
        for run in runs:
            table = run.ledger
            for source in dict.fromkeys(table["source"]):
                mask = (table["way"] == way) & (table["source"] == source)
                part = f"{word} ({source})" if source and column == "joules" else word
                yield Bar(run.title, "", part, float(table[column][mask].sum()))


def _accounted(run: RunData) -> list[tuple[int, float]]:
    try:
        given = (run.privacy or {}).get("epsilon", [])
        return [(int(point["round"]), float(point["epsilon"])) for point in given]
    except (TypeError, KeyError, ValueError) as error:
        allowed = "epsilon: a list of objects with round and epsilon"
        raise InputError(str(run.folder / "privacy.json"), repr(error), allowed) from error


def _devices_shown(rows: list[dict[str, Any]], quality: Quality) -> tuple[list[str], int]:
    """The devices to draw, worst before training first; only the worst where they are many."""
    sign = -1.0 if quality.lower else 1.0
    ringed = {row["device"] for row in rows if row["worst"]}
    end: dict[str, float] = {}
    start: dict[str, float] = {}
    for row in rows:
        name, after = row["device"], sign * row["after"]
        before = after if row["before"] is None else sign * row["before"]
        end[name] = min(after, end.get(name, math.inf))
        start[name] = min(before, start.get(name, math.inf))
    most = max(5, _MOST_MARKS // len({row["run"] for row in rows}))
    kept = sorted(end, key=lambda name: (name not in ringed, end[name]))[:most]
    return sorted(kept, key=lambda name: start[name]), len(end)


def _rounds() -> alt.Axis:
    return alt.Axis(format="d", tickMinStep=1, title="round")


def _ends(
    points: Mapping[str, Sequence[tuple[float, float]]],
    where: Callable[[float], str] = lambda x: f"round {x}",
) -> str:
    """Each line in words: where it starts and where it ends."""
    said = [
        f"{title} from {units.number(line[0][1])} to {units.number(line[-1][1])} "
        f"at {where(line[-1][0])}"
        for title, line in points.items()
        if line
    ]
    return "; ".join(said) + "."


def _name(quality: Quality) -> str:
    return quality.metric.replace("_", " ").capitalize()


def _and(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
