"""FedAvg: clients take some local steps, the server takes the weighted mean of their models.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-efficient learning of deep
networks from decentralized data", AISTATS 2017, algorithm 1. Claim: 10 to 100 times fewer
rounds than synchronised SGD.

    client:  w_i <- w;  E epochs of  w_i <- w_i - lr * grad l(w_i; b)
    server:  w <- w + sum_i (n_i / n) (w_i - w)

All hooks are the defaults of `Method`.
"""

from __future__ import annotations

from isthmus import catalogue
from isthmus.federated.method import Method


@catalogue.register("fedavg", place="method", status="verified")
class FedAvg(Method):
    """The defaults."""
