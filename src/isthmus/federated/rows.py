"""A server that keeps one model per client and makes each client's download of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from isthmus import tree
from isthmus.contracts import Meta, Reduced
from isthmus.federated.method import Known, Method, State
from isthmus.federated.stack import Stack
from isthmus.tree import Tree


class Rows(Method):
    """`state["clients"]` holds the clients' models as the server knows them, stacked `[N, ...]`.

    What is served to others than the clients is their mean.
    """

    personal_download = True
    stacks = True

    def __post_init__(self) -> None:
        self.reducer = Stack()

    def init(self, tensors: Tree) -> State:
        n = self.population
        rows = {name: tensors[name].expand(n, *tensors[name].shape) for name in self.names.shared}
        return {"clients": tree.clone({name: x.contiguous() for name, x in rows.items()})}

    def served(self, state: State) -> Tree:
        return {name: x.mean(0) for name, x in state["clients"].items()}

    def send(self, state: State, known: Known) -> Tree:
        return tree.row(state["clients"], known.client)

    def nothing(self, state: State) -> Reduced:
        return Reduced({name: x[:0] for name, x in state["clients"].items()})

    def arrived(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> Tree:
        """All rows after those of the senders have moved from what they were sent."""
        sent = self.sends(state, [Known(m.client, 0, 0) for m in meta])
        who = torch.tensor([m.client for m in meta], dtype=torch.int64)
        return {
            name: x.index_copy(0, who, torch.stack([s[name] for s in sent]) + reduced.tensors[name])
            for name, x in state["clients"].items()
        }
