"""`isthmus demo`: devices tune a language model together, then it is served in two parts."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from isthmus.cli.bar import Bar

if TYPE_CHECKING:
    from rich.console import Console

    from isthmus.inference.session import Token
    from isthmus.models.language import Language
    from isthmus.run.serving import Prompt
    from isthmus.tasks.contract import Task

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
"""What every method of act one is given: the same devices, data, steps and adapter."""

METHODS = ("fedmomentum", "fedit", "local-lora")

STORY = (
    "Eight devices hold private text: the documentation of eight parts of a library.",
    "They tune a small language model together. No text leaves a device; adapters do.",
    "The same is done three ways: FedMomentum, FedIT, and every device alone.",
)

AFTERWARDS = (
    "Perplexity is that of each device's own unseen text. The devices' texts are unlike one "
    "another, which favours training alone here; which method ends best depends on the learning "
    "rate."
)

SERVED = ("dssd", "tk-slt", "full-row", "cloud-only", "device-only")
LINK, DEVICE, EDGE = "lte", "phone", "edge-server"
PROMPT, TOKENS, TEMPERATURE = 20, 48, 0.7

SEQUEL = (
    "Now FedMomentum's model is served in two parts: the tuned target on an {edge}, a small draft "
    "of it on each {device}, between them {link}. Each device asks for {tokens} tokens after the "
    "beginning of an unseen text of its own, and is answered five ways: drafted tokens are judged "
    "by scalars (DSSD), by the likeliest words (TK-SLT) or by whole rows; or the target writes "
    "alone, or the draft does."
)

IN_THE_END = (
    "The target is small: its modelled computing takes microseconds, and the link decides. So "
    "the target alone is fast here, at one call a token; drafting saves such calls."
)


def command(
    out: Annotated[Path | None, arg(metavar="DIR", aliases=["-o"], help_behavior_hint="")] = None,
    seed: int = 0,
) -> int:
    """The two-minute tour: devices tune a language model together, then it is served in two parts.

    Args:
        out: A new folder for the runs and the report; by default runs/demo, numbered when taken.
        seed: Of every draw.
    """
    from rich.console import Console

    from isthmus import report
    from isthmus.tasks import own

    console = Console(file=sys.stdout, highlight=False)
    folder = _free(out)
    begun = time.perf_counter()
    task = own.find("text", language="embedded")
    folders = _tune(console, folder, task, seed)
    console.print()
    _serve(console, folders[0], task, seed)
    title = "Devices tune a language model together, and it is served in two parts"
    page = report.write(folders, folder / "report.html", title)
    spent = f"{time.perf_counter() - begun:.0f} seconds in all."
    console.print(f"{spent} Open {page} in a browser.", soft_wrap=True)
    console.print(f"Go on: isthmus serve --model {folders[0]}  (a page and an API)", soft_wrap=True)
    console.print(f"   or: isthmus chat --model {folders[0]}  (here)", soft_wrap=True)
    return 0


def _tune(console: Console, folder: Path, task: Task, seed: int) -> list[Path]:
    """Act one: the same tuning by every method; the folders of the runs."""
    from isthmus import report
    from isthmus.cli.training import Watch
    from isthmus.run import api
    from isthmus.run.config import Config

    console.print("\n".join(STORY), end="\n\n")
    folders: list[Path] = []
    for method in METHODS:
        config = Config.make({**TUNED, "method": method, "seed": seed})
        with Watch(config.rounds, f"{method:<12}") as watch:
            run = api.start(config, folder / method, watch, task, _command(config))
        assert run.folder is not None  # it was given one
        folders.append(run.folder)
    console.print()
    report.terminal(report.read_all(folders), console)
    console.print(AFTERWARDS, style="dim")
    return folders


def _serve(console: Console, run: Path, task: Task, seed: int) -> None:
    """Act two: the tuned model answers the same prompts by every method."""
    from isthmus import report
    from isthmus.cli.serving import few_threads
    from isthmus.models import language
    from isthmus.models.decode import Law
    from isthmus.report.serving import link_text
    from isthmus.run.saved import language_of
    from isthmus.run.serving import serve

    link = link_text(LINK)
    told = SEQUEL.format(device=DEVICE, edge=EDGE, link=link, tokens=TOKENS)
    console.print(told, end="\n\n")
    target, draft = language_of(str(run)), language.load("embedded:draft")
    few_threads(target, draft)
    prompts = _prompts(task, target, seed)
    for method in SERVED:
        with Tokens(f"{method:<12}", len(prompts) * TOKENS) as heard:
            serve(
                run, target, draft, prompts, method=method, law=Law(temperature=TEMPERATURE),
                max_new_tokens=TOKENS, seed=seed, stop=(), link=LINK, device=DEVICE, edge=EDGE,
                listen=heard,
            )  # fmt: skip
    console.print()
    report.terminal_serving(report.read_all([run]), console)
    console.print(IN_THE_END, style="dim")


def _prompts(task: Any, target: Language, seed: int) -> list[Prompt]:
    """The beginning of each device's first unseen text that is long enough."""
    from isthmus.run.serving import Prompt

    test = task.synthesise(seed).test
    special = set(target.tokenizer.all_special_ids)
    found: dict[str, list[int]] = {}
    for owner, row in zip(test.group, test.columns["tokens"].tolist(), strict=True):
        for at, token in enumerate(row[: len(row) - PROMPT]):
            ids = row[at : at + PROMPT]
            if token == target.tokenizer.eos_token_id and not special & set(ids[1:]):
                found.setdefault(owner, ids)
    return [Prompt(ids, owner) for owner, ids in found.items()]


class Tokens(Bar):
    """Shows the tokens of all answers as devices have them."""

    count = 0

    def __call__(self, index: int, token: Token) -> None:
        self.count += 1
        line = f"{self.count} tokens, {token.t:.3g} virtual s"
        plain = f"{self.title}: {line}" if self.count == self.total else ""
        self.show(self.count, f"{token.t:.3g} virtual s", plain)


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
