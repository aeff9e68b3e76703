"""FedCM and MoFedSAM: their limits, and by hand."""

from __future__ import annotations

import pytest
from tests.federated import tiny
from tests.federated.methods import hand

from isthmus import tree
from isthmus.errors import InputError
from isthmus.tree import Tree

EVEN = tiny.task((12, 12, 12))


def test_a_share_of_one_is_the_method_without_momentum() -> None:
    cm = tiny.play("fedcm", EVEN, 3, epochs=2, settings={"alpha": 1.0})
    assert tree.equal(hand.shared(cm), hand.shared(tiny.play("fedavg", EVEN, 3, epochs=2)))
    mo = tiny.play("mofedsam", EVEN, 3, epochs=2, settings={"beta": 1.0, "rho": 0.3})
    sam = tiny.play("fedsam", EVEN, 3, epochs=2, settings={"rho": 0.3})
    assert tree.equal(hand.shared(mo), hand.shared(sam))


def test_mofedsam_of_radius_zero_is_fedcm() -> None:
    mo = tiny.play("mofedsam", hand.TASK, 4, cohort=3, settings={"beta": 0.3, "rho": 0.0})
    cm = tiny.play("fedcm", hand.TASK, 4, cohort=3, settings={"alpha": 0.3})
    assert tree.equal(tiny.state(mo), tiny.state(cm))
    more = tiny.play("mofedsam", hand.TASK, 4, cohort=3, settings={"beta": 0.3, "rho": 0.1})
    assert tiny.apart(tiny.state(more), tiny.state(cm)) > 1e-4


@pytest.mark.parametrize("name", ["fedcm", "mofedsam"])
def test_by_hand(name: str) -> None:
    rho = 0.2 if name == "mofedsam" else 0.0
    settings = {"beta": 0.3, "rho": rho} if rho else {"alpha": 0.3}
    fed = tiny.federation(name, hand.TASK, cohort=3, settings={**settings, "server_lr": 0.7})
    w = hand.initial()
    delta = tree.zeros_like(w)
    for round in range(1, 5):
        chosen = fed.schedule.clients(round).tolist()

        def rule(slope: hand.Slope, v: Tree, delta: Tree = delta) -> Tree:
            g = slope(v)
            if rho:
                g = slope(hand.up(v, g, rho / float(hand.norm(g))))
            return hand.up(tree.scale(g, 0.3), delta, 0.7)

        models, counts = zip(*(hand.steps(fed, round, i, w, rule) for i in chosen), strict=True)
        moved = tree.sub(hand.mean(list(models)), w)
        delta = tree.scale(moved, -1.0 / (0.1 * sum(counts) / 3))
        w = hand.up(w, moved, 0.7)
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-12
    assert float(hand.norm(delta)) > 0.1


def test_the_direction_is_sent_and_not_uploaded() -> None:
    fed = tiny.play("fedcm", EVEN, 2)
    assert fed.ledger.total("values", direction="down") == 2 * fed.ledger.total(
        "values", direction="up"
    )
    with pytest.raises(InputError, match="plain sgd with method mofedsam"):
        tiny.federation("mofedsam", EVEN, optimiser="adamw")
