"""Pieces with options in one word: `krum:f=2`, `sign-flip:scale=3`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, cast

import yaml

from isthmus import catalogue
from isthmus.errors import InputError, unknown


def make(place: str, text: str, **more: Any) -> Any:
    """The object registered in `place` under the name before the colon, made with its options.

    `more` are options that the run fills in where the piece takes them. Raises `InputError`
    naming an unknown piece or option, or a value that is no number or word.
    """
    name, _, rest = text.partition(":")
    factory = kind_of(place, text)
    takes = (
        {f.name for f in dataclasses.fields(factory) if f.init}
        if dataclasses.is_dataclass(factory)
        else set(inspect.signature(factory).parameters)
    )
    options: dict[str, Any] = {key: value for key, value in more.items() if key in takes}
    for part in filter(None, (word.strip() for word in rest.split(","))):
        key, sign, value = part.partition("=")
        if not sign:
            raise InputError(f"{place} {name}", part, "options as name=value")
        if key not in takes:
            raise unknown(f"{place} {name}", key, sorted(takes))
        options[key] = yaml.safe_load(value)
    try:
        return cast(Any, factory)(**options)
    except TypeError as error:
        raise InputError(place, text, f"{name} with {', '.join(sorted(takes))}") from error


def kind_of(place: str, text: str) -> Any:
    """What is registered in `place` under the name before the colon."""
    return catalogue.find(place, text.partition(":")[0].strip())
