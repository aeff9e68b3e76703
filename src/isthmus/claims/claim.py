"""A claim: what a paper says, what a small run here shows, and whether the two agree.

The claim of a system is a file of this folder, `<name>.py` (`-` becomes `_`). Its docstring says
what the paper claims, what is run and how the thresholds were set; its one public function is

    def claim(progress: Progress) -> list[Check]

A check is a direction with a size: its threshold is about half of the gap that several seeds
showed. Checks are never tuned until they hold; what does not hold is a figure, and the system's
status says so.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from isthmus import catalogue, claims
from isthmus.catalogue import System
from isthmus.errors import InputError


class Check(NamedTuple):
    """One point of a claim: what the paper says, what was measured here, whether it holds."""

    name: str
    paper: str
    here: str
    holds: bool


Progress = Callable[[str], None]
"""Told in a few words what is being run."""


class Outcome(NamedTuple):
    """The checks of one system, beside the status that the catalogue gives it."""

    system: str
    status: str
    checks: list[Check]

    @property
    def contradiction(self) -> str | None:
        """How the checks contradict the status; None when they do not.

        >>> failed = Check("faster", "2 times", "0.9 times", False)
        >>> Outcome("x", "miniature", [failed]).contradiction
        'status miniature, but 1 of 1 checks does not hold'
        >>> Outcome("x", "not-reproduced", [failed]).contradiction
        """
        failed = sum(not check.holds for check in self.checks)
        if self.status == "not-reproduced":
            return None if failed else "status not-reproduced, but every check holds"
        if self.status in ("miniature", "verified") and failed:
            verb = "does" if failed == 1 else "do"
            return (
                f"status {self.status}, but {failed} of {len(self.checks)} checks {verb} not hold"
            )
        return None

    @property
    def passed(self) -> bool:
        """Every check holds; or the status already says that the claim was not reproduced."""
        if self.status == "not-reproduced":
            return self.contradiction is None
        return all(check.holds for check in self.checks)


def names() -> list[str]:
    """The systems that have a claim, in the order of the catalogue."""
    return [system.name for system in catalogue.systems(all=True) if _has_claim(system)]


def run(name: str, progress: Progress = lambda said: None) -> Outcome:
    """Run the claim of a system, named in any spelling, on one thread of arithmetic.

    Raises `InputError` in one line for an unknown system and for one that has no claim yet.
    """
    listing = {catalogue.key(system.name): system for system in catalogue.systems(all=True)}
    system = listing.get(catalogue.key(name))
    if system is None:
        near = difflib.get_close_matches(catalogue.key(name), list(listing), n=1, cutoff=0.5)
        nearest = listing[near[0]].name if near else None
        raise InputError("claim", name, ", ".join(names()), nearest)
    if not _has_claim(system):
        given = f"{system.name} ({system.status}, no claim yet)"
        raise InputError("claim", given, ", ".join(names()))
    module = importlib.import_module(f"{claims.__name__}.{_stem(system)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        checks = list(module.claim(progress))
    finally:
        torch.set_num_threads(threads)
    return Outcome(system.name, system.status, checks)


def _stem(system: System) -> str:
    return system.name.replace("-", "_")


def _has_claim(system: System) -> bool:
    return any((Path(folder) / f"{_stem(system)}.py").is_file() for folder in claims.__path__)
