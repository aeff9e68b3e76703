"""FedGAMMA: SCAFFOLD at radius 0, and by hand."""

from __future__ import annotations

from tests.federated import tiny
from tests.federated.methods import hand

from isthmus import tree
from isthmus.tree import Tree


def test_radius_zero_is_scaffold() -> None:
    keys = {"epochs": 2, "cohort": 3}
    gamma = tiny.play("fedgamma", hand.TASK, 4, settings={"rho": 0.0}, **keys)
    scaffold = tiny.play("scaffold", hand.TASK, 4, **keys)
    assert tree.equal(tiny.state(gamma), tiny.state(scaffold))
    assert tree.equal(tiny.kept(gamma), tiny.kept(scaffold))


def test_by_hand() -> None:
    rho = 0.4
    fed = tiny.federation("fedgamma", hand.TASK, cohort=3, epochs=2, settings={"rho": rho})
    w = hand.initial()
    c, own = tree.zeros_like(w), [tree.zeros_like(w)] * 5
    for round in range(1, 4):
        chosen, models = fed.schedule.clients(round).tolist(), []
        changes = tree.zeros_like(w)
        for i in chosen:

            def rule(slope: hand.Slope, v: Tree, i: int = i, c: Tree = c) -> Tree:
                g = slope(v)
                g = slope(hand.up(v, g, rho / float(hand.norm(g))))
                return hand.up(hand.up(g, own[i], -1.0), c)

            y, k = hand.steps(fed, round, i, w, rule, epochs=2)
            new = {n: own[i][n] - c[n] + (w[n] - y[n]) / (0.1 * k) for n in w}
            changes = hand.up(changes, tree.sub(new, own[i]))
            own[i] = new
            models.append(y)
        w, c = hand.mean(models), hand.up(c, changes, 1 / 5)
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-11
    mean = {n.removeprefix("control/"): x for n, x in fed.state["c"].items()}
    assert tiny.apart(mean, hand.mean(own)) < 1e-11
