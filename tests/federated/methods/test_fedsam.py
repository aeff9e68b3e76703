"""FedSAM and FedLESAM: radius 0 is FedAvg; the perturbations, by hand."""

from __future__ import annotations

import pytest
from tests.federated import tiny
from tests.federated.methods import hand

from isthmus import tree
from isthmus.tree import Tree

EVEN = tiny.task((12, 12, 12))


@pytest.mark.parametrize("name", ["fedsam", "fedlesam"])
def test_radius_zero_is_fedavg(name: str) -> None:
    a = tiny.play(name, EVEN, 3, epochs=2, settings={"rho": 0.0})
    b = tiny.play("fedavg", EVEN, 3, epochs=2)
    assert tree.equal(hand.shared(a), hand.shared(b))
    assert tiny.apart(hand.shared(tiny.play(name, EVEN, 3, epochs=2)), hand.shared(b)) > 1e-4


def test_fedsam_by_hand() -> None:
    fed = tiny.federation("fedsam", hand.TASK, cohort=3, epochs=2, settings={"rho": 0.4})

    def rule(slope: hand.Slope, v: Tree) -> Tree:
        g = slope(v)
        return slope(hand.up(v, g, 0.4 / float(hand.norm(g))))

    w = hand.initial()
    for round in (1, 2):
        chosen = fed.schedule.clients(round).tolist()
        w = hand.mean([hand.steps(fed, round, i, w, rule, epochs=2)[0] for i in chosen])
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-12


def test_fedlesam_by_hand() -> None:
    fed = tiny.federation("fedlesam", hand.TASK, cohort=3, epochs=2, settings={"rho": 0.4})
    w = hand.initial()
    old, lengths = [w] * 5, []
    for round in range(1, 5):
        chosen, models = fed.schedule.clients(round).tolist(), []
        for i in chosen:
            back = tree.sub(old[i], w)
            far = float(hand.norm(back))
            e = tree.scale(back, 0.4 / far if far else 0.0)
            lengths.append(float(hand.norm(e)))
            rule = lambda slope, v, e=e: slope(hand.up(v, e))  # noqa: E731
            models.append(hand.steps(fed, round, i, w, rule, epochs=2)[0])
            old[i] = w
        w = hand.mean(models)
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-11  # w_old - w is a difference of likes
    assert set(lengths[:3]) == {0.0}  # the first global model is the last one seen
    assert min(lengths[3:]) == pytest.approx(0.4) == max(lengths[3:])


def test_work_is_counted_by_gradients() -> None:
    sam, lesam, avg = (
        tiny.play(name, EVEN, 1).ledger.total("flops") for name in ("fedsam", "fedlesam", "fedavg")
    )
    assert sam == 2 * avg and lesam == avg
