"""FedPer, by hand; and what never crosses."""

from __future__ import annotations

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from tests.federated.methods.by_hand import BODY, HEAD

from isthmus import tree
from isthmus.errors import InputError


def test_by_hand_with_a_partial_cohort() -> None:
    """Each head goes its own way, also while its owner is absent; bodies are averaged."""
    fed = tiny.federation("fedper", by_hand.TASK, cohort=3, epochs=2)
    w = by_hand.initial()
    heads = [by_hand.only(w, HEAD)] * 5
    body, seen = by_hand.only(w, BODY), set()
    for round in range(1, 4):
        chosen = fed.schedule.clients(round).tolist()
        seen.add(tuple(chosen))
        made = []
        for i in chosen:
            parts = by_hand.batches(fed, by_hand.key_of(fed, round, i), i, 2)
            own = by_hand.descend({**body, **heads[i]}, parts)
            heads[i] = by_hand.only(own, HEAD)
            made.append(by_hand.only(own, BODY))
        body = by_hand.mean(made, by_hand.SIZES[chosen])
        fed.step()
        assert tiny.apart(fed.state["shared"], body) < 1e-13
        assert tiny.apart(tiny.kept(fed), tree.stack(heads)) < 1e-13
    assert len(seen) > 1
    for i, model in enumerate(by_hand.each(fed)):
        assert tiny.apart(model, {**body, **heads[i]}) < 1e-13


def test_the_head_never_crosses() -> None:
    fed = tiny.federation("fedper", by_hand.TASK)
    down, up, _ = by_hand.crossed(fed, 2)
    assert down == up == set(BODY)
    size = by_hand.bytes_of(by_hand.initial(), BODY)
    assert fed.ledger.sums("values", by="kind", what="crossing") == {
        "model": 10 * size,
        "update": 10 * size,
    }


@pytest.mark.parametrize("name", ["fedper", "lg-fedavg", "fedrep", "fedbabu", "fedrod", "fedrecon"])
def test_a_model_without_halves_is_refused(name: str) -> None:
    task = tiny.task(module=lambda seed: torch.nn.Linear(tiny.WIDE, 4).double())
    with pytest.raises(InputError, match=f"method: {name} given"):
        tiny.federation(name, task)
