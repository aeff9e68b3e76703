"""A promise and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One promise: what it is, whether it is kept, and what was seen."""

    name: str
    ok: bool
    detail: str


class Broken(Exception):
    """A promise that is not kept; the message says how."""


def said(name: str, promise: Callable[..., str], *given: Any) -> Line:
    """One promise as a line: the words that `promise(*given)` returns, or how it was broken.

    >>> said("holds", lambda: "seen")
    Line(name='holds', ok=True, detail='seen')
    >>> said("raises", lambda: 1 / 0)
    Line(name='raises', ok=False, detail='ZeroDivisionError: division by zero')
    """
    try:
        return Line(name, True, promise(*given))
    except Broken as broken:
        return Line(name, False, str(broken))
    except Exception as error:  # a user's code may raise anything, and that is the finding
        message = str(error).strip().splitlines()
        return Line(name, False, f"{type(error).__name__}: {message[0] if message else ''}")


def demand(holds: Any, how: str) -> None:
    """Raise `Broken` unless it holds."""
    if not bool(holds):
        raise Broken(how)
