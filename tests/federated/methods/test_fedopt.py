"""FedAdagrad by hand, and where it differs from FedAdam."""

from __future__ import annotations

import torch
from tests.federated import tiny
from tests.federated.methods import hand
from tests.federated.test_baselines import server_steps

from isthmus import tree
from isthmus.contracts import Reduced


def test_fedadagrad_by_hand() -> None:
    fed, seen = server_steps("fedadagrad", 4, beta1=0.5, server_lr=0.3, tau=0.02)
    w, m = hand.initial(), tree.zeros_like(hand.initial())
    v = {n: torch.full_like(x, 0.02**2) for n, x in w.items()}
    for d in seen:
        for n in w:
            m[n] = 0.5 * m[n] + 0.5 * d[n]
            v[n] = v[n] + d[n] ** 2
            w[n] = w[n] + 0.3 * m[n] / (v[n].sqrt() + 0.02)
    assert tiny.apart(hand.shared(fed), w) < 1e-12 and tiny.apart(fed.state["v"], v) < 1e-12


def test_steps_only_shrink() -> None:
    """v never falls, so the same D moves less each time; the paper's Adagrad has no momentum."""
    fed, seen = server_steps("fedadagrad", 1)
    d, method = seen[0], fed.method
    assert tree.equal(fed.state["m"], d)
    state, sizes = fed.state, []
    for _ in range(3):
        after = method.server(state, Reduced(d), [])
        sizes.append(float(hand.norm(tree.sub(after["shared"], state["shared"]))))
        state = after
    assert sizes[0] > 1.1 * sizes[1] > 1.2 * sizes[2] > 0
