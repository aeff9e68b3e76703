"""FedSMOO: FedDyn at radius 0; by hand with the duals of all clients; the common radius."""

from __future__ import annotations

import pytest
from tests.federated import tiny
from tests.federated.methods import hand

from isthmus import tree
from isthmus.tree import Tree


def test_radius_zero_is_feddyn() -> None:
    keys = {"epochs": 2, "cohort": 3}
    smoo = tiny.play("fedsmoo", hand.TASK, 4, settings={"alpha": 0.3, "rho": 0.0}, **keys)
    dyn = tiny.play("feddyn", hand.TASK, 4, settings={"alpha": 0.3}, **keys)
    assert tree.equal(hand.shared(smoo), hand.shared(dyn))
    assert not any(bool(x.any()) for x in smoo.state["s"].values())


def test_by_hand() -> None:
    alpha, rho = 0.3, 0.4
    settings = {"alpha": alpha, "rho": rho}
    fed = tiny.federation("fedsmoo", hand.TASK, cohort=3, epochs=2, settings=settings)
    w = hand.initial()
    zero = tree.zeros_like(w)
    h, mu, s = [zero] * 5, [zero] * 5, zero
    for round in range(1, 5):
        chosen, models = fed.schedule.clients(round).tolist(), []
        for i in chosen:

            def rule(slope: hand.Slope, v: Tree, i: int = i, w: Tree = w, s: Tree = s) -> Tree:
                c = hand.up(hand.up(slope(v), mu[i], -1.0), s, -1.0)
                e = tree.scale(c, rho / (float(hand.norm(c)) + 1e-7))
                mu[i] = hand.up(hand.up(mu[i], e), s, -1.0)
                pull = hand.up(tree.sub(v, w), h[i])
                return hand.up(slope(hand.up(v, e)), pull, alpha)

            models.append(hand.steps(fed, round, i, w, rule, epochs=2)[0])
        for i, v in zip(chosen, models, strict=True):
            h[i] = hand.up(h[i], tree.sub(v, w))
        w = hand.up(hand.mean(models), hand.mean(h))
        m = hand.mean([mu[i] for i in chosen])
        s = tree.scale(m, rho / (float(hand.norm(m)) + 1e-7))
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-11
        assert tiny.apart({n.removeprefix("s/"): x for n, x in fed.state["s"].items()}, s) < 1e-11
    assert float(hand.norm(s)) == pytest.approx(rho, rel=1e-6)
