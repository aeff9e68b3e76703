"""The parts of Flower that it keeps to itself and that running its apps in process needs.

Everything here is outside Flower's public interface and may move with any release, so it stands
in one file; tests/federated/flower/test_internals.py says which versions it is known to fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.supercore.run import Run

KNOWN = ("1.41",)
"""Releases of Flower that this file was checked with."""

SERVER_NODE = 1
"""The node number of the server's side."""


class Code:
    """The numbers of Flower's errors that can happen here."""

    RAISED = 2
    NO_REPLY = 4
    NO_NODE = 5


@contextmanager
def identity(run_id: int) -> Iterator[None]:
    """What a new `Message` takes its sender and its run from, while a server's half runs."""
    from flwr.supercore.task_identity import TaskIdentity

    names = ("_task_id", "_run_id", "_node_id")
    before = [getattr(TaskIdentity, name) for name in names]
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SERVER_NODE
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(TaskIdentity, name, value)


def number(message: Message, id: str) -> None:
    """Give a message its id; elsewhere the SuperLink does that."""
    message.metadata.__dict__["_message_id"] = id


def run_of(run_id: int) -> Run:
    """A run with nothing but its number."""
    from flwr.supercore.run import Run

    return Run.create_empty(run_id)


class Parcel(NamedTuple):
    """A message in transit: its metadata, its content or error as it was, and the bytes in all."""

    head: Any
    held: Any
    size: int


def pack(message: Message, packed: dict[int, tuple[Any, int]]) -> Parcel:
    """A message as it would be sent; what happens to its content later does not reach the parcel.

    `packed` holds the contents that were packed already, by their identity.
    """
    from flwr.common.serde import recorddict_to_proto
    from flwr.common.serde_utils import error_to_proto, metadata_to_proto

    if message.has_error():
        held, length = message.error, error_to_proto(message.error).ByteSize()
    elif (known := packed.get(id(message.content))) is not None:
        held, length = known
    else:
        held, length = own(message.content), recorddict_to_proto(message.content).ByteSize()
        packed[id(message.content)] = held, length
    head = metadata_to_proto(message.metadata)
    return Parcel(head, held, _framed(head.ByteSize()) + _framed(length))


def _framed(length: int) -> int:
    """Bytes of a part of a message: a tag, the length as a base-128 number, and the part."""
    return 1 + max(1, -(-length.bit_length() // 7)) + length


def unpack(parcel: Parcel, last: bool = False) -> Message:
    """The message that a parcel holds, of objects of its own; `last`: nobody else unpacks it."""
    from flwr.app import RecordDict
    from flwr.app.message.message import make_message
    from flwr.common.serde_utils import metadata_from_proto

    metadata = metadata_from_proto(parcel.head)
    if isinstance(parcel.held, RecordDict):
        return make_message(metadata, parcel.held if last else own(parcel.held))
    return make_message(metadata, error=copy(parcel.held))


def own(content: RecordDict) -> RecordDict:
    """A content that shares only what cannot change, as if it had been sent and read again.

    Flower's records check every entry that is put into them; these have been checked.
    """
    made = _twin(content)
    made.__dict__["_data"] = records = {}
    for name, record in content.__dict__["_data"].items():
        records[name] = mine = _twin(record)
        mine.__dict__["_data"] = {
            key: value if isinstance(value, (int, float, str, bytes)) else _twin(value)
            for key, value in record.__dict__["_data"].items()
        }
    return made


def _twin(thing: Any) -> Any:
    """`copy.copy`, in less time for the plain objects that Flower's records and arrays are."""
    held = getattr(thing, "__dict__", None)
    if held is None:
        return copy(thing)
    twin = object.__new__(type(thing))
    twin.__dict__.update(held)
    return twin


def project(folder: Path) -> dict[str, Any]:
    """The app's pyproject.toml; raises `ValueError` or `FileNotFoundError` as Flower does."""
    from flwr.common.config import get_project_config

    return get_project_config(folder)


def fused(defaults: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A run's configuration: the app's defaults, flat, and over them `key=value ...`.

    Raises `ValueError` for a key that the app does not have, or values that cannot be read.
    """
    from click import ClickException
    from flwr.common.config import flatten_dict, fuse_dicts, parse_config_args

    try:
        return fuse_dicts(flatten_dict(dict(defaults)), parse_config_args([text]))
    except ClickException as error:
        raise ValueError(error.message) from error
