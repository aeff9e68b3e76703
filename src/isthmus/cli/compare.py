"""`isthmus compare`: several methods on one task, fairly, with everything that it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from isthmus.cli.bar import Bar
from isthmus.cli.training import with_options
from isthmus.run.compare import DEFAULTS, compare
from isthmus.run.config import Config, assign


@with_options(DEFAULTS)
def command(
    methods: Annotated[Positional[tuple[str, ...]], arg(metavar="METHOD ...")],
    config: Annotated[
        Path | None, arg(metavar="FILE", aliases=["-c"], help_behavior_hint="")
    ] = None,
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help_behavior_hint="")] = (),
    out: Annotated[Path | None, arg(metavar="DIR", aliases=["-o"], help_behavior_hint="")] = None,
    seeds: Annotated[int, arg(metavar="N")] = 3,
    rates: Annotated[tuple[float, ...], arg(metavar="X ...", help_behavior_hint="")] = (),
    target: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None,
    jobs: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None,
    **keys: Any,
) -> int:
    """Run several methods on one task, each at its own best learning rate, over several seeds.

    Args:
        methods: fedavg, fedprox:mu=0.1, dbe+fedavg, fedavg@fedbuff:k=5, path.py:Mine ...
        config: A YAML file of the keys below; options given here come after it.
        set: Any key of a run, for all methods: --set epochs=2
        out: A folder for every run, the page and the CSV; started again, it goes on where it was.
        seeds: Runs of each method that make the means.
        rates: Learning rates to choose from; for SGD 0.01 0.03 0.1 0.3 without it.
        target: A validation score; without it, the one with which the first method ends.
        jobs: Runs at a time, one thread each; the number of cores without it.
    """
    from rich.console import Console

    given = {**(Config.read(config) if config is not None else {})}
    given |= {name: value for name, value in keys.items() if value not in (None, (), False)}
    with Bar("runs", None) as bar:
        found = compare(
            methods,
            seeds=seeds,
            rates=rates,
            target=target,
            out=out / "runs" if out is not None else None,
            jobs=jobs,
            said=lambda what, done, of: bar.show(done, f"{done} of {of}: {what}", what),
            **assign(given, set),
        )
    from isthmus.report import comparison

    comparison.terminal(found, Console(file=sys.stdout))
    if out is not None:
        task = Path(str(given.get("task", Config.model_fields["task"].default))).name
        print(comparison.write_csv(found, out / "comparison.csv"))
        print(comparison.write_page(found, out / "comparison.html", f"Methods on {task}"))
    return 0
