"""`isthmus registry`: which models fit a device, which devices can run a model."""

from __future__ import annotations

import json as codec
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from isthmus.devices.registry import Fit, Registry
from isthmus.errors import InputError

Ask = Literal["models", "devices", "validate", "deploy"]
TAKES = {"models": "a DEVICE", "devices": "a MODEL", "deploy": "a MODEL and a DEVICE"}


def command(
    ask: Positional[Ask],
    names: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME ...")] = (),
    graph: Annotated[Path | None, arg(metavar="FILE")] = None,
    save: Annotated[Path | None, arg(metavar="FILE")] = None,
    json: bool = False,
) -> int:
    """Which models fit a device, and which devices can run a model.

    `models DEVICE` and `devices MODEL` list what fits, most free RAM first; `validate FILE ...`
    says what is incomplete, with exit status 1; `deploy MODEL DEVICE` prints the descriptor of a
    deployment and writes it into the graph.

    Args:
        ask: models, devices, validate or deploy.
        names: A device, a model, or both; for validate, Turtle files.
        graph: The Turtle file to ask; the example that ships with the package where not given.
        save: Where `deploy` writes the graph; --graph where not given.
        json: Print JSON.
    """
    if ask == "validate":
        return _validate([Path(each) for each in names] or [graph])
    if len(names) != (2 if ask == "deploy" else 1):
        raise InputError(ask, " ".join(names) or "nothing", TAKES[ask])
    registry = Registry.load(graph)
    if ask == "deploy":
        descriptor = registry.deploy(*names)
        target = save or graph
        if target is not None:
            registry.save(target)
        print(codec.dumps(descriptor, indent=2, ensure_ascii=False))
        return 0
    fits = registry.models_for(names[0]) if ask == "models" else registry.devices_for(names[0])
    if json:
        print(codec.dumps([fit._asdict() for fit in fits], indent=2, ensure_ascii=False))
    else:
        _lines(fits, ask)
    return 0


def _validate(paths: list[Path] | list[Path | None]) -> int:
    wrong = 0
    for path in paths:
        lines = Registry.read(path).violations()
        for line in lines or ["every entry is complete"]:
            print(f"{path or 'example'}: {line}")
        wrong += len(lines)
    return int(wrong > 0)


def _lines(fits: list[Fit], ask: Ask) -> None:
    for fit in fits:
        name = fit.model if ask == "models" else fit.device
        print(f"{name:<24} {fit.free_ram:>12,} B RAM and {fit.free_flash:>12,} B flash stay free")
    if not fits:
        print("nothing fits")
