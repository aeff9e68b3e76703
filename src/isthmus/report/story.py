"""The runs in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.report import account, serving, units
from isthmus.report.read import RunData, served
from isthmus.report.serving import Served


def heading(runs: Sequence[RunData]) -> str:
    """The page's title where none is given: the runs by name, as long as they are few."""
    names = [run.title for run in runs]
    if len(names) > 3:
        return f"{names[0]} and {_count(len(names) - 1)} other runs"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def summary(runs: Sequence[RunData]) -> str:
    """What happened, in a few plain sentences."""
    rows = account.closing_table(runs)
    measures = account.qualities(runs)
    said = [_opening(runs)]
    shown = rows if len(rows) <= 4 else []
    said += [_sentence(row) for row in shown]
    scored = [row for row in rows if row.after is not None]
    if measures and len(scored) > 1:
        sign = 1 if measures[0].lower else -1
        best = min(scored, key=lambda row: sign * (row.after or 0.0))
        said.append(
            f"{best.run} ended with the best {_plain(best.metric)}, {units.number(best.after)}."
        )
    said += [_served(served(runs))]
    sources = account.sources(runs)
    if sources:
        said.append(f"Energy is {' and '.join(sources)}.")
    return " ".join(filter(None, said))


def _opening(runs: Sequence[RunData]) -> str:
    measures = account.qualities(runs)
    count = {len(account.devices(run, measures[0])) if measures else 0 for run in runs}
    rounds = {int(run.metrics["round"].max(initial=0)) for run in runs}
    runs_text = f"{_count(len(runs))} run{'s' if len(runs) > 1 else ''}".capitalize()
    devices, last = max(count), max(rounds)
    parts = [f"{_count(devices)} device{'s' if devices != 1 else ''}"] if devices else []
    parts += [f"{_count(last)} round{'s' if last != 1 else ''}"] if last else []
    if not parts:
        return f"{runs_text}, no rounds yet."
    most = "up to " if len(count) > 1 or len(rounds) > 1 else ""
    return f"{runs_text}: {most}{', '.join(parts)}."


def _sentence(row: account.Row) -> str:
    if row.after is None:
        return f"{row.run} has no result yet."
    change = f"to {units.number(row.after)}"
    if row.before is not None:
        change = f"from {units.number(row.before)} {change}"
    mean = " (mean of devices)" if row.scope == "mean of devices" else ""
    if row.bytes_up or row.bytes_down:
        cost = f"{units.bytes_text(row.bytes_up)} up and {units.bytes_text(row.bytes_down)} down"
    elif row.bytes_across:
        cost = f"{units.bytes_text(row.bytes_across)} between devices"
    else:
        cost = "nothing sent"
    return (
        f"{row.run} took {_plain(row.metric)} {change}{mean}, with {cost}, "
        f"in {units.seconds_text(row.seconds)} of virtual time."
    )


def _served(shown: Sequence[Served]) -> str:
    """What a token cost on the link, for each method of serving."""
    rows = [(row.title, row.bytes_up + row.bytes_down) for row in serving.closing_table(shown)]
    if not rows:
        return ""
    costs = ", ".join(f"{name} {units.bytes_text(cost)}" for name, cost in rows)
    ways = f"{_count(len(rows))} way{'s' if len(rows) > 1 else ''}"
    return f"Served {ways}, a token of an answer moved: {costs}."


def notes(runs: Sequence[RunData]) -> list[str]:
    """What a reader has to know before trusting the numbers."""
    cut = [run.title for run in runs if run.unfinished]
    if not cut:
        return []
    names = ", ".join(cut)
    return [
        f"Still being written, or stopped while writing: {names}. "
        "The last, incomplete entry is left out."
    ]


def _plain(metric: str) -> str:
    return metric.replace("_", " ")


def _count(n: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[n] if n < len(words) else f"{n:,}"
