"""The path of an upload, one order for every run.

Client: finite guard -> attack -> clip -> local noise -> codec (error feedback inside it) -> bytes
-> link.
Server: decode -> finite guard -> clip again if noise is central -> selectors -> reducer ->
central noise. What the server uses is what was decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from isthmus import seeds, tree
from isthmus.contracts import (
    Attack,
    Context,
    Mechanism,
    Meta,
    Reduced,
    Selector,
    Updates,
    View,
)
from isthmus.errors import InputError
from isthmus.federated.mean import Mean
from isthmus.federated.method import Method, State
from isthmus.tree import Tree
from isthmus.wire.codecs import Codec, Dense, ErrorFeedback, Payload
from isthmus.wire.codecs.base import Template
from isthmus.wire.errors import WireError
from isthmus.wire.message import (
    Field,
    Message,
    Parcel,
    Schema,
    TensorSpec,
    check_finite,
    decode_many,
    encode,
    encode_many,
)

Guard = Literal["raise", "drop", "clip"]
GUARDS: tuple[Guard, ...] = ("raise", "drop", "clip")

FIELDS = {
    "examples": Field("f64", low=0.0),
    "steps": Field("u32"),
    "rank": Field("u16"),
    "loss": Field("f64"),
}
"""What an update may declare; its session is the round and its sequence the client."""

Axes = Mapping[str, int]
"""Tensors of which a client sends the slice of its rank: name -> axis (from the end)."""

PARTS = ("delta", "values", "buffers", "scalars")
NOISED = ("delta", "values", "buffers")
_MODEL, _UPDATE, _BASE = 1, 2, 3
MEMORY = "memory/"
"""Prefix of the codec's error memory among what a client keeps."""


class Coded(NamedTuple):
    """Uploads of one shape as bytes, what it takes to read them, and the codec's memory after."""

    parcel: Parcel
    schema: Schema
    template: Template
    values: int
    memory: Tree


class Posted(NamedTuple):
    """Uploads that their clients have coded: a message each, all of the shapes of `form`.

    `form` has one row. An empty message stands for an upload that its client's guard has dropped.
    """

    messages: Sequence[bytes]
    form: Updates

    def take(self, rows: np.ndarray) -> Posted:
        """Those of the given rows."""
        return self._replace(messages=[self.messages[i] for i in rows.tolist()])


class Sent(NamedTuple):
    """What arrived of a cohort: decoded uploads, honest and paper-style bytes per client."""

    updates: Updates
    bytes: np.ndarray
    values: np.ndarray
    kept: Tree
    events: list[dict[str, Any]]


@dataclass
class Path:
    """The pieces between `finish` and `server`; each may be left out.

    With `late`, the search for NaN in uploads is left to `reduce`, which sees it in their mean.
    """

    codec: Codec = field(default_factory=Dense)
    feedback: ErrorFeedback | None = None
    clip: Callable[[Tree], Tree] | None = None
    local: Mechanism | None = None
    central: Mechanism | None = None
    selectors: Sequence[Selector] = ()
    attack: Attack | None = None
    attackers: frozenset[int] = frozenset()
    guard: Guard = "raise"
    download: Codec = field(default_factory=Dense)
    axes: Axes = field(default_factory=dict)
    late: bool = False
    _schemas: dict[Any, tuple[Schema, Template, int]] = field(default_factory=dict)

    # -- down ---------------------------------------------------------------------------

    def down(
        self,
        sent: Sequence[Tree],
        round: int,
        key: int,
        rank: int = 0,
        axes: Axes | None = None,
    ) -> list[tuple[Tree, int, int]]:
        """Encode downloads of the same shapes and decode them: of each its tensors, bytes, and
        bytes of values alone.

        Of the tensors in `axes` only the first `rank` directions cross; zeros stand for the rest.
        """
        crossing = [_sliced(one, rank, axes) for one in sent] if axes else sent
        stacked = _stacked(crossing)
        plain, keys = is_plain(self.download), [key] * len(sent)
        payload = (
            Payload(stacked) if plain else self.download.encode_many(stacked, keys, declared=True)
        )
        schema, template, values = self._schema("model", _MODEL, (), stacked, payload.tensors)
        parcel = encode_many(schema, {}, payload.tensors, session=[round] * len(sent))
        _, got = decode_many(parcel, schema)
        if not plain:
            got = self.download.decode_many(Payload(got, {}, len(sent)), template)
        arrived = [tree.row(got, i) for i in range(len(sent))]
        if axes:
            arrived = [_widened(one, whole) for one, whole in zip(arrived, sent, strict=True)]
        return [(one, n, values) for one, n in zip(arrived, parcel.sizes.tolist(), strict=True)]

    # -- up -----------------------------------------------------------------------------

    def sound(self, updates: Updates) -> tuple[Updates, np.ndarray | None]:
        """The guard at the client: what goes on, and whose work is finite (bool `[n]`; None: all).

        It comes before the clip, which makes zeros of an upload that is not finite. Raises
        `WireError` naming the first client that has diverged where the guard is to raise.
        """
        if self.guard == "raise" and self.clip is None:  # decoding raises
            return updates, None
        if all(_finite(x) for x in joined(updates).values()):
            return updates, None
        good = finite_rows(updates, len(updates)).numpy()
        if self.guard == "raise":
            client = updates.clients[int(np.flatnonzero(~good)[0])]
            raise WireError("update", f"NaN or infinity from client {client}")
        if self.guard == "drop":
            return updates.take(np.flatnonzero(good).tolist()), good
        return self._guarded(updates), good

    def protected(
        self, updates: Updates, keys: np.ndarray, key: int, origin: Callable[[], Tree] = dict
    ) -> tuple[Updates, list[dict[str, Any]]]:
        """Clip and local noise, and the attack, which skips both; the events for the ledger.

        `origin()` gives the tensors from which `values` are measured where a change is bounded or
        noised.
        """
        honest = updates
        events: list[dict[str, Any]] = []
        if self.clip is not None:
            updates = _over(updates, self.clip, origin())
        if self.local is not None:
            local, own = self.local, seeds.keys_of(keys, _LOCAL_NOISE)

            def noise(tensors: Tree) -> Tree:
                noised = local.local(tensors, own)
                events.append(noised.event)
                return noised.tensors

            updates = _over(updates, noise, origin())
        if self.attack is not None:
            updates = self._attacked(honest, updates, key)
        return updates, events

    def crossed(
        self, updates: Updates, kept: Tree, keys: np.ndarray, events: list[dict[str, Any]]
    ) -> Sent:
        """Codec, bytes, decoding: what the far side has of these uploads.

        `kept` is what the clients keep, stacked; the codec's memory is added to it.
        """
        if self.guard == "raise":
            return self._cross(updates, kept, keys, events)
        return self._cross_sound(updates, kept, keys, events)

    def _cross_sound(
        self, updates: Updates, kept: Tree, keys: np.ndarray, events: list[dict[str, Any]]
    ) -> Sent:
        """`_cross` with the guard in front: NaN has no code, so it cannot be left to the server."""
        sound = self._guarded(updates)
        if len(sound) == len(updates):
            return self._cross(sound, kept, keys, events)
        rows = [updates.clients.index(client) for client in sound.clients]
        index = torch.tensor(rows)
        sent = self._cross(sound, {n: x[index] for n, x in kept.items()}, keys[rows], events)
        back = {name: x.index_copy(0, index, sent.kept[name]) for name, x in kept.items()}
        return sent._replace(kept=back)

    def _attacked(self, honest: Updates, updates: Updates, key: int) -> Updates:
        """Put the attacker's uploads in place of those of the clients it holds."""
        rows = [i for i, client in enumerate(updates.clients) if client in self.attackers]
        if not rows or self.attack is None:
            return updates
        others = [i for i in range(len(updates)) if i not in rows]
        own = honest.take(rows)
        view = View(self.attack.threat, key, own_update=own, benign_updates=honest.take(others))
        crafted = self.attack.craft(own, view)
        index = torch.tensor(rows)

        def put(kind: str) -> Tree:
            theirs = getattr(crafted, kind)
            return {
                name: x.clone().index_copy(0, index, theirs[name].to(x.dtype))
                for name, x in getattr(updates, kind).items()
            }

        return replace(
            updates, delta=put("delta"), values=put("values"), buffers=put("buffers"), flat=None
        )

    def _cross(
        self, updates: Updates, kept: Tree, keys: np.ndarray, events: list[dict[str, Any]]
    ) -> Sent:
        groups = _by_rank(updates)
        parts = [self._cross_alike(updates, kept, keys, rows, rank) for rank, rows in groups]
        if len(parts) == 1:
            got, sizes, values, memory = parts[0]
            return Sent(got, sizes, values, {**kept, **memory}, events)
        order = np.argsort(np.concatenate([rows for _, rows in groups]), kind="stable")
        got = _concatenated([part[0] for part in parts], order)
        sizes = np.concatenate([part[1] for part in parts])[order]
        values = np.concatenate([part[2] for part in parts])[order]
        memory = {
            name: torch.cat([part[3][name] for part in parts])[torch.from_numpy(order)]
            for name in parts[0][3]
        }
        return Sent(got, sizes, values, {**kept, **memory}, events)

    def _cross_alike(
        self, updates: Updates, kept: Tree, keys: np.ndarray, rows: np.ndarray, rank: int | None
    ) -> tuple[Updates, np.ndarray, np.ndarray, Tree]:
        """The crossing of clients that send the same shapes."""
        whole = len(rows) == len(updates)
        some = updates if whole else updates.take(rows.tolist())
        index = torch.from_numpy(rows)
        before = {} if self.feedback is None else _memory_of(kept, index)
        coded = self._coded(some, before, keys[rows], rank)
        back = self._decoded(coded, some, rank)
        return back, coded.parcel.sizes, np.full(len(rows), coded.values), coded.memory

    def _coded(self, some: Updates, memory: Tree, keys: np.ndarray, rank: int | None) -> Coded:
        """Uploads of the same shapes as messages; `memory` is the codec's, from before."""
        if rank is not None:
            some = replace(some, values=_sliced(some.values, rank, self.axes))
        tensors = joined(some)
        after: Tree = {}
        if is_plain(self.codec):
            payload = Payload(tensors, {}, len(some))
        else:
            own = torch.from_numpy(seeds.keys_of(keys, _CODEC))
            if self.feedback is None:
                payload = self.codec.encode_many(tensors, own, declared=True)
            else:
                before = {n: memory[MEMORY + n] for n in tensors if MEMORY + n in memory}
                payload, left = self.feedback.step_many(tensors, own, before, declared=True)
                after = {MEMORY + name: x for name, x in left.items()}
        clients, rounds, _, examples, steps, _, losses = zip(*some.meta, strict=True)
        fields: dict[str, list[float]] = {
            "examples": list(map(float, examples)),
            "steps": list(steps),
        }
        if rank is not None:
            fields["rank"] = [rank] * len(some)
        if losses[0] is not None:  # a selection of clients asks for it
            fields["loss"] = [loss or 0.0 for loss in losses]
        schema, template, values = self._schema("update", _UPDATE, fields, tensors, payload.tensors)
        session = rounds[0] if rounds.count(rounds[0]) == len(some) else list(rounds)
        parcel = encode_many(
            schema, fields, payload.tensors, session=session, sequence=list(clients), lend=True
        )
        return Coded(parcel, schema, template, values, after)

    def _decoded(self, coded: Coded, like: Updates, rank: int | None) -> Updates:
        """What the messages hold, with the declared scalars of `like` and its whole shapes."""
        finite = self.guard == "raise" and not self.late
        _, arrived = decode_many(coded.parcel, coded.schema, finite=finite)
        if is_plain(self.codec):
            got = arrived
        else:
            payload = Payload(arrived, {}, len(like))
            got = self.codec.decode_many(payload, coded.template)
        parted = split(got)
        if rank is not None:
            parted["values"] = _widened(parted["values"], like.values)
        return Updates(**cast(Any, parted), meta=like.meta)

    # -- the two ends in different places -----------------------------------------------

    def posted(self, update: Updates, kept: Tree, keys: np.ndarray) -> tuple[bytes, Tree]:
        """The protected upload of one client as it leaves it, and what the client then keeps."""
        ((rank, rows),) = _by_rank(update)
        before = {} if self.feedback is None else _memory_of(kept, torch.from_numpy(rows))
        coded = self._coded(update, before, keys, rank)
        return bytes(coded.parcel[0]), {**kept, **coded.memory}

    def arrived(self, posted: Posted, meta: Sequence[Meta]) -> Sent:
        """What the server has of uploads that were coded where they were made.

        They are read by the schema of `form`, not by what they say of themselves. An empty one is
        of a client that the guard has dropped.
        """
        there = [i for i, message in enumerate(posted.messages) if message]
        if not there:
            raise nothing_sound()
        rows = [self._read(posted.messages[i], posted.form, meta[i]) for i in there]
        got = _concatenated([update for update, _ in rows], np.arange(len(rows)))
        sizes = np.array([len(posted.messages[i]) for i in there])
        # What noise spends follows from the mechanism alone, not from what it was added to.
        none = np.zeros(0, np.int64)
        events = [] if self.local is None else [self.local.local({}, none).event]
        return Sent(got, sizes, np.array([values for _, values in rows]), {}, events)

    def _read(self, message: bytes, form: Updates, meta: Meta) -> tuple[Updates, int]:
        like = replace(form, meta=[meta])
        ((rank, _),) = _by_rank(like)
        coded = self._coded(like, {}, np.zeros(1, np.int64), rank)  # of zeros: for its schema
        bytes_ = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        parcel = Parcel(bytes_, torch.tensor([0, len(message)]))
        return self._decoded(coded._replace(parcel=parcel), like, rank), coded.values

    def pairs(self, changes: Tree) -> tuple[int, int]:
        """Bytes of the message that carries changes of the base, honest and of values alone.

        These cross as they are: server and clients must keep the same base.
        """
        if not changes:
            return 0, 0
        schema = Schema.of_tree("base", _BASE, {}, changes)
        return len(encode(Message("base", {}, changes), schema)), tree.nbytes(changes)

    def _schema(
        self, kind: str, number: int, fields: Iterable[str], plain: Tree, packed: Tree
    ) -> tuple[Schema, Template, int]:
        """The schema of messages with these packed tensors, the template of the plain ones, and
        the bytes of the values in a message."""
        shapes = tuple([(name, x.dtype, x.shape[1:]) for name, x in plain.items()])
        found = self._schemas.get((kind, shapes))
        if found is None:
            template = {name: TensorSpec(x.dtype, tuple(x.shape[1:])) for name, x in plain.items()}
            declared = {name: FIELDS[name] for name in fields}
            one = tree.row(packed, 0)
            found = Schema.of_tree(kind, number, declared, one), template, _values(one)
            self._schemas[kind, shapes] = found
        return found

    # -- at the server ------------------------------------------------------------------

    def reduce(
        self,
        method: Method,
        state: State,
        updates: Updates,
        ctx: Context,
        weights: Tensor | None = None,
    ) -> tuple[Reduced, Updates]:
        """Guard, clip again, select, reduce, noise: what `server` gets, and the uploads used.

        `weights` `[n]` are those of a schedule that weighs uploads itself.
        """
        if self.guard != "raise":  # decoding has raised already
            sound = self._guarded(updates)
            if weights is not None and len(sound) < len(updates):
                weights = weights[finite_rows(updates, len(updates))]
            updates = sound
        if weights is None:
            weights = method.weigh(updates.meta)
        if self.central is not None:
            origin = method.origin(state, ctx.extras.get("down", {}), ctx.round)
            updates = _over(updates, self.central.clipped, origin)
            weights = torch.full_like(weights, self.central.weight)
        if self.selectors:
            accepted = torch.ones(len(updates), dtype=torch.bool)
            given = False  # a selector's own weights need not sum to 1
            for selector in self.selectors:
                selection = selector.select(updates, ctx)
                accepted &= selection.accepted
                given = given or selection.weights is not None
                weights = weights if selection.weights is None else selection.weights
            weights = weights[accepted]
            if not float(weights.sum()) > 0:
                raise InputError("selector", "no upload accepted", "at least one")
            updates = updates.take(accepted.nonzero().flatten().tolist())
            weights = weights if given else weights / weights.sum()
        reduced = method.reduce(state, updates, weights, ctx)
        if self.late and not (self.may_be_late(method) and _shows_none(reduced, updates, weights)):
            check_finite(joined(updates))
        reduced = self.noised(reduced, ctx.key)
        reduced.diag["accepted"] = updates.clients
        return reduced, updates

    def may_be_late(self, method: Method) -> bool:
        """True where NaN in an upload would show in what is reduced, and nothing comes before."""
        plain = self.guard == "raise" and self.central is None and not self.selectors
        averaged = type(method).reduce is Method.reduce and isinstance(method.reducer, Mean)
        return plain and averaged

    def noised(self, reduced: Reduced, key: int) -> Reduced:
        """Central noise on everything that was reduced; the event is `diag["privacy"]`."""
        if self.central is None:
            return reduced
        parts = {"delta": reduced.tensors, "values": reduced.values, "buffers": reduced.buffers}
        total = {f"{part}/{name}": x for part, held in parts.items() for name, x in held.items()}
        noise = self.central.central(total, int(seeds.fold(key, _CENTRAL_NOISE)))
        own = split(noise.tensors, NOISED)
        return replace(
            reduced,
            tensors=own["delta"],
            values=own["values"],
            buffers=own["buffers"],
            diag={**reduced.diag, "privacy": noise.event},
        )

    def _guarded(self, updates: Updates) -> Updates:
        """The finite guard: `drop` leaves a client with NaN or infinity out, `clip` zeroes them."""
        tensors = joined(updates)
        if all(_finite(x) for x in tensors.values()):
            return updates
        good = finite_rows(updates, len(updates))
        if self.guard == "clip":
            cleaned = {name: torch.nan_to_num(x, 0.0, 0.0, 0.0) for name, x in tensors.items()}
            return _with(updates, cleaned)
        if not good.any():
            raise nothing_sound()
        return updates.take(good.nonzero().flatten().tolist())


_LIGHT = 1e-30
"""Weights that may be nothing in a tensor's own type."""
_LOCAL_NOISE, _CODEC, _CENTRAL_NOISE = 101, 102, 103


def is_plain(codec: Codec) -> bool:
    """True when tensors are sent as they are, so that there is nothing to encode."""
    return isinstance(codec, Dense) and codec.format == "exact"


def _stacked(trees: Sequence[Tree]) -> Tree:
    """`tree.stack`, without a copy of one alone."""
    if len(trees) == 1:
        return {name: x.unsqueeze(0) for name, x in trees[0].items()}
    return tree.stack(trees)


def _memory_of(kept: Tree, rows: Tensor) -> Tree:
    """The codec's error memory of some clients, of all that they keep."""
    return {name: x[rows] for name, x in kept.items() if name.startswith(MEMORY)}


def _finite(x: Tensor) -> bool:
    if not x.is_floating_point() or x.numel() == 0:
        return True
    if math.isfinite(float(x.sum())):  # else it may have overflowed by itself
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def _shows_none(mean: Reduced, updates: Updates, weights: Tensor) -> bool:
    """True only if no upload holds NaN or infinity: with a weight above 0 either stays in a mean.

    One pass over the mean in place of one over all uploads.
    """
    told = (mean.tensors, mean.values, mean.buffers, updates.scalars)
    heavy = bool(weights.numpy().min(initial=1.0) > _LIGHT)
    return heavy and all([_finite(x) for tensors in told for x in tensors.values()])


def finite_rows(updates: Updates, n: int) -> Tensor:
    """Which of n uploads hold neither NaN nor infinity: bool `[n]`."""
    rows = [x.reshape(n, -1) for x in joined(updates).values()]
    return torch.stack([torch.isfinite(x).all(1) for x in rows]).all(0)


def nothing_sound() -> WireError:
    """The error where all clients have diverged."""
    return WireError("update", "NaN or infinity from every client")


def as_it_was(after: Tree, before: Tree, good: np.ndarray) -> Tree:
    """What clients keep, stacked: where `good` is False, what they had, but for the codec's memory
    of what was really sent."""
    index = torch.from_numpy(np.flatnonzero(~good))
    return {
        name: x if name.startswith(MEMORY) else x.index_copy(0, index, before[name][index])
        for name, x in after.items()
    }


def joined(updates: Updates, parts: Sequence[str] = PARTS) -> Tree:
    """All tensors of some uploads in one tree, each with the name of its part in front."""
    return {f"{part}/{name}": x for part in parts for name, x in getattr(updates, part).items()}


def split(flat: Tree, parts: Sequence[str] = PARTS) -> dict[str, Tree]:
    """The inverse of `joined`."""
    split: dict[str, Tree] = {part: {} for part in parts}
    for name, x in flat.items():
        part, _, own = name.partition("/")
        split[part][own] = x
    return split


def _with(updates: Updates, flat: Tree, parts: Sequence[str] = PARTS) -> Updates:
    """The uploads with the tensors of `flat` in place of their own."""
    return replace(updates, flat=None, **cast(Any, split(flat, parts)))


def _over(updates: Updates, function: Callable[[Tree], Tree], origin: Tree) -> Updates:
    """The uploads with `function` applied to all that is bounded and noised, at once.

    Values that have an origin are measured from it: what is bounded is always a change.
    """
    values = {n: x - origin[n] if n in origin else x for n, x in updates.values.items()}
    parts = split(function(joined(replace(updates, values=values), NOISED)), NOISED)
    parts["values"] = {n: x + origin[n] if n in origin else x for n, x in parts["values"].items()}
    return replace(updates, **parts, flat=None)


def _values(tensors: Tree) -> int:
    """Paper-style count: the bytes of the values, without scales, indices and framing."""
    return sum(x.numel() * x.element_size() for name, x in tensors.items() if ":" not in name)


def _by_rank(updates: Updates) -> list[tuple[int | None, np.ndarray]]:
    """Rows grouped by adapter rank; one group without ranks."""
    ranks = [m.rank for m in updates.meta] if updates.values else [None]
    if None in ranks:
        return [(None, np.arange(len(updates)))]
    array = np.array(ranks)
    return [(int(rank), np.flatnonzero(array == rank)) for rank in np.unique(array)]


def _sliced(tensors: Tree, rank: int, axes: Axes) -> Tree:
    """The first `rank` directions of the tensors in `axes`; the others whole."""
    return {
        name: x.narrow(axes[name], 0, min(rank, x.shape[axes[name]])) if name in axes else x
        for name, x in tensors.items()
    }


def _widened(values: Tree, like: Tree) -> Tree:
    """Zeros behind the directions that did not cross, so that shapes agree again."""
    out: Tree = {}
    for name, x in values.items():
        if x.shape == like[name].shape:
            out[name] = x
            continue
        wide = torch.zeros_like(like[name])
        wide[tuple(slice(size) for size in x.shape)] = x
        out[name] = wide
    return out


def _concatenated(parts: Sequence[Updates], order: np.ndarray) -> Updates:
    index = torch.from_numpy(order)

    def cat(part: str) -> Tree:
        held = [getattr(u, part) for u in parts]
        return {name: torch.cat([h[name] for h in held])[index] for name in held[0]}

    metas: list[Meta] = [m for u in parts for m in u.meta]
    return _with(
        Updates(meta=[metas[i] for i in order]),
        {f"{part}/{name}": x for part in PARTS for name, x in cat(part).items()},
    )
