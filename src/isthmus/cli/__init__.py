"""The `isthmus` command.

A verb is one module of this folder, `isthmus/cli/<verb>.py` (`-` becomes `_`), imported only when
the verb is used. It defines

    def command(...) -> int

whose parameters are the options (read by tyro: types, defaults, and the `Args:` of its docstring)
and whose result is the exit status. Its line of help stands in `VERBS` below; a verb without a
module is not shown.

An exception class that the package itself defines is a message to the user: it is printed as one
line and the status is 2. Any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from isthmus import __version__
from isthmus.errors import unknown

VERBS: dict[str, dict[str, str]] = {
    "Start here": {
        "demo": "devices tune a language model together, then it is served in two parts",
        "systems": "every system of the catalogue, with its status",
    },
    "Train": {
        "train": "train a model over many clients with one method",
        "tune": "tune a language model's adapter over many clients",
        "compare": "run several methods on one task, or put finished runs side by side",
        "plan": "what a run would send, compute and cost, without running it",
        "report": "write a run's report again, as one self-contained page",
    },
    "Serve": {
        "generate": "continue a text with a language model",
        "serve": "an OpenAI-compatible server in two parts",
        "chat": "talk to a served model in the terminal",
        "compress": "make a model smaller",
        "registry": "which models fit a device, which devices can run a model",
    },
    "Trust": {
        "attack": "run an attack beside no attack and a random attacker",
    },
    "Check": {
        "claim": "reproduce a paper's claim in miniature",
        "bench": "the comparison tables",
        "check": "run the contract tests on your own method or task",
        "flower-run": "run an unmodified Flower app in this process, every message counted",
    },
}

EXAMPLES = (
    "isthmus demo",
    "isthmus systems --family llm",
    "isthmus train --task digits --method fedavg --clients 20",
    "isthmus train --help",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status: 2 for bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except SystemExit as end:  # tyro ends so, after --help and after options it cannot read
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, like `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if not type(error).__module__.startswith("isthmus."):
            raise
        print(f"isthmus: {error}", file=sys.stderr)
        return 2


def verbs() -> dict[str, dict[str, str]]:
    """The verbs that exist, in their groups."""
    here = {path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.py")}
    groups = {
        group: {verb: line for verb, line in rows.items() if verb in here}
        for group, rows in VERBS.items()
    }
    return {group: rows for group, rows in groups.items() if rows}


def overview() -> str:
    """What `isthmus --help` prints."""
    shown = verbs()
    known = {verb for rows in shown.values() for verb in rows}
    lines = [
        "usage: isthmus VERB [OPTIONS]",
        "",
        "Models that live partly on devices and partly on servers: train, serve, compress, attack",
        "and protect them, with every message encoded, sent and counted.",
    ]
    for group, rows in shown.items():
        lines += ["", group, *(f"  {verb:<12}{line}" for verb, line in rows.items())]
    examples = [line for line in EXAMPLES if line.split()[1] in known]
    lines += ["", "Examples", *(f"  {line}" for line in examples)]
    lines += ["", "isthmus VERB --help shows a verb's options; isthmus --version the version."]
    return "\n".join(lines)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"isthmus {__version__}")
        return 0
    verb = arguments[0]
    known = [name for rows in verbs().values() for name in rows]
    if verb not in known:
        raise unknown("verb", verb, known)
    module = importlib.import_module(f"isthmus.cli.{verb.replace('-', '_')}")
    status = _bound(module.command, verb, arguments[1:])()
    sys.stdout.flush()
    return status


def _bound(command: Callable[..., int], verb: str, arguments: list[str]) -> Callable[[], int]:
    """`command` with its options read from the arguments, not yet run."""
    import tyro

    @functools.wraps(command)
    def bind(*args: Any, **options: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **options)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                bind,
                prog=f"isthmus {verb}",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit:
        if said.getvalue():
            print(f"isthmus: {_one_line(said.getvalue())}", file=sys.stderr)
        raise


def _one_line(box: str) -> str:
    """The text of a framed message as one line.

    >>> _one_line("╭─ Oops ────╮\\n│ Unknown:  │\\n│ --foo     │\\n│ ───────── │\\n│ See help  │")
    'Unknown: --foo; See help'
    """
    rows = [row.strip().strip("│|").strip() for row in box.splitlines()]
    body = [row for row in rows if row and row[0] not in "╭╰┌└+"]
    parts = " ".join("\n" if set(row) <= set("─-") else row for row in body).split("\n")
    return "; ".join(part.strip() for part in parts)
