"""Flower's `Grid` in one process: every message is encoded, sent over a link and entered.

A client works when it is sent something, one after the other, and takes no virtual time: what a
foreign app computes is not known. What a client reads is what was decoded, so no half can change
the other's objects. The virtual clock stands still while the server computes; asking for replies
moves it to the first one that is due.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from isthmus import seeds
from isthmus.federated.flower.internals import Code, Parcel, number, pack, run_of, unpack
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict

SERVER = "server"

log = logging.getLogger("flwr")


class Due(NamedTuple):
    """A reply, and when the server has it."""

    at: float
    reply: Message


class Grid:
    """Calls `client(message, context)` for every message; has what `flwr.serverapp.Grid` has.

    `contexts` are the nodes by their ids, one context each, which stays with its node. `failed`
    counts the calls that ended in an error; the server gets these as error messages.
    """

    def __init__(
        self,
        client: Callable[[Message, Context], Message],
        contexts: Mapping[int, Context],
        ledger: Ledger,
        link: Link,
        seed: int = 0,
    ) -> None:
        from flwr.serverapp import Grid as Abstract

        Abstract.register(Grid)  # so that an app which asks for its type is told so
        self.client, self.contexts = client, dict(contexts)
        self.ledger, self.link = ledger, link
        self.now, self.failed, self.messages = 0.0, 0, 0
        self._run: Any = run_of(next((c.run_id for c in contexts.values()), 0))
        self._key = seeds.key(seed, "flower")
        self._due: dict[str, Due] = {}
        self._lock = threading.RLock()  # older apps talk to each client from a thread of its own

    # -- what Flower's server half calls ------------------------------------------------

    def set_run(self, run: Any) -> None:
        """Take over the information on the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """Information on the run."""
        return self._run

    def get_node_ids(self) -> list[int]:
        """The ids of the nodes."""
        return list(self.contexts)

    def get_nodes(self) -> list[Any]:
        """The nodes, with nothing but their ids."""
        from flwr.proto.node_pb2 import NodeInfo

        return [NodeInfo(node_id=node) for node in self.contexts]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message to a node."""
        from flwr.app import Message

        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; their ids, which `pull_messages` takes. Unknown nodes are left out."""
        alike = isinstance(messages, list | tuple)
        with self._lock:
            packed: dict[int, tuple[Any, int]] = {}
            asked: list[Message] = []
            parcels: list[Parcel] = []
            for message in messages:
                if message.metadata.dst_node_id not in self.contexts:
                    log.error("no node %d", message.metadata.dst_node_id)
                    continue
                self.messages += 1
                number(message, f"{self.messages:016x}")
                if not alike:  # a generator may change what it has given before
                    packed.clear()
                asked.append(message)
                parcels.append(pack(message, packed))
            if asked:
                self._deliver(asked, parcels)
            return [message.metadata.message_id for message in asked]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages that are due once the first of them is."""
        with self._lock:
            waiting = [(self._due[id].at, id) for id in set(message_ids) if id in self._due]
            if not waiting:
                return []
            self.now = max(self.now, min(waiting)[0])
            return self._take(waiting, self.now)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and wait, at most `timeout` virtual seconds, for the replies."""
        with self._lock:
            until = self.now + (inf if timeout is None else timeout)
            waiting = [(self._due[id].at, id) for id in self.push_messages(messages)]
            if not waiting:
                return []
            self.now = max(self.now, min(until, max(waiting)[0]))
            return self._take(waiting, self.now)

    def _take(self, waiting: list[tuple[float, str]], until: float) -> list[Message]:
        """The replies that are due, the earliest first; where several are, in the order asked."""
        return [self._due.pop(id).reply for at, id in sorted(waiting) if at <= until]

    # -- what happens to a message --------------------------------------------------------

    def _deliver(self, asked: list[Message], parcels: list[Parcel]) -> None:
        nodes = [self.contexts[message.metadata.dst_node_id] for message in asked]
        who = np.array([partition(node) for node in nodes])
        key = seeds.fold(self._key, self.messages)
        sent = self._cross("down", asked, parcels, who, self.now, seeds.fold(key, 1))
        done, here = sent.done.copy(), np.flatnonzero(sent.delivered)
        replies: dict[int, Message] = {}
        if len(here):
            answers = [self._call(unpack(parcels[i]), nodes[i]) for i in here]
            parcels = [pack(answer, {}) for answer in answers]
            up = self._cross("up", answers, parcels, who[here], done[here], seeds.fold(key, 2))
            done[here] = up.done
            for i, parcel, arrived in zip(here.tolist(), parcels, up.delivered, strict=True):
                if not arrived:
                    replies[i] = _error(asked[i], Code.NO_REPLY, "the reply did not arrive")
                else:
                    replies[i] = unpack(parcel, last=True)
        for i, (message, at) in enumerate(zip(asked, done.tolist(), strict=True)):
            if i not in replies:
                replies[i] = _error(message, Code.NO_NODE, "the message did not arrive")
            reply = replies[i]
            self.failed += reply.has_error()
            number(reply, f"{message.metadata.message_id}/reply")
            self._due[message.metadata.message_id] = Due(at, reply)

    def _call(self, message: Message, node: Context) -> Message:
        """A client's answer; what it raises comes back as an error, as from any Flower node."""
        try:
            reply = self.client(message, node)
            if reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise ValueError("the answer is no reply to the message")
        except Exception as error:
            log.exception("client %d failed", partition(node))
            return _error(message, Code.RAISED, f"{type(error)}:<'{error}'>")
        return reply

    def _cross(
        self,
        direction: Any,
        messages: list[Message],
        parcels: list[Parcel],
        who: np.ndarray,
        now: Any,
        key: Any,
    ) -> Any:
        """Send one way and enter it; a message that carries an error is noted `failed`."""
        sizes = np.array([parcel.size for parcel in parcels])
        delivery = self.link.send_many(sizes, direction, now, key=key, index=who)
        clients = [f"client/{client}" for client in who.tolist()]
        delivery.enter(
            self.ledger,
            sender=SERVER if direction == "down" else clients,
            receiver=clients if direction == "down" else SERVER,
            kind=[message.metadata.message_type for message in messages],
            values=np.array([values(message) for message in messages]),
            note=["failed" if message.has_error() else "" for message in messages],
            round=np.array([round_of(message) for message in messages]),
            sequence=who,
        )
        return delivery


def partition(node: Context) -> int:
    """Which part of the data a node has: its number among the clients."""
    return int(node.node_config["partition-id"])


def values(message: Message) -> int:
    """Paper-style count: the bytes of the arrays' values alone."""
    from flwr.app import ArrayRecord

    if message.has_error():
        return 0
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    arrays = [array for record in records for array in record.values()]
    return sum(
        int(np.prod(array.shape, dtype=np.int64)) * np.dtype(array.dtype).itemsize
        if array.dtype and array.stype == "numpy.ndarray"
        else len(array.data)  # older apps do not say what is in the bytes
        for array in arrays
    )


def round_of(message: Message) -> int:
    """The round that a message says it belongs to; 0 where it says nothing."""
    from flwr.app import ConfigRecord

    said = [message.metadata.group_id]
    for record in message.content.values() if message.has_content() else ():
        if isinstance(record, ConfigRecord):
            said.append(str(record.get("server-round")))
    return next((int(word) for word in said if word.isdecimal()), 0)


def _error(message: Message, code: int, reason: str) -> Message:
    from flwr.app import Error, Message

    return Message(Error(code=code, reason=reason), reply_to=message)


def nodes(count: int, run_id: int, config: Mapping[str, Any], seed: int) -> dict[int, Context]:
    """The contexts of `count` nodes, by ids drawn from the seed."""
    from flwr.app import Context, RecordDict

    ids = seeds.keys(seeds.key(seed, "node"), np.arange(count)).view(np.uint64) | np.uint64(1 << 63)
    made = {
        id: Context(
            run_id, id, {"partition-id": i, "num-partitions": count}, RecordDict(), dict(config)
        )
        for i, id in enumerate(ids.tolist())
    }
    assert len(made) == count, Counter(ids.tolist()).most_common(1)  # 63 bits each
    return made
