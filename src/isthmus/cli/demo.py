"""`isthmus demo`: devices tune a language model together, and every byte is counted."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

TUNED = {
    "task": "text",
    "model": "embedded",
    "clients": 8,
    "rounds": 4,
    "steps": 5,
    "batch": 4,
    "lr": 5e-3,
    "evaluate": 1,
    "evaluate_items": 8,
    "settings": {"rank": 8, "alpha": 16.0, "targets": "all-linear"},
}
"""What every method of the demo is given: the same devices, data, steps and adapter."""

METHODS = ("fedmomentum", "fedit", "local-lora")

STORY = (
    "Eight devices hold private text: each the documentation of another part of a library.",
    "They tune a small language model together. No text leaves a device; adapters do.",
    "The same is done three ways: FedMomentum, FedIT, and every device alone.",
)


AFTERWARDS = (
    "Perplexity is that of each device's own unseen text. The devices' texts are unlike one "
    "another, which favours training alone here; which method ends best depends on the learning "
    "rate."
)


def command(
    out: Annotated[Path | None, arg(metavar="DIR", aliases=["-o"], help_behavior_hint="")] = None,
    seed: int = 0,
) -> int:
    """The two-minute tour: devices tune a language model together, every byte counted.

    Args:
        out: A new folder for the runs and the report; by default runs/demo, numbered when taken.
        seed: Of every draw.
    """
    from rich.console import Console

    from isthmus import report
    from isthmus.cli.training import Watch
    from isthmus.run import api
    from isthmus.run.config import Config
    from isthmus.tasks import own

    console = Console(file=sys.stdout, highlight=False)
    folder = _free(out)
    begun = time.perf_counter()
    for line in STORY:
        console.print(line)
    console.print()
    folders: list[Path] = []
    task = own.find("text", language="embedded")
    for method in METHODS:
        config = Config.make({**TUNED, "method": method, "seed": seed})
        watch = Watch(config.rounds, f"{method:<12}")
        with watch:
            run = api.start(config, folder / method, watch, task, _command(config))
        assert run.folder is not None  # it was given one
        folders.append(run.folder)
    console.print()
    read = report.read_all(folders)
    report.terminal(read, console)
    console.print(AFTERWARDS, style="dim")
    page = report.write(folders, folder / "report.html", "Devices tune a language model together")
    console.print(f"{time.perf_counter() - begun:.0f} seconds in all. Open {page} in a browser.")
    console.print(f"Go on with the tuned model: isthmus generate --model {folders[0]} 'Return the'")
    return 0


def _free(out: Path | None) -> Path:
    """The folder to write to: the given one if new or empty, or the first free runs/demo-N."""
    from isthmus.errors import InputError

    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError("out", out, "a new or empty folder")
        return out
    number, folder = 1, Path("runs/demo")
    while folder.exists():
        number += 1
        folder = Path(f"runs/demo-{number}")
    return folder


def _command(config: Any) -> list[str]:
    """The command that repeats one of the demo's runs on its own."""
    words = ["isthmus", "tune", "--method", config.method, "--rounds", str(config.rounds)]
    words += ["--steps", str(config.steps), "--lr", str(config.lr)]
    words += ["--evaluate-items", str(config.evaluate_items)]
    settings = [f"settings.{name}={value}" for name, value in config.settings.items()]
    return [*words, "--seed", str(config.seed), "--set", *settings]
