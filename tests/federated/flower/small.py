"""A task by its path, small enough for every process of a deployment to make its own."""

from __future__ import annotations

from tests.federated import tiny

from isthmus.tasks.contract import Task


def task() -> Task:
    return tiny.task((9, 24, 14), dropout=0.3)
