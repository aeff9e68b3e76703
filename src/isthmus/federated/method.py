"""The contract of a federated method: ten hooks, each with FedAvg as its default.

A method is one class in one file that overrides the hooks in which its paper differs. Hooks
see one client. The engine calls them on one client's tensors or, under `torch.vmap`, on a
cohort's, with the same result; so they hold no branch on tensor values, change nothing in
place and draw only from `visit.key` and `batch.key`. A method object holds settings, never
state: the server's state is what `init` and `server` return, a client's is what `finish` keeps.

FedAvg: McMahan, Moore, Ramage, Hampson and Aguera y Arcas, "Communication-efficient learning of
deep networks from decentralized data", AISTATS 2017, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from isthmus import tree
from isthmus.contracts import Context, Meta, Reduced, Reducer, Update, Updates
from isthmus.federated.mean import Mean
from isthmus.learn import plan as plans
from isthmus.learn.phase import Carry, Grad, Opt, Phase, Plan, Visit, update_once
from isthmus.models.factors import Places
from isthmus.models.optim import Optimiser
from isthmus.tasks.contract import Batch, Role, Stage
from isthmus.tree import Tree

State = dict[str, Any]
"""The server's state: named trees. `state["shared"]` is the model that travels."""


class Knobs(BaseModel):
    """The settings of a method, with the paper's symbols and defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Local:
    """How a client trains: optimiser, batch size, and passes (`epochs`) or updates (`steps`).

    `batch` 0 means all of the client's items at once.
    """

    optimiser: Optimiser
    batch: int = 10
    epochs: int = 1
    steps: int | None = None

    def plans(self, keys: np.ndarray, sizes: np.ndarray, steps: np.ndarray | None = None) -> Plan:
        """The plans of many clients with int64 keys `[n]` and sizes `[n]`.

        `steps` `[n]`, where given, is how many updates each is told to take.
        """
        if steps is not None:
            width = self.batch or int(sizes.max(initial=1))
            return plans.counted_batches_many(keys, sizes, steps, width)
        if self.batch == 0:
            return plans.full_batch_many(sizes, self.steps or self.epochs)
        if self.steps is not None:
            return plans.random_batches_many(keys, sizes, self.steps, self.batch)
        return plans.shuffled_epochs_many(keys, sizes, self.epochs, self.batch)


class Known(NamedTuple):
    """What the server knows of a client when it sends: who, its rank, its base version."""

    client: int
    rank: int
    version: int


@dataclass(frozen=True)
class Names:
    """The tensors of the model by what happens to them."""

    shared: tuple[str, ...]
    local: tuple[str, ...]
    frozen: tuple[str, ...]
    trainable: tuple[str, ...]
    recalibrate: tuple[str, ...] = ()
    follow: tuple[str, ...] = ()


class Data(NamedTuple):
    """One client's items, for a method that orders them by content, and what it can judge them by:
    the network, and all its tensors that the client has been sent."""

    columns: Tree
    key: int
    module: nn.Module
    down: Tree


@dataclass
class Method:
    """FedAvg; the base of every method."""

    local: Local
    stage: Stage
    names: Names
    knobs: Any = None
    population: int = 1
    reducer: Reducer = field(default_factory=Mean)

    Settings: ClassVar[type[Knobs]] = Knobs
    vectorise: ClassVar[bool] = True
    why_sequential: ClassVar[str] = ""
    personal_download: ClassVar[bool] = False
    slices_download: ClassVar[bool] = True
    communicates: ClassVar[bool] = True
    gathers: ClassVar[bool] = False
    """The clients' items themselves are brought to the server, which trains alone."""
    sends_values: ClassVar[bool] = False
    product_space: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    """The server keeps every upload (`federated.stack`), not one mean of them."""
    reads_meta: ClassVar[bool] = False
    """Its server half reads how much each client has or did, which a mask would hide."""
    plugs_in: ClassVar[bool] = False
    """May stand before another method, as in `dbe+fedprox`: its hooks go on to `super()`."""

    __hash__ = object.__hash__  # phases hold bound methods and are compared by identity

    def __post_init__(self) -> None:
        """Where a method checks or changes how it is to train."""

    # -- before the first round ---------------------------------------------------------

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        """The model with what the method adds to it: a gate, a second head, a personal copy.

        `module` is new and may be changed. Parts of it have names, roles and bytes like all of
        the model, and hooks reach them as `model.gate`; `task.predict` does not see them.
        """
        return module

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        """The roles of the tensors; a method may turn `shared` into `local` or `frozen`.

        `places` says which tensors are adapter factors (empty without adapters).
        """
        return dict(given)

    def init(self, tensors: Tree) -> State:
        """The server's first state, from all tensors of the model."""
        return {"shared": {name: tensors[name] for name in self.names.shared}}

    def keep(self, tensors: Tree) -> Tree:
        """What a client that never took part keeps: its local tensors as they start."""
        return {name: tensors[name] for name in self.names.local}

    def served(self, state: State) -> Tree:
        """The tensors of the shared model as they are served."""
        return state["shared"]

    def base(self, state: State) -> Tree:
        """Frozen tensors that the server has changed since the start, all clients alike."""
        return {}

    def catch_up(self, state: State, version: int) -> Tree:
        """What a client at `version` of the base must receive to be up to date."""
        return {}

    def version(self, state: State) -> int:
        """The version of the base."""
        return 0

    def rank_axes(self) -> dict[str, int]:
        """Tensors of which a client of smaller rank holds and sends a slice: name -> axis."""
        return {}

    def origin(self, state: State, down: Tree, round: int) -> Tree:
        """The tensors from which uploaded `values` are measured where a change is bounded."""
        return {}

    def nothing(self, state: State) -> Reduced:
        """What a round without uploads is reduced to; central noise is added to it all the same."""
        return Reduced(tree.zeros_like(state["shared"]))

    # -- the ten hooks ------------------------------------------------------------------

    def send(self, state: State, known: Known) -> Tree:
        """D: the tensors for one client."""
        return state["shared"]

    def sends(self, state: State, known: Sequence[Known]) -> list[Tree]:
        """D of several clients, for a server that makes many downloads faster together."""
        return [self.send(state, k) for k in known]

    def start(self, visit: Visit, down: Tree, kept: Tree) -> tuple[Tree, Carry]:
        """S: the tensors to train from, and what the method carries along."""
        own = {name: kept[name] for name in self.names.local}
        return {**own, **{name: down[name] for name in self.names.shared}}, {}

    def phases(self, purpose: str) -> list[Phase]:
        """F: the phases of a visit, by its purpose.

        `train` is a visit of a round. `score` comes before a client predicts, with its own data
        and from what the server would send it. `warm-up` is one exchange with every client before
        the first round, where there are such phases.
        """
        if purpose != "train":
            return []
        return [
            Phase(
                "train",
                self.names.trainable,
                self.loss,
                self.local.optimiser,
                self.step,
                follow=self.stage.follow if self.names.follow else None,
            )
        ]

    def plan(self, phase: Phase, visit: Visit, data: Data, kept: Tree) -> Plan:
        """B: which items each step sees; overridden by methods that order data by content."""
        size = np.array([len(next(iter(data.columns.values())))])
        many = self.local.plans(np.array([data.key]), size)
        return Plan(many.index[0], many.weight[0])

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        """L: what a step minimises."""
        return self.stage.loss(model, batch)

    def step(
        self, grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
    ) -> tuple[Tree, Opt, Carry]:
        """P: one local update."""
        return update_once(grad, params, opt, carry, batch)

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        """U: what goes up, and what stays."""
        delta = {name: params[name] - down[name] for name in self.names.shared}
        return Update(delta=delta), {name: params[name] for name in self.names.local}

    def weigh(self, meta: Sequence[Meta]) -> Tensor:
        """W: weights `[n]` that sum to 1, from declared scalars only."""
        counts = np.array([m.n_examples for m in meta], dtype=np.float64)
        return torch.from_numpy(counts / counts.sum())

    def reduce(self, state: State, updates: Updates, weights: Tensor, ctx: Context) -> Reduced:
        """The reducer of this method (`mean` unless the run chose another)."""
        return self.reducer.reduce(updates, weights, ctx)

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        """V: the next state of the server."""
        return {**state, "shared": tree.add(state["shared"], reduced.tensors)}

    def predict(self, task: Any, model: Any, inputs: Tree, context: Any, kept: Tree) -> Any:
        """E: outputs of the model that counts for this client."""
        return task.predict(model, inputs, context)
