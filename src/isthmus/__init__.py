"""One house and one measure for models that live partly on devices and partly on servers.

The names below are resolved on first use, so `import isthmus` is instant and importing one part
never imports a part above it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.catalogue import systems as systems
    from isthmus.errors import InputError as InputError
    from isthmus.run.api import Run as Run
    from isthmus.run.api import load as load
    from isthmus.run.api import train as train
    from isthmus.run.api import tune as tune
    from isthmus.tasks.own import Task as Task

__version__ = "0.1.0"

__all__ = ["train", "tune", "load", "Task", "Run", "systems", "InputError", "__version__"]

_HOMES = {
    "train": "isthmus.run.api",
    "tune": "isthmus.run.api",
    "load": "isthmus.run.api",
    "Run": "isthmus.run.api",
    "Task": "isthmus.tasks.own",
    "systems": "isthmus.catalogue",
    "InputError": "isthmus.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
