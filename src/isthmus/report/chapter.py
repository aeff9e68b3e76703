"""The page's chapter on serving: the table, the race, the bytes, and the texts token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from isthmus.report import race, read, serving, theme, units
from isthmus.report.parts import (
    Cell,
    PageTable,
    Piece,
    Section,
    Talk,
    Voice,
    bytes_cell,
    figures_of,
    number_cell,
)
from isthmus.report.read import RunData
from isthmus.report.serving import Answer, Row, Served, Spoken

_MOST_TALKS = 12


def section(runs: Sequence[RunData]) -> Section | None:
    """The chapter; None where nothing was served."""
    shown = read.served(runs)
    if not shown:
        return None
    rows = serving.closing_table(shown)
    spoken = {token.origin for one in shown for answer in one.answers for token in answer.tokens}
    talks = _talks(shown)
    title = "The texts, token by token"
    if len(talks) > _MOST_TALKS:
        title += f": the first {_MOST_TALKS} of {len(talks)} prompts"
    return Section(
        "serving",
        "Serving",
        _lead(shown),
        tables=[_table(rows)],
        figures=figures_of(race.charts(shown)),
        origins={name: said for name, said in serving.ORIGINS.items() if name in spoken},
        talks_title=title,
        talks=talks[:_MOST_TALKS],
    )


def _lead(shown: Sequence[Served]) -> str:
    """What is compared, and how it was served as far as that is the same for all."""

    def same(values: Iterable[object]) -> str:
        different = {str(value) for value in values}
        return different.pop() if len(different) == 1 else ""

    target, edge, draft, device, link, seed = (
        same(one.about.get(name, "") for one in shown)
        for name in ("target", "edge", "draft", "device", "link", "seed")
    )
    prompts = same(len(one.answers) for one in shown)
    parts = [
        f"{prompts} prompt{'s' * (prompts != '1')}" if prompts else "",
        f"target {target} on {edge}" if target and edge else "",
        f"draft {draft} on {device}" if draft and device else "",
        f"link {serving.link_text(link)}" if link else "",
        f"seed {seed}" if seed else "",
    ]
    said = "; ".join(filter(None, parts))
    return (
        "The target is at the edge, a small draft of it on the device. Drafting saves calls of the "
        "target; the methods differ in what crosses to judge a drafted token."
        + (f" The same for all: {said}." if said else "")
    )


def _table(rows: Sequence[Row]) -> PageTable:
    head = [
        "Method", "Tokens/s", "Up per token", "Down per token", "Acceptance",
        "Target calls per token", "Energy per token", "Target's law",
    ]  # fmt: skip
    lines = []
    for row, dot in zip(rows, theme.colours("run", len(rows)), strict=True):
        stood = row.acceptance
        lines.append([
            Cell(row.title, colour=dot),
            number_cell(row.per_second, units.number, "tokens a virtual second"),
            bytes_cell(row.bytes_up),
            bytes_cell(row.bytes_down),
            Cell("–", "nothing was drafted") if stood is None else Cell(
                f"{stood:.0%}", f"{row.accepted:,} of {row.judged:,} judged tokens", repr(stood)
            ),
            number_cell(row.target_calls, "{:.2f}".format, "verdicts a token"),
            number_cell(row.joules, units.joules_text, f"joules {row.joules_source}".strip()),
            Cell("kept" if row.lossless else "not kept"),
        ])  # fmt: skip
    sources = " and ".join(sorted({row.joules_source for row in rows if row.joules_source}))
    caption = (
        "Over all texts, in virtual time. Energy is that of the device's computing and radio"
        f"{', ' if sources else ''}{sources}."
    )
    return PageTable(caption, head, [False] + [True] * 7, lines)


def _talks(shown: Sequence[Served]) -> list[Talk]:
    """The answers by prompt, the first prompt's open, each method's in its colour."""
    colour = dict(zip((one.title for one in shown), theme.colours("run", len(shown)), strict=True))
    by_prompt: dict[tuple[str, str], list[tuple[Served, Answer]]] = {}
    for one in shown:
        for answer in one.answers:
            by_prompt.setdefault((answer.owner, answer.prompt), []).append((one, answer))
    return [
        Talk(
            title=owner,
            prompt=" ".join(prompt.split()),
            voices=[_voice(one, answer, colour[one.title]) for one, answer in said],
            folded=number > 0,
        )
        for number, ((owner, prompt), said) in enumerate(by_prompt.items())
    ]


def _voice(one: Served, answer: Answer, colour: str) -> Voice:
    pieces = [_piece(token) for token in answer.tokens if token.text]
    note = f"{len(answer.tokens)} tokens in {units.seconds_text(answer.seconds)}"
    problem = f"; {answer.problem}" if answer.problem else ""
    return Voice(one.title, colour, note + problem, pieces)


def _piece(token: Spoken) -> Piece:
    """A token as it is shown; the space before a word is not underlined with it."""
    text = token.text.lstrip(" ") or token.text
    space = token.text[: len(token.text) - len(text)]
    return Piece(space, text, token.origin, f"{token.origin}, {units.seconds_text(token.t)}")
