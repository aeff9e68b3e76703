"""FedRep: tau_h passes over the head, then the body under the new head."""

from __future__ import annotations

from tests.federated import tiny
from tests.federated.methods import by_hand
from tests.federated.methods.by_hand import BODY, HEAD

from isthmus import tree


def test_by_hand() -> None:
    fed = tiny.federation("fedrep", by_hand.TASK, epochs=2, settings={"tau_h": 3})
    w = by_hand.initial()
    heads, body = [by_hand.only(w, HEAD)] * 5, by_hand.only(w, BODY)
    for round in (1, 2):
        made = []
        for i in range(5):
            first, then = (
                by_hand.batches(fed, by_hand.key_of(fed, round, i, phase), i, epochs)
                for phase, epochs in ((0, 3), (1, 2))
            )
            own = by_hand.descend({**body, **heads[i]}, first, HEAD)
            own = by_hand.descend(own, then, BODY)
            heads[i] = by_hand.only(own, HEAD)
            made.append(by_hand.only(own, BODY))
        body = by_hand.mean(made)
        fed.step()
        assert tiny.apart(fed.state["shared"], body) < 1e-13
        assert tiny.apart(tiny.kept(fed), tree.stack(heads)) < 1e-13


def test_the_head_never_crosses_and_its_passes_are_cheaper() -> None:
    fed = tiny.federation("fedrep", by_hand.TASK, settings={"tau_h": 1})
    down, up, _ = by_hand.crossed(fed, 2)
    assert down == up == set(BODY)
    per = {n: tiny.play(n, by_hand.TASK, 2).ledger.total("flops") for n in ("fedavg",)}
    # A pass over the head alone needs no gradient beyond it, one over the body alone needs all
    # but that of the head's weights: together more than one pass over both, less than two.
    assert 1.2 * per["fedavg"] < fed.ledger.total("flops") < 1.9 * per["fedavg"]
