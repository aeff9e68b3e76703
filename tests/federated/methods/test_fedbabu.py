"""FedBABU: nobody trains the head until a client predicts, and nobody keeps what it tuned."""

from __future__ import annotations

import pytest
from tests.federated import tiny
from tests.federated.methods import by_hand
from tests.federated.methods.by_hand import ALL, BODY, HEAD

from isthmus import tree


@pytest.mark.parametrize("part", ["head", "body", "full"])
def test_by_hand(part: str) -> None:
    settings = {"tau_f": 2, "part": part}
    fed = tiny.federation("fedbabu", by_hand.TASK, epochs=2, settings=settings)
    w = by_hand.initial()
    for round in (1, 2):
        made = []
        for i in range(5):
            parts = by_hand.batches(fed, by_hand.key_of(fed, round, i), i, 2)
            made.append(by_hand.descend(w, parts, BODY))
        w = by_hand.mean(made)
        fed.step()
        assert tiny.apart(fed.state["shared"], by_hand.only(w, BODY)) < 1e-13
    tuned = {"head": HEAD, "body": BODY, "full": ALL}[part]
    before = tiny.kept(fed)
    for i, model in enumerate(by_hand.each(fed)):
        parts = by_hand.batches(fed, by_hand.key_of(fed, 3, i, what="score"), i, 2)
        own = by_hand.descend(w, parts, tuned)
        assert tiny.apart(model, own) < 1e-13
        assert tiny.apart(by_hand.only(own, tuned), by_hand.only(w, tuned)) > 1e-3
    assert tree.equal(before, tiny.kept(fed))


def test_the_head_stays_what_it_was_and_never_crosses() -> None:
    fed = tiny.federation("fedbabu", by_hand.TASK)
    down, up, _ = by_hand.crossed(fed, 3)
    assert down == up == set(BODY)
    first = by_hand.only(by_hand.initial(), HEAD)
    assert tree.equal(tiny.kept(fed), tree.stack([first] * 5))
