"""FedADMM: the optimum of parabolas, the server as the mean of all clients, and by hand."""

from __future__ import annotations

import pytest
from tests.federated import tiny
from tests.federated.methods import hand

from isthmus import tree
from isthmus.errors import InputError
from isthmus.tree import Tree


@pytest.mark.parametrize("cohort", [10, 5])
def test_parabolas_are_solved_exactly(cohort: int) -> None:
    task, a, b = hand.quadratics()
    keys = {"lr": 0.2, "steps": 4, "cohort": cohort, "executor": "vectorised", "compile": "trace"}
    fed = tiny.play("fedadmm", task, 90, settings={"eta": 1.0}, **keys)
    assert abs(float(hand.shared(fed)["w"]) - hand.optimum(a, b)) < 1e-6


def test_by_hand() -> None:
    eta = 3.0
    fed = tiny.federation("fedadmm", hand.TASK, cohort=3, epochs=2, settings={"eta": eta})
    z = hand.initial()
    dual, each = [tree.zeros_like(z)] * 5, [z] * 5
    for round in range(1, 5):
        for i in fed.schedule.clients(round).tolist():

            def rule(slope: hand.Slope, v: Tree, i: int = i, z: Tree = z) -> Tree:
                return hand.up(hand.up(slope(v), dual[i]), tree.sub(v, z), 1.0 / eta)

            x, _ = hand.steps(fed, round, i, z, rule, epochs=2)
            dual[i] = hand.up(dual[i], tree.sub(x, z), 1.0 / eta)
            each[i] = hand.up(x, dual[i], eta)
        z = hand.mean(each)
        fed.step()
        assert tiny.apart(hand.shared(fed), z) < 1e-11
        held = {n.removeprefix("z/"): x for n, x in tiny.kept(fed).items() if n.startswith("z/")}
        assert tiny.apart(held, tree.stack(each)) < 1e-11


def test_other_optimisers_are_refused() -> None:
    with pytest.raises(InputError, match="plain sgd with method fedadmm"):
        tiny.federation("fedadmm", hand.TASK, optimiser="adamw")
