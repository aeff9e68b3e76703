"""Centralised: all data at one place, trained there; the bound that federated training is held to.

    once:    every client's training items cross to the server, as they are
    round:   w <- w;  E epochs over all items of  w <- w - lr * grad l(w; b)

E local epochs a round of FedAvg with all clients and E epochs here look at as many items, so curves
over rounds can be laid over each other. A round begins with a fresh optimiser, as a visit does: it
is FedAvg of one client that owns everything, without the messages. The ledger has the raw data,
once and in bytes of real messages, and the server's work. Clients have their own test items as in
any run.

What is said of cohorts, of uploads and of devices (`cohort`, `dropout`, `codec`, `clip`, `battery`)
does not apply; what would promise privacy or needs single uploads is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from isthmus import catalogue
from isthmus.federated.method import Method
from isthmus.models.factors import Places
from isthmus.tasks.contract import Role


@catalogue.register("centralised", place="method", status="verified")
class Centralised(Method):
    """The defaults, on the data of all; nothing is a client's own."""

    gathers = True

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return {name: "shared" if role == "local" else role for name, role in given.items()}
