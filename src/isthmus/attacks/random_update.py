"""Gaussian (random update): the control that every attack is shown beside.

A direction drawn uniformly at random, as long as the attacker's own honest upload (times
`scale`). What an attack does beyond this, it does by its direction and not by its size; beside
`sign-flip` of the same scale, for example, the two uploads have equal norms.

Threat model: a client that sees only its own honest upload and replaces that upload.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from isthmus import catalogue, seeds, tree
from isthmus.contracts import ThreatModel, Updates, View
from isthmus.errors import InputError

THREAT = ThreatModel(
    role="client", sees=frozenset({"own_update"}), controls=frozenset({"update"}), colluding=False
)


@catalogue.register("gaussian", place="attack", status="verified")
@dataclass(frozen=True)
class RandomUpdate:
    """Sends `scale * ||u||` times a random unit vector; each client draws its own.

    Raises `InputError` for a negative scale and for uploads without deltas.
    """

    scale: float = 1.0
    threat: ThreatModel = field(default=THREAT, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.scale >= 0.0:
            raise InputError("gaussian.scale", self.scale, "0 or more")

    def craft(self, own: Updates, view: View) -> Updates:
        """The uploads of the attacker's clients, replaced by noise of the same length."""
        if not own.delta:
            raise InputError("attack", "gaussian", "uploads that have deltas")
        rows = own.matrix()
        noise = torch.stack(
            [
                seeds.normal(seeds.key(view.key, "random-update", client), rows.shape[1:])
                for client in own.clients
            ]
        ).to(rows)
        length = self.scale * torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        drawn = noise * (length / torch.linalg.vector_norm(noise, dim=1, keepdim=True))
        return own.with_delta(tree.unflatten(drawn, own.layout()))
