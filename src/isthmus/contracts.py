"""What the families hand each other: uploads, rules over them, attacks and mechanisms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from isthmus import tree
from isthmus.tree import Tree


class Meta(NamedTuple):
    """Declared scalars about one upload; the only thing weights may depend on."""

    client: int
    round: int
    version: int
    n_examples: float
    steps: int = 0
    rank: int | None = None
    loss: float | None = None


@dataclass
class Update:
    """What one client sends.

    `delta` is local minus decoded download, sign fixed. `values` are tensors that are not
    differences (adapter factors, prototypes). `buffers` are averaged but enter no distance.
    `scalars` only inform.
    """

    delta: Tree = field(default_factory=dict)
    values: Tree = field(default_factory=dict)
    buffers: Tree = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)
    meta: Meta | None = None


@dataclass
class Updates:
    """The uploads of one mix, stacked `[n, *shape]`, row i from client `meta[i].client`."""

    delta: Tree = field(default_factory=dict)
    values: Tree = field(default_factory=dict)
    buffers: Tree = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)
    meta: Sequence[Meta] = ()
    flat: Tensor | None = None

    def __len__(self) -> int:
        return len(self.meta)

    @property
    def clients(self) -> list[int]:
        return [m.client for m in self.meta]

    @property
    def n_examples(self) -> Tensor:
        """float64 `[n]`."""
        return torch.tensor([m.n_examples for m in self.meta], dtype=torch.float64)

    def matrix(self) -> Tensor:
        """The deltas as one matrix `[n, d]`, in the order of `layout()`; built on first use."""
        if self.flat is None:
            self.flat = tree.flatten_stacked(self.delta)
        return self.flat

    def layout(self) -> tree.Layout:
        return tree.layout(self.delta, stacked=True)

    def gram(self) -> Tensor:
        """Inner products of the deltas, float64 `[n, n]`."""
        rows = self.matrix().double()
        return rows @ rows.T

    def __getitem__(self, i: int) -> Update:
        """The upload of row i (views)."""
        return Update(
            tree.row(self.delta, i),
            tree.row(self.values, i),
            tree.row(self.buffers, i),
            {name: x[i] for name, x in self.scalars.items()},
            self.meta[i],
        )

    def take(self, rows: Sequence[int]) -> Updates:
        """The uploads of the given rows, in that order."""
        index = torch.as_tensor(list(rows), dtype=torch.long)

        def pick(stacked: Mapping[str, Tensor]) -> Tree:
            return {name: x[index] for name, x in stacked.items()}

        meta = [self.meta[i] for i in rows]
        return Updates(
            pick(self.delta), pick(self.values), pick(self.buffers), pick(self.scalars), meta
        )

    def with_delta(self, delta: Tree) -> Updates:
        """The same uploads with other deltas."""
        return replace(self, delta=delta, flat=None)

    @staticmethod
    def stack(updates: Sequence[Update]) -> Updates:
        """Uploads of equal names and shapes -> one stacked record."""
        metas = [u.meta for u in updates]
        if any(m is None for m in metas):
            raise ValueError("an upload without meta cannot be stacked")
        return Updates(
            tree.stack([u.delta for u in updates]),
            tree.stack([u.values for u in updates]),
            tree.stack([u.buffers for u in updates]),
            tree.stack([u.scalars for u in updates]),
            [m for m in metas if m is not None],
        )


@dataclass(frozen=True)
class Context:
    """What a rule may ask for besides the uploads.

    `needs` of a rule names the entries of `extras` that it reads; the engine fills those
    and nothing else (`loss`, `fit`, `root`, `history`).
    """

    round: int
    key: int
    extras: Mapping[str, Any] = field(default_factory=dict)


class Selection(NamedTuple):
    """What a selector decides: weights `[n]` (None: keep the given ones) and who is in."""

    weights: Tensor | None
    accepted: Tensor
    diag: Mapping[str, Any] = MappingProxyType({})


class LowRank(NamedTuple):
    """A change `left @ right` of one weight `[d, k]`, never formed: `[d, m]`, `[m, k]`."""

    left: Tensor
    right: Tensor


@dataclass
class Reduced:
    """What a reducer gives: the reduced tensors and, for adapters, changes of the backbone."""

    tensors: Tree
    base_delta: dict[str, list[LowRank]] = field(default_factory=dict)
    weights: Tensor | None = None
    values: Tree = field(default_factory=dict)
    buffers: Tree = field(default_factory=dict)
    diag: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Selector(Protocol):
    """Chooses whose uploads count. Goes before any reducer."""

    needs: ClassVar[frozenset[str]]

    def select(self, updates: Updates, ctx: Context) -> Selection: ...


@runtime_checkable
class Reducer(Protocol):
    """Makes one result of n uploads, which it leaves as they are; exactly one in a run."""

    needs: ClassVar[frozenset[str]]

    def reduce(self, updates: Updates, weights: Tensor, ctx: Context) -> Reduced: ...


Sees = Literal[
    "own_update",
    "benign_updates",
    "aggregate",
    "model_history",
    "aggregator_name",
    "root_data",
    "labels",
    "scores",
    "topk_logprobs",
    "weights",
    "tool_defs",
]


@dataclass(frozen=True)
class ThreatModel:
    """Who attacks, what they see and what they control; printed as the attack's card."""

    role: Literal["client", "server", "peer", "outsider", "model-thief", "tool-server"]
    sees: frozenset[Sees]
    controls: frozenset[str]
    colluding: bool = False
    budget: Mapping[str, float] = field(default_factory=dict)


class OutsideThreatModel(PermissionError):
    """An attack read what its declared threat model does not let it see."""


class View:
    """What an attacker sees: the facts that its threat model lists, and nothing else.

    Reading a fact that is not listed raises `OutsideThreatModel`, present or not.
    """

    def __init__(self, model: ThreatModel, key: int, **facts: Any) -> None:
        self.model, self.key = model, key
        self._facts = {name: value for name, value in facts.items() if name in model.sees}

    def __getitem__(self, fact: str) -> Any:
        if fact not in self.model.sees:
            allowed = ", ".join(sorted(self.model.sees)) or "nothing"
            raise OutsideThreatModel(f"{fact}: read by an attack that may see only {allowed}")
        return self._facts[fact]


@runtime_checkable
class Attack(Protocol):
    """Replaces the uploads of the parties that the attacker holds.

    `craft` gets the honest uploads of those parties and a `View`, and returns as many.
    """

    threat: ThreatModel

    def craft(self, own: Updates, view: View) -> Updates: ...


class Noised(NamedTuple):
    """Tensors after a privacy mechanism, and the event that the ledger records."""

    tensors: Tree
    event: dict[str, Any]


class Meeting(Protocol):
    """The clients of one round of secure aggregation, after they have exchanged keys and shares.

    `up` and `down` are the bytes of each of its two exchanges, `closing()` of the last one.
    """

    @property
    def up(self) -> tuple[int, int]: ...

    @property
    def down(self) -> tuple[int, int]: ...

    def closing(self) -> tuple[int, int]: ...

    def mask(self, codes: np.ndarray, senders: Sequence[int]) -> np.ndarray: ...

    def unmask(self, total: np.ndarray, arrived: Sequence[int]) -> np.ndarray: ...


class Mask(Protocol):
    """Hides single uploads from the server: integers up to `levels`, of which it learns the sum."""

    @property
    def levels(self) -> int: ...

    def meet(self, clients: Sequence[int], seed: int) -> Meeting: ...


@runtime_checkable
class Mechanism(Protocol):
    """Clips and adds calibrated noise to everything that goes up together.

    `local` bounds and noises each client's stacked tensors with its own key (int64 array
    `[n]`); `central` noises once the sum of uploads that `clipped` has bounded, each times
    `weight`.
    """

    @property
    def where(self) -> Literal["local", "central"]: ...

    @property
    def weight(self) -> float: ...

    def clipped(self, tensors: Mapping[str, Tensor]) -> Tree: ...

    def local(self, tensors: Mapping[str, Tensor], keys: np.ndarray) -> Noised: ...

    def central(self, total: Mapping[str, Tensor], key: int) -> Noised: ...
