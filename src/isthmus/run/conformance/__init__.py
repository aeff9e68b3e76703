"""What every method and every task promises, as checks that need no test runner.

`check` looks at a name of the catalogue or at a user's own `path.py:name`. A promise is a function
that returns a few words on what it saw and raises `Broken` where it is not kept; whatever else is
raised in it counts as broken as well.
"""

from __future__ import annotations

import inspect

from isthmus import catalogue
from isthmus.errors import InputError, unknown
from isthmus.federated.method import Method
from isthmus.run.conformance.methods import method
from isthmus.run.conformance.promise import Broken, Line, demand, said
from isthmus.run.conformance.tasks import task
from isthmus.tasks import own
from isthmus.tasks.contract import Task

__all__ = ["Broken", "Line", "check", "demand", "method", "said", "task"]


def check(reference: str) -> list[Line]:
    """The promises of a method or a task, looked at one after the other.

    Raises `InputError` in one line when the reference leads to neither.
    """
    if ".py:" not in reference:
        methods, tasks = catalogue.names("method"), catalogue.names("task")
        known = {catalogue.key(name): name for name in (*methods, *tasks)}
        if "+" in reference:  # a plug-in over another method
            return method(reference)
        name = known.get(catalogue.key(reference))
        if name is None:
            raise unknown("name", reference, [*methods, *tasks, "path.py:name"])
        return method(name) if name in methods else task(own.find(name))
    try:
        thing = catalogue.find("method", reference)
    except InputError as error:
        field = error.field.replace("method", "name", 1)
        raise InputError(field, error.given, error.allowed, error.nearest) from None
    if isinstance(thing, type) and issubclass(thing, Method):
        return method(reference)
    if isinstance(thing, Task) or inspect.isfunction(thing) or _is_task(thing):
        return task(own.find(reference))
    raise InputError("name", reference, "a Method, a Task, or a function that returns a Task")


def _is_task(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, Task)
