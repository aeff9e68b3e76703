"""Sign flip: the attacker trains honestly and sends the opposite, u -> -s u.

The simplest untargeted attack on an average (Li, Xu, Chen, Giannakis and Ling, "RSA:
Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from Heterogeneous
Datasets", AAAI 2019, arXiv:1811.03761). With f of n clients the mean keeps
(n - f - s f) / n of its step, so it walks backwards once s > (n - f) / f.

Threat model: a client that sees only its own honest upload and replaces that upload.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from isthmus import catalogue, tree
from isthmus.contracts import ThreatModel, Updates, View
from isthmus.errors import InputError

THREAT = ThreatModel(
    role="client", sees=frozenset({"own_update"}), controls=frozenset({"update"}), colluding=False
)


@catalogue.register("sign-flip", place="attack", status="verified")
@dataclass(frozen=True)
class SignFlip:
    """Sends `-scale` times the honest deltas; values, buffers and scalars stay honest.

    Raises `InputError` for a scale that is not positive and for uploads without deltas.
    """

    scale: float = 3.0
    threat: ThreatModel = field(default=THREAT, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.scale > 0.0:
            raise InputError("sign-flip.scale", self.scale, "a positive number")

    def craft(self, own: Updates, view: View) -> Updates:
        """The uploads of the attacker's clients, turned round."""
        if not own.delta:
            raise InputError("attack", "sign-flip", "uploads that have deltas")
        return own.with_delta(tree.scale(own.delta, -self.scale))
