"""What is learned: tasks, their metrics and how their data are divided among owners."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.tasks.contract import Card as Card
    from isthmus.tasks.contract import Metric as Metric
    from isthmus.tasks.contract import Stage as Stage
    from isthmus.tasks.contract import Task as Task
    from isthmus.tasks.contract import roles as roles
    from isthmus.tasks.items import Batch as Batch
    from isthmus.tasks.items import Items as Items
    from isthmus.tasks.items import Splits as Splits
    from isthmus.tasks.items import weighted_mean as weighted_mean
    from isthmus.tasks.own import find as find

_WHERE = {
    "Batch": "items",
    "Items": "items",
    "Splits": "items",
    "weighted_mean": "items",
    "Card": "contract",
    "Metric": "contract",
    "Stage": "contract",
    "Task": "contract",
    "roles": "contract",
    "find": "own",
}

__all__ = [
    "Batch",
    "Card",
    "Items",
    "Metric",
    "Splits",
    "Stage",
    "Task",
    "find",
    "roles",
    "weighted_mean",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
