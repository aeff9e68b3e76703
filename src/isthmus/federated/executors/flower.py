"""Visits run by Flower: each client is sent its visit as a message and answers with its upload.

`InProcess` calls the client's half on our own grid: what a deployment does, without its network.
`Deployed` sends to the nodes of a real one. Both give what `Sequential` gives, bit for bit: the
client's half is `Sequential` for one client, and answers are put in the order of the clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus import tree
from isthmus.contracts import Updates
from isthmus.errors import InputError
from isthmus.federated.cohort import Cohort, Done, Ground
from isthmus.federated.executors.sequential import Sequential
from isthmus.federated.flower import internals, ready
from isthmus.federated.flower.visit import ask, client_app, content, opened, together
from isthmus.federated.method import Method
from isthmus.tree import Tree
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

if TYPE_CHECKING:
    from flwr.app import Message

TRIES = 3
"""How often a node that failed is asked: a visit is a function of what was sent, so it may be."""


class Failed(RuntimeError):
    """A client that did not answer, however often it was asked."""


class InProcess:
    """Every client is a node of the in-process grid; what it keeps is handed to it, not sent."""

    def __init__(self) -> None:
        ready()

    def run(self, method: Method, ground: Ground, cohort: Cohort) -> Done:
        from flwr.app import Context, RecordDict

        from isthmus.federated.flower.grid import Grid

        clients = cohort.clients.tolist()
        site = _Here(method, ground, {c: tree.row(cohort.kept, i) for i, c in enumerate(clients)})
        nodes = {client: client + internals.SERVER_NODE + 1 for client in clients}
        count = len(ground.owned)
        contexts = {
            node: Context(
                1, node, {"partition-id": client, "num-partitions": count}, RecordDict(), {}
            )
            for client, node in nodes.items()
        }
        grid = Grid(client_app(lambda _: site), contexts, Ledger(), Link())
        asked = [ask(cohort, i, {}, 0) for i in range(len(cohort))]
        with internals.identity(1):
            answers = exchange(grid, [nodes[c] for c in clients], clients, asked, tries=1)
        return together(answers, [site.held[client] for client in clients])

    def params(self, method: Method, ground: Ground, cohort: Cohort) -> Tree:
        return Sequential().params(method, ground, cohort)


class _Here:
    """The site of all clients at once: they share the memory of this process."""

    def __init__(self, method: Method, ground: Ground, held: dict[int, Tree]) -> None:
        self.method, self.ground, self.held = method, ground, held
        self.half = None  # the federation walks the path for the whole cohort

    def kept(self, client: int, counted: int) -> Tree:
        return self.held[client]

    def keep(self, client: int, round: int, kept: Tree) -> None:
        self.held[client] = kept

    def rebase(self, base: Tree) -> None:
        """Nothing: the frozen tensors are the server's own."""

    def given(self, data: bytes) -> bytes | None:
        return None

    def give(self, data: bytes, answer: bytes) -> None:
        """Nothing: a visit is asked for once."""


class Deployed:
    """`nodes` gives the node of each client, `counted` the last round that counted for it, and
    `forms` the shape of an upload by the purpose of its visit.

    Frozen tensors that the server has changed are sent to each client once.
    """

    def __init__(
        self,
        grid: Any,
        nodes: Mapping[int, int],
        counted: Callable[[int], int],
        base: Tree,
        forms: Mapping[str, Updates],
    ) -> None:
        self.grid, self.nodes, self.counted, self.forms = grid, nodes, counted, forms
        self.first = dict(base)
        self.held: dict[int, Tree] = {}

    def run(self, method: Method, ground: Ground, cohort: Cohort) -> Done:
        clients = cohort.clients.tolist()
        now = dict(ground.base)
        asked: list[bytes] = []
        for i, client in enumerate(clients):
            held = self.held.get(client, self.first)
            changed = {name: x for name, x in now.items() if x is not held.get(name)}
            asked.append(ask(cohort, i, changed, self.counted(client)))
        answers = exchange(self.grid, [self.nodes[c] for c in clients], clients, asked)
        self.held.update(dict.fromkeys(clients, now))
        return together(answers, [{} for _ in clients], self.forms[cohort.purpose])

    def params(self, method: Method, ground: Ground, cohort: Cohort) -> Tree:
        """Raises `InputError`: what a client does before it predicts needs data that it keeps."""
        raise InputError("executor", "flower deployment", "a method that is scored as it was mixed")


def exchange(
    grid: Any,
    nodes: Sequence[int],
    clients: Sequence[int],
    asked: Sequence[bytes],
    tries: int = TRIES,
) -> list[bytes]:
    """Send each node its message; the answers in the order of the nodes.

    Raises `Failed` when a node has answered with an error `tries` times.
    """
    from flwr.app import Message

    answers: dict[int, bytes] = {}
    wrong: dict[int, str] = {}
    for _ in range(tries):
        left = [i for i in range(len(nodes)) if i not in answers]
        at = {nodes[i]: i for i in left}
        replies: Sequence[Message] = grid.send_and_receive(
            [Message(content(asked[i]), nodes[i], "train") for i in left]
        )
        for reply in replies:
            i = at[reply.metadata.src_node_id]
            if reply.has_error():
                wrong[i] = str(reply.error.reason)
            else:
                answers[i] = opened(reply)
        if len(answers) == len(nodes):
            return [answers[i] for i in range(len(nodes))]
    i = min(i for i in range(len(nodes)) if i not in answers)
    raise Failed(f"client {clients[i]} failed: {wrong.get(i, 'no answer')}")


def roll(grid: Any, clients: int, wait: Callable[[], None]) -> tuple[dict[int, int], np.ndarray]:
    """Ask every node who it is: the node of each client, and each client's number of examples.

    `wait` is called while fewer than `clients` nodes are there. Raises `Failed` for two nodes
    that say they are the same client, and for clients that nobody is.
    """
    from flwr.app import Message, RecordDict

    while len(found := list(grid.get_node_ids())) < clients:
        wait()
    nodes: dict[int, int] = {}
    sizes = np.zeros(clients, np.int64)
    for reply in grid.send_and_receive([Message(RecordDict(), node, "query") for node in found]):
        if reply.has_error():
            raise Failed(f"a node does not say who it is: {reply.error.reason}")
        said: Any = reply.content["isthmus"]
        client = int(said["client"])
        if client in nodes:
            raise Failed(f"two nodes with partition-id={client}")
        if client < clients:
            nodes[client], sizes[client] = reply.metadata.src_node_id, int(said["examples"])
    missing = sorted(set(range(clients)) - nodes.keys())
    if missing:
        raise Failed(f"no node with partition-id={missing[0]}")
    return nodes, sizes
