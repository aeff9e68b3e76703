"""`isthmus tune`: tune a language model's adapter over many clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from isthmus.cli.training import keys_of, play, with_options
from isthmus.run.api import TUNE


@with_options(TUNE)
def command(
    config: Annotated[
        Path | None, arg(metavar="FILE", aliases=["-c"], help_behavior_hint="")
    ] = None,
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help_behavior_hint="")] = (),
    out: Annotated[Path | None, arg(metavar="DIR", aliases=["-o"], help_behavior_hint="")] = None,
    resume: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    report: bool = False,
    **keys: Any,
) -> int:
    """Tune a language model's LoRA adapter over clients that keep their text.

    Args:
        config: A YAML file of the keys below; options given here come after it.
        set: Any key, also a method's own settings: --set settings.rank=4
        out: A new folder that keeps configuration, ledger, metrics, checkpoints and adapter.
        resume: Continue the run in this folder; everything else is as it was.
        report: Write report.html into the folder at the end.
    """
    made = None if resume is not None else keys_of(TUNE, config, keys, set)
    return play(made, out, resume, report)
