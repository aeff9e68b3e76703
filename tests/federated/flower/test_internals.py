"""The private parts of Flower on which the in-process grid stands are where we think they are."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import pytest

from isthmus.federated.flower import internals, ready
from isthmus.federated.flower.grid import Grid

pytest.importorskip("flwr")
ready()


def test_the_version_is_one_that_was_looked_at() -> None:
    release = ".".join(version("flwr").split(".")[:2])
    assert release in internals.KNOWN, f"check federated/flower/internals.py with flwr {release}"


def test_the_grid_has_what_flowers_has() -> None:
    from flwr.serverapp import Grid as Theirs

    for name in Theirs.__abstractmethods__ | {"get_nodes"}:
        theirs, ours = getattr(Theirs, name), getattr(Grid, name)
        if not isinstance(theirs, property):
            wanted = [
                (p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()
            ]
            given = [
                (p.name, p.kind, p.default) for p in inspect.signature(ours).parameters.values()
            ]
            assert given == wanted, name


def test_identity_is_put_back() -> None:
    from flwr.app import Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    before = [TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id]
    with internals.identity(17):
        message = Message(RecordDict(), 5, "train")
        assert (message.metadata.run_id, message.metadata.src_node_id) == (17, 1)
    assert [TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id] == before


def test_the_numbers_of_errors_are_flowers() -> None:
    from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

    assert internals.SERVER_NODE == SUPERLINK_NODE_ID
    assert internals.Code.RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert internals.Code.NO_REPLY == ErrorCode.REPLY_MESSAGE_UNAVAILABLE
    assert internals.Code.NO_NODE == ErrorCode.NODE_UNAVAILABLE


def test_a_message_counts_the_bytes_that_flower_would_send() -> None:
    import numpy as np
    from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
    from flwr.common.serde import message_to_proto

    with internals.identity(2**62 + 3):
        for length in (0, 1, 40, 20_000):
            arrays = ArrayRecord([np.arange(length, dtype=np.float32)])
            content = RecordDict({"a": arrays, "c": ConfigRecord({"k": [1, 2], "b": b"\0\1"})})
            message = Message(content, 2**63 + 1, "evaluate.mine", group_id="4")
            internals.number(message, "m1")
            parcel = internals.pack(message, {})
            assert parcel.size == message_to_proto(message).ByteSize()
            back = internals.unpack(parcel)
            assert back.content == content and back.content is not content
            assert vars(back.metadata) == vars(message.metadata)
            failed = Message(Error(2, "why" + "x" * length), reply_to=message)
            parcel = internals.pack(failed, {})
            assert parcel.size == message_to_proto(failed).ByteSize()
            assert internals.unpack(parcel).error == failed.error


def test_what_is_taken_out_of_a_parcel_is_nobody_elses() -> None:
    """Lists and arrays can change in place; a change reaches neither the sender nor another."""
    import numpy as np
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

    with internals.identity(3):
        record: Any = RecordDict(
            {
                "a": ArrayRecord([np.arange(3.0)]),
                "c": ConfigRecord({"k": [1, 2]}),
                "m": MetricRecord({"x": [0.5]}),
            }
        )
        message = Message(record, 5, "train")
        parcel = internals.pack(message, {})
        record["c"]["k"].append(3)
        one: Any = internals.unpack(parcel).content
        two: Any = internals.unpack(parcel).content
        assert one["c"]["k"] == [1, 2]
        one["c"]["k"].append(9)
        one["m"]["x"][0] = 7.0
        one["a"]["0"].data = b"other"
        one["c"]["new"] = 1
        assert dict(two["c"]) == {"k": [1, 2]} and two["m"]["x"] == [0.5]
        for content in (two, record):
            assert content["a"]["0"].numpy().tolist() == [0.0, 1.0, 2.0]
