"""LG-FedAvg, by hand; it and FedPer are FedAvg with the other half kept."""

from __future__ import annotations

from tests.federated import tiny
from tests.federated.methods import by_hand
from tests.federated.methods.by_hand import BODY, HEAD

from isthmus import tree


def test_by_hand() -> None:
    fed = tiny.federation("lg-fedavg", by_hand.TASK)
    w = by_hand.initial()
    bodies, head = [by_hand.only(w, BODY)] * 5, by_hand.only(w, HEAD)
    for round in (1, 2):
        made = []
        for i in range(5):
            parts = by_hand.batches(fed, by_hand.key_of(fed, round, i), i)
            own = by_hand.descend({**bodies[i], **head}, parts)
            bodies[i] = by_hand.only(own, BODY)
            made.append(by_hand.only(own, HEAD))
        head = by_hand.mean(made)
        fed.step()
        assert tiny.apart(fed.state["shared"], head) < 1e-13
        assert tiny.apart(tiny.kept(fed), tree.stack(bodies)) < 1e-13


def test_the_body_never_crosses() -> None:
    fed = tiny.federation("lg-fedavg", by_hand.TASK)
    down, up, _ = by_hand.crossed(fed, 2)
    assert down == up == set(HEAD)
    size = by_hand.bytes_of(by_hand.initial(), HEAD)
    assert fed.ledger.total("values", direction="up") == 10 * size


def test_in_the_first_round_each_half_moves_as_in_fedavg() -> None:
    whole = tiny.play("fedavg", by_hand.TASK, 1).state["shared"]
    body = tiny.play("fedper", by_hand.TASK, 1).state["shared"]
    head = tiny.play("lg-fedavg", by_hand.TASK, 1).state["shared"]
    assert tree.equal(whole, {n: {**body, **head}[n] for n in whole})
