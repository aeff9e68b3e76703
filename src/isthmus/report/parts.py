"""What a page is made of: cells, tables, charts, texts by token, blocks, and sections of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.report import marks, units


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, its exact value on hover, what it sorts by, a small note."""

    text: str
    exact: str = ""
    sort: str = ""
    note: str = ""
    colour: str = ""


@dataclass(frozen=True)
class PageTable:
    """A table: its caption, the column names, which columns are numbers, the rows.

    `folded` puts it behind its caption, closed or open; None shows it plainly.
    """

    caption: str
    head: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[Cell]]
    folded: bool | None = None


@dataclass(frozen=True)
class Figure:
    """A chart of the page: words for the reader, the specification for the browser."""

    slug: str
    title: str
    caption: str
    description: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Block:
    """Text shown as it is: folded behind its title, or below it."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Piece:
    """One token of a text: the space before it, its letters, who produced it, and when in words."""

    space: str
    text: str
    origin: str
    said: str


@dataclass(frozen=True)
class Voice:
    """One answer to a prompt: whose, a note on it, its tokens."""

    name: str
    colour: str
    note: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Talk:
    """A prompt, whose it is, and what it was answered; closed where others come before it."""

    title: str
    prompt: str
    voices: list[Voice]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """One part of the page, shown in this order: lead, tables, figures, talks, blocks.

    `origins` are the words of the talks' legend, by origin; `talks_title` stands above it.
    """

    slug: str
    title: str
    lead: str = ""
    tables: list[PageTable] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    talks_title: str = ""
    origins: Mapping[str, str] = field(default_factory=dict)
    talks: list[Talk] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


def figures_of(charts: Mapping[str, marks.Chart]) -> list[Figure]:
    """Charts for the page: their words leave the specification, the page shows them as text."""
    drawn = []
    for slug, chart in charts.items():
        spec = chart.to_dict(validate=False)
        said = spec.pop("title")
        spec.pop("config", None)
        caption = " ".join(said["subtitle"])
        drawn.append(Figure(slug, said["text"], caption, spec.pop("description"), spec))
    return drawn


def quality_cell(value: float | None, note: str = "") -> Cell:
    """A quality, and a note."""
    sort = "" if value is None else repr(value)
    return Cell(units.number(value), units.exact(value), sort, note)


def bytes_cell(count: float, values: int = 0) -> Cell:
    """A count of bytes; on hover exactly, with the count of values alone."""
    exact = units.exact(count, "bytes") + (f"; values only: {values:,}" if values else "")
    return Cell(units.bytes_text(count), exact, str(count))


def number_cell(value: float, said: Callable[[float], str], unit: str, note: str = "") -> Cell:
    """A number as `said` says it; on hover exactly, with its unit."""
    return Cell(said(value), units.exact(value, unit), repr(value), note)


def joules_cell(value: float, source: str = "") -> Cell:
    """Joules, and where they come from."""
    if not value:
        return Cell("–", "not recorded", "0")
    return number_cell(value, units.joules_text, f"joules {source}".strip(), source)
