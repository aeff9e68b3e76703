"""A visit as two messages: what a client is sent and what it answers, and the half that works.

Both are messages of our own (see `isthmus.wire.message`), each in one entry of one Flower record,
so Flower carries bytes that it does not look into. What a client keeps never leaves it: the
server says which of its visits counted (`counted`, a round), and the client takes up what it kept
after that one.

A site that has a `Half` walks the client's half of an upload's path itself (clip, local noise,
codec and its error memory), and its answer holds the very bytes of the update's message.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import torch

from isthmus import tree
from isthmus.contracts import Updates
from isthmus.errors import InputError
from isthmus.federated.cohort import Cohort, Done, Ground
from isthmus.federated.executors.sequential import Sequential
from isthmus.federated.method import Method
from isthmus.federated.path import MEMORY, PARTS, Path, Posted, as_it_was
from isthmus.tree import Tree
from isthmus.wire.message import Field, Message, Schema, decode, encode

if TYPE_CHECKING:
    from flwr.app import Context, RecordDict
    from flwr.app import Message as Envelope

ORDER = Field("str", limit=1 << 21)
"""Names of the tensors in their order, one a line; sums over a tree are taken in its order."""

VISIT = Schema(
    "visit",
    4,
    {
        "client": Field("u32"),
        "version": Field("i64"),
        "rank": Field("u16"),
        "key": Field("i64"),
        "lr": Field("f64"),
        "counted": Field("u32"),
        "purpose": Field("str", limit=8),
        "order": ORDER,
    },
    None,
)
"""Tensors `down/` and `base/` (frozen, and changed by the server); its session is the round."""

ANSWER = Schema(
    "answer",
    5,
    {name: Field("f64") for name in ("loss", "steps", "examples", "gradients")} | {"order": ORDER},
    None,
)
"""Tensors `aux/` and of the upload (`delta/` ...), or its message as bytes (`coded/bytes`); its
sequence is the client."""

KEPT = Schema("kept", 6, {"order": ORDER}, None)

RECORD, ENTRY = "isthmus", "message"
CODED = "coded"


class Half(NamedTuple):
    """The client's half of an upload's path.

    `shared` are the tensors that the run begins with, `needs_loss` says that the server chooses
    by losses, and `silent` that loss and figures stay with the client: noise covers the upload,
    and what goes beside it in the clear would not be private.
    """

    path: Path
    shared: Tree
    needs_loss: bool = False
    silent: bool = False


class Site(Protocol):
    """Where a visit happens: the method, the client's data, and what it keeps.

    Without a `half` the upload is answered as it is, and who asked walks the whole path.
    """

    method: Method
    ground: Ground

    @property
    def half(self) -> Half | None: ...

    def kept(self, client: int, counted: int) -> Tree: ...

    def keep(self, client: int, round: int, kept: Tree) -> None: ...

    def rebase(self, base: Tree) -> None: ...

    def given(self, data: bytes) -> bytes | None: ...

    def give(self, data: bytes, answer: bytes) -> None: ...


def ask(cohort: Cohort, i: int, base: Tree, counted: int) -> bytes:
    """What the i-th client of a cohort is sent."""
    fields = {
        "client": int(cohort.clients[i]),
        "version": int(cohort.versions[i]),
        "rank": int(cohort.ranks[i]),
        "key": int(cohort.keys[i]),
        "lr": float(cohort.lr),
        "counted": counted,
        "purpose": cohort.purpose,
    }
    parts = {"down": cohort.downs[i], "base": base}
    rounds = np.broadcast_to(cohort.round, len(cohort))
    return _packed(VISIT, fields, parts, int(rounds[i]), fields["client"])


def answer(data: bytes, site: Site) -> bytes:
    """Run the visit that `data` asks for; raises `WireError` for bytes that are no visit."""
    asked, parts = _unpacked(data, VISIT, ("down", "base"))
    if (given := site.given(data)) is not None:
        return given
    field = cast(Any, asked.fields)
    client = field["client"]
    site.rebase(parts["base"])
    cohort = Cohort(
        clients=np.array([client]),
        keys=np.array([field["key"]], np.int64),
        ranks=np.array([field["rank"]]),
        versions=np.array([field["version"]]),
        round=asked.session,
        lr=field["lr"],
        downs=[parts["down"]],
        kept=tree.stack([site.kept(client, field["counted"])]),
        purpose=field["purpose"],
    )
    done = Sequential().run(site.method, site.ground, cohort)
    kept, sent = tree.row(done.kept, 0), {part: getattr(done.updates, part) for part in PARTS}
    sent = {part: tree.row(held, 0) for part, held in sent.items()}
    if site.half is not None:
        message, kept = _coded(site.half, site.method, site.ground, cohort, done)
        sent = {CODED: {"bytes": torch.tensor(bytearray(message), dtype=torch.uint8)}}
    site.keep(client, asked.session, kept)
    numbers = {name: float(getattr(done, name)[0]) for name in NUMBERS}
    sent["aux"] = tree.row(done.aux, 0)
    if site.half is not None and site.half.silent:
        numbers["loss"], sent["aux"] = math.nan, {}
    packed = _packed(ANSWER, numbers, sent, asked.session, client)
    site.give(data, packed)
    return packed


def _coded(
    half: Half, method: Method, ground: Ground, cohort: Cohort, done: Done
) -> tuple[bytes, Tree]:
    """The upload of a cohort of one, clipped, noised and coded, and what the client then keeps.

    It is empty where the guard drops it.
    """
    kept = {**done.kept, **{n: x for n, x in cohort.kept.items() if n.startswith(MEMORY)}}
    if not method.communicates:
        return b"", tree.row(kept, 0)
    sizes = ground.owned.sizes(cohort.clients).tolist()
    updates = replace(done.updates, meta=done.declared(cohort, sizes, half.needs_loss))
    down = cohort.downs[0]
    state = {"shared": {**half.shared, **down}}
    origin = partial(method.origin, state, down, int(cohort.round))
    updates, good = half.path.sound(updates)
    if good is not None:
        kept = as_it_was(kept, cohort.kept, good)
    if not len(updates):
        return b"", tree.row(kept, 0)
    updates, _ = half.path.protected(updates, cohort.keys, 0, origin)
    message, kept = half.path.posted(updates, kept, cohort.keys)
    return message, tree.row(kept, 0)


NUMBERS = ("loss", "steps", "examples", "gradients")


def together(answers: Sequence[bytes], kept: Sequence[Tree], form: Updates | None = None) -> Done:
    """What a cohort did, from its answers in the order of its clients, as `Sequential` gives it.

    `form` is the shape of an upload, one row, where the clients have coded theirs.
    """
    read = [_unpacked(data, ANSWER, (*PARTS, CODED, "aux")) for data in answers]
    rows = [[cast(float, message.fields[name]) for name in NUMBERS] for message, _ in read]
    loss, steps, examples, gradients = torch.tensor(rows, dtype=torch.float64).T
    stacked = {part: tree.stack([parts[part] for _, parts in read]) for part in (*PARTS, "aux")}
    aux = stacked.pop("aux")
    updates = Updates(**cast(Any, stacked))
    done = Done(updates, tree.stack(kept), loss, aux, steps, examples, gradients)
    if form is None:
        return done
    messages = [parts[CODED]["bytes"].numpy().tobytes() for _, parts in read]
    return replace(done, posted=Posted(messages, form))


def client_app(site: Callable[[Context], Site]) -> Any:
    """The client's half as a Flower `ClientApp`: `train` runs a visit, `query` says who it is."""
    from flwr.app import Message as Envelope
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def train(message: Envelope, context: Context) -> Envelope:
        return Envelope(content(answer(opened(message), site(context))), reply_to=message)

    def query(message: Envelope, context: Context) -> Envelope:
        from flwr.app import ConfigRecord, RecordDict

        client = int(context.node_config["partition-id"])
        size = int(site(context).ground.owned.sizes(np.array([client]))[0])
        record = ConfigRecord({"client": client, "examples": size})
        return Envelope(RecordDict({RECORD: record}), reply_to=message)

    app.train()(train)
    app.query()(query)
    return app


def content(data: bytes) -> RecordDict:
    """A message of ours as the content of a Flower message."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({RECORD: ConfigRecord({ENTRY: data})})


def opened(message: Envelope) -> bytes:
    """The inverse of `content`."""
    record: Any = message.content[RECORD]
    return record[ENTRY]


class OnNode:
    """A site that keeps everything in its node's context: `counted`, `pending` and `base`.

    What a visit left is pending until the server says that the visit counted; until then the
    client goes on from what it had before. Raises `InputError` when what counted is not there.
    With `once` an answer is kept as well, and given again to the same question: noise that is
    drawn anew for one upload would cost its privacy twice.
    """

    def __init__(
        self,
        method: Method,
        ground: Ground,
        initial: Tree,
        state: RecordDict,
        half: Half,
        once: bool = False,
    ) -> None:
        self.method, self.ground, self.initial, self.state = method, ground, initial, state
        self.half, self.once = half, once
        if (base := self._read("base")) is not None:
            self.ground.base.update(base[1])

    def kept(self, client: int, counted: int) -> Tree:
        pending, held = self._read("pending"), self._read("counted")
        if pending is not None and pending[0] == counted:
            self._write("counted", *pending)
            held = pending
        if held is None and counted == 0:
            return self.initial
        if held is None or held[0] != counted:
            allowed = "a node that has what it kept then; it was started anew"
            raise InputError("client", f"{client} without the state of round {counted}", allowed)
        return held[1]

    def keep(self, client: int, round: int, kept: Tree) -> None:
        self._write("pending", round, kept)

    def rebase(self, base: Tree) -> None:
        if base:
            held = self._read("base")
            self.ground.base.update(base)
            self._write("base", 0, {**(held[1] if held is not None else {}), **base})

    def given(self, data: bytes) -> bytes | None:
        held: Any = self.state.get(f"{RECORD}/given", {})
        same = self.once and held.get("asked") == hashlib.sha256(data).digest()
        return held[ENTRY] if same else None

    def give(self, data: bytes, answer: bytes) -> None:
        from flwr.app import ConfigRecord

        if self.once:
            record = ConfigRecord({"asked": hashlib.sha256(data).digest(), ENTRY: answer})
            self.state[f"{RECORD}/given"] = record

    def _read(self, name: str) -> tuple[int, Tree] | None:
        record = cast(Mapping[str, Any], self.state.get(f"{RECORD}/{name}", {}))
        if ENTRY not in record:
            return None
        message, parts = _unpacked(record[ENTRY], KEPT, ("kept",))
        return message.session, parts["kept"]

    def _write(self, name: str, round: int, tensors: Tree) -> None:
        from flwr.app import ConfigRecord

        data = _packed(KEPT, {}, {"kept": tensors}, round, 0)
        self.state[f"{RECORD}/{name}"] = ConfigRecord({ENTRY: data})


def _packed(
    schema: Schema, fields: Mapping[str, Any], parts: Mapping[str, Tree], round: int, client: int
) -> bytes:
    tensors = {f"{part}/{name}": x for part, held in parts.items() for name, x in held.items()}
    message = Message(schema.kind, {**fields, "order": "\n".join(tensors)}, tensors)
    return encode(message, schema, session=round, sequence=client)


def _unpacked(data: bytes, schema: Schema, parts: Sequence[str]) -> tuple[Message, dict[str, Tree]]:
    """A message and its tensors by part; what is not finite is left to the guard of the run."""
    message = decode(data, schema, finite=False)
    split: dict[str, Tree] = {part: {} for part in parts}
    order = cast(str, message.fields["order"])
    for full in order.split("\n") if order else ():
        part, _, name = full.partition("/")
        split[part][name] = message.tensors[full]
    return message, split
