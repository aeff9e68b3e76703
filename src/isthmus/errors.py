"""The two ways a user's input can be wrong, each said in one line."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class InputError(ValueError):
    """Bad input: names the field, what was given and what is allowed.

    >>> print(InputError("clients", 0, "1 or more"))
    clients: 0 given, allowed: 1 or more
    """

    def __init__(self, field: str, given: object, allowed: str, nearest: str | None = None) -> None:
        self.field, self.given, self.allowed, self.nearest = field, given, allowed, nearest
        tail = f"; nearest: {nearest}" if nearest else ""
        super().__init__(f"{field}: {given!s} given, allowed: {allowed}{tail}")

    def __reduce__(self) -> tuple[Any, ...]:
        """As it was made, so that it comes whole out of another process."""
        return type(self), (self.field, str(self.given), self.allowed, self.nearest)


class MissingExtra(ImportError):
    """An optional part is not installed: names the extra that brings it."""


def unknown(field: str, given: str, choices: Iterable[str]) -> InputError:
    """The error for a name that is not among `choices`, with the nearest one.

    >>> print(unknown("method", "fedvag", ["fedavg", "scaffold"]))
    method: fedvag given, allowed: fedavg, scaffold; nearest: fedavg
    """
    names = list(choices)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return InputError(field, given, ", ".join(names) or "nothing", near[0] if near else None)


def need(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise `MissingExtra` with the one line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        raise MissingExtra(
            f"{top} is not installed: pip install 'isthmus[{extra}]' brings it"
        ) from error
