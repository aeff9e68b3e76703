"""The charts of serving: which method has its tokens when, and what a token costs on the link."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from isthmus.errors import need
from isthmus.report import marks, serving, units
from isthmus.report.marks import Bar, Chart
from isthmus.report.serving import Served

need("altair", "report")

import altair as alt  # noqa: E402

_NARROW = 48
"""How many letters a narrow chart is wide."""


def tokens_over_time(shown: Sequence[Served]) -> Chart | None:
    """Tokens there over virtual time, the mean over the texts; each line named where it ends."""
    steps = {one.title: serving.race(one) for one in shown if len(serving.race(one)) > 1}
    if not steps:
        return None
    longest = max(points[-1][0] for points in steps.values())
    most = max(points[-1][1] for points in steps.values())
    unit, size = units.clock(longest)
    rows = [
        {"run": title, "x": t / size, "y": count, "said": units.seconds_text(t)}
        for title, points in steps.items()
        for t, count in points
    ]
    ends = {title: points[-1] for title, points in steps.items()}
    right = longest / size
    places = _places({title: t / size for title, (t, _) in ends.items()}, right)
    labels = [
        {"run": title, "x": t / size, "y": count, "place": places[title], "above": 1.1 * most}
        for title, (t, count) in ends.items()
    ]
    across = alt.Scale(domain=[0, right], nice=False)
    upright = alt.Scale(domain=[0, 1.18 * most], nice=False)
    x = alt.X("x:Q", scale=across, axis=alt.Axis(title=f"virtual time, {unit}", tickCount=6))
    y = alt.Y("y:Q", scale=upright, axis=alt.Axis(title=None, values=_ticks(most)))
    colour = marks.run_colour(shown, list(ends))
    tips = [
        alt.Tooltip("run:N", title="method"),
        alt.Tooltip("y:Q", title="tokens", format=".3~r"),
        alt.Tooltip("said:N", title="there after"),
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y, color=colour, tooltip=tips)
    named = alt.Chart(alt.InlineData(values=labels)).encode(color=colour)
    layers = [
        named.mark_rule(strokeWidth=1, opacity=0.5, yOffset=-3).encode(
            x=x, y=y, x2="place:Q", y2="above:Q"
        ),
        base.mark_line(strokeWidth=2, interpolate="step-after"),
        base.mark_point(filled=True, size=42, opacity=0),
        named.mark_point(filled=True, size=42, opacity=1).encode(x=x, y=y),
        named.mark_text(baseline="bottom", dy=-3).encode(
            x=alt.X("place:Q", scale=across),
            y=alt.Y("above:Q", scale=upright, title=None),
            text="run:N",
        ),
    ]
    said = (
        f"{title} {units.number(count)} tokens in {units.seconds_text(t)}"
        for title, (t, count) in ends.items()
    )
    return marks.titled(
        marks.framed(layers, marks.HEIGHT),
        "Tokens over virtual time",
        "Mean over the texts, from the request on; a dot marks the last token.",
        "; ".join(said) + ".",
    )


def bytes_a_token(shown: Sequence[Served]) -> Chart | None:
    """Bytes up and down for each token of the answers, stacked by kind of message."""

    def parts() -> Iterable[Bar]:
        for way in ("up", "down"):
            for one in shown:
                count = max(sum(len(answer.tokens) for answer in one.answers), 1)
                table = one.ledger.where(one.ledger["what"] == "crossing")
                for kind in dict.fromkeys(table["kind"]):
                    mask = (table["kind"] == kind) & (table["way"] == way)
                    part = kind or "other"
                    yield Bar(one.title, way, part, float(table["bytes"][mask].sum()) / count)

    drawn = marks.bars(parts(), shown, units.bytes_text, marks.BYTES)
    return drawn and marks.titled(
        drawn[0],
        "Bytes per token",
        "Honest count, over all tokens of the answers: prompts, framing and indices included.",
        drawn[1],
    )


def charts(shown: Sequence[Served]) -> dict[str, Chart]:
    """The charts that these can fill, by name."""
    drawn = {"race": tokens_over_time(shown), "bytes-per-token": bytes_a_token(shown)}
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _places(ends: Mapping[str, float], right: float) -> dict[str, float]:
    """Where to centre each name above its end (0 to `right`), so that none covers another.

    >>> _places({"aaaaaaaaaa": 5.0, "bb": 9.5}, 48.0)
    {'aaaaaaaaaa': 6.0, 'bb': 14.0}
    """
    names = sorted(ends, key=lambda title: ends[title])
    letters = [len(title) + 2 for title in names]
    widths = [right * n / max(_NARROW, sum(letters)) for n in letters]
    least = [sum(widths[:i]) + width / 2 for i, width in enumerate(widths)]
    free = [ends[title] - at for title, at in zip(names, least, strict=True)]
    most = right - sum(widths)
    moved = [max(0.0, min(most, x)) for x in marks.rising(free)]
    return {title: x + at for title, x, at in zip(names, moved, least, strict=True)}


def _ticks(most: float) -> list[float]:
    """Ticks of the tokens, none of them above the last token.

    >>> _ticks(48), _ticks(5)
    ([0, 10, 20, 30, 40], [0, 1, 2, 3, 4, 5])
    """
    step = next(
        each for power in range(9) for n in (1, 2, 5) if (each := n * 10**power) * 5 >= most
    )
    return [step * i for i in range(int(most // step) + 1)]
