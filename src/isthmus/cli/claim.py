"""`isthmus claim`: a paper's claim in miniature, the paper's word beside what is seen here."""

from __future__ import annotations

import json as codec
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from isthmus.claims import claim as claims
from isthmus.claims.claim import Outcome
from isthmus.errors import InputError


def command(
    name: Annotated[Positional[str | None], arg(metavar="NAME", help_behavior_hint="")] = None,
    all: bool = False,
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
) -> int:
    """Reproduce a paper's claim in miniature and hold it against the catalogue's status.

    The exit status is 0 when every check holds and 1 when one does not; a system whose status is
    not-reproduced passes as long as that is what the checks show.

    Args:
        name: The system, as `isthmus systems` lists it.
        all: Every system that has a claim (long).
        json: Write {system, status, checks} to this file (a list with --all); `-` prints.
    """
    if all == (name is not None):
        given = "a name and --all" if all else "nothing"
        raise InputError("claim", given, "one of " + ", ".join(claims.names()) + ", or --all")
    quiet = str(json) == "-"
    outcomes: list[Outcome] = []
    for each in claims.names() if name is None else [name]:
        outcome = _run(each)
        outcomes.append(outcome)
        if not quiet:
            _show(outcome)
    if json is not None:
        rows = [_row(outcome) for outcome in outcomes]
        text = codec.dumps(rows if all else rows[0], indent=2, ensure_ascii=False)
        if quiet:
            print(text)
        else:
            json.write_text(text + "\n", encoding="utf-8")
    return int(any(not outcome.passed for outcome in outcomes))


def _run(name: str) -> Outcome:
    """Progress goes to stderr, so that stdout holds the result alone."""
    if not sys.stderr.isatty():
        return claims.run(name, lambda said: print(f"{name}: {said}", file=sys.stderr, flush=True))
    from rich.console import Console

    with Console(stderr=True).status(name) as status:
        return claims.run(name, lambda said: status.update(f"{name}: {said}"))


def _row(outcome: Outcome) -> dict[str, Any]:
    checks = [check._asdict() for check in outcome.checks]
    return {"system": outcome.system, "status": outcome.status, "checks": checks}


def summary(outcome: Outcome) -> str:
    """The last line of a claim.

    >>> from isthmus.claims.claim import Check
    >>> summary(Outcome("fedit", "miniature", [Check("a", "b", "c", True)]))
    'fedit: 1 of 1 checks holds; status miniature'
    """
    count, total = sum(check.holds for check in outcome.checks), len(outcome.checks)
    line = f"{outcome.system}: {count} of {total} checks {'holds' if count == 1 else 'hold'}; "
    if outcome.contradiction is None:
        return line + f"status {outcome.status}"
    return line + f"CONTRADICTION: {outcome.contradiction}"


def _show(outcome: Outcome) -> None:
    if sys.stdout.isatty():
        _table(outcome)
        return
    for check in outcome.checks:
        verdict = "holds" if check.holds else "FAILS"
        print(f"{verdict}  {check.name} | paper: {check.paper} | here: {check.here}")
    print(summary(outcome))


def _table(outcome: Outcome) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=outcome.system, title_justify="left", box=None, pad_edge=False, expand=True)
    table.add_column("check", style="bold", ratio=3)
    table.add_column("paper", ratio=3)
    table.add_column("here", ratio=4)
    table.add_column("", no_wrap=True)
    for check in outcome.checks:
        verdict = "[green]holds[/]" if check.holds else "[red]fails[/]"
        table.add_row(escape(check.name), escape(check.paper), escape(check.here), verdict)
        table.add_section()
    console.print(table)
    console.print(summary(outcome), style="red" if outcome.contradiction else None)
