"""What `train` and `tune` have in common: their options, and what is shown while a run goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import arg

from isthmus.cli.bar import Bar
from isthmus.run import api
from isthmus.run.config import Config, assign


def with_options(defaults: Mapping[str, Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command one option for every key of `Config`, after its own.

    An option that is not given is not passed, so that a YAML file can say it instead.
    """

    def wrap(command: Callable[..., int]) -> Callable[..., int]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            p.replace(annotation=hints[p.name], kind=Parameter.KEYWORD_ONLY)
            for p in signature(command).parameters.values()
            if p.kind is not Parameter.VAR_KEYWORD
        ]
        more = [
            _option(name, field, defaults.get(name, field.default))
            for name, field in Config.model_fields.items()
            if name != "settings"
        ]
        command.__signature__ = signature(command).replace(parameters=own + more)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in own + more} | {"return": int}
        return command

    return wrap


def _option(name: str, field: Any, default: Any) -> Parameter:
    """One key as an option. Its words are read by `Config`, whose errors name the key."""
    kind = get_args(field.annotation) if get_origin(field.annotation) is UnionType else ()
    inner = next((k for k in kind if k is not type(None)), field.annotation)
    several = get_origin(inner) is tuple
    words = " ".join(map(str, default)) if several else default
    hint = "" if default in (None, ()) else f"(default: {words})"
    if inner is bool:
        taken: Any = bool
    elif several:
        taken = tuple[str, ...]
    else:
        taken = str | None
    metavar = {int: "N", float: "X", Path: "DIR"}.get(inner, "TEXT")
    if get_origin(inner) is Literal:
        metavar = "{" + ",".join(get_args(inner)) + "}"
    if several:
        metavar = "TEXT ..." if get_args(inner)[0] is str else "N ..."
    said = arg(
        help=field.description, help_behavior_hint=hint, metavar=None if taken is bool else metavar
    )
    empty = False if taken is bool else () if several else None
    return Parameter(name, Parameter.KEYWORD_ONLY, default=empty, annotation=Annotated[taken, said])


def keys_of(
    defaults: Mapping[str, Any],
    file: Path | None,
    given: Mapping[str, Any],
    assignments: tuple[str, ...],
) -> Config:
    """The configuration: defaults, then the file, then the options, then `--set`."""
    keys = {**defaults, **(Config.read(file) if file is not None else {})}
    keys |= {name: value for name, value in given.items() if value not in (None, (), False)}
    return Config.make(assign(keys, assignments))


def play(config: Config | None, out: Path | None, resume: Path | None, report: bool) -> int:
    """Start or resume a run, show it, and say what it came to."""
    watch = Watch(config.rounds if config is not None else None)
    with watch:
        if resume is not None:
            run = api.resume(resume, watch)
        else:
            assert config is not None  # without --resume there is one
            run = api.start(config, out, watch, command=["isthmus", *sys.argv[1:]])
    print(run)
    if run.folder is not None:
        print(f"run folder: {run.folder}")
        if report:
            from isthmus.report import write

            print(f"report: {write([run.folder], run.folder / 'report.html')}")
    return 0


class Watch(Bar):
    """Shows rounds as they end."""

    def __init__(self, rounds: int | None, title: str = "") -> None:
        super().__init__(title or "rounds", rounds)
        self._said = f"{title}: " if title else ""

    def __call__(self, report: Any, rows: list[dict[str, Any]]) -> None:
        line = describe(report, rows)
        self.show(report.round, line, f"{self._said}round {report.round}: {line}")


def describe(report: Any, rows: list[dict[str, Any]]) -> str:
    """One round in words."""
    words = [] if report.round == 0 else [f"training loss {report.loss:.4f}"]
    for row in rows:
        if row["scope"] == "global":
            known = {
                k: v for k, v in row.items() if k in ("accuracy", "perplexity", "f1", "r2", "loss")
            }
            name = next(iter(known), None)
            if name is not None:
                words.append(f"test {name} {known[name]:.4g}")
    words.append(f"{report.now:.4g} virtual s")
    return ", ".join(words)
