"""FedSpeed: FedDyn at radius 0, exact on parabolas, its duals, and the rule of its server."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import hand

from isthmus import tree
from isthmus.contracts import Meta, Reduced, Update
from isthmus.errors import InputError
from isthmus.federated.cohort import Cohort, Done, Ground
from isthmus.federated.executors.sequential import Sequential
from isthmus.federated.method import Method, State
from isthmus.federated.methods.fedspeed import FedSpeed
from isthmus.federated.round import Federation
from isthmus.learn.phase import Carry, Visit
from isthmus.tree import Tree

QUICK = {"executor": "vectorised", "compile": "trace"}


def test_radius_zero_is_feddyn() -> None:
    keys = {"epochs": 2, "cohort": 3}
    for alpha in (1.0, 0.3):
        settings = {"lam": 10.0, "rho": 0.0, "alpha": alpha}
        speed = tiny.play("fedspeed", hand.TASK, 4, settings=settings, **keys)
        dyn = tiny.play("feddyn", hand.TASK, 4, settings={"alpha": 0.1}, **keys)
        assert tree.equal(tiny.state(speed), tiny.state(dyn))
        assert tree.equal(tiny.kept(speed), tiny.kept(dyn))
    other = tiny.play("fedspeed", hand.TASK, 4, **keys)
    assert tiny.apart(tiny.state(other), tiny.state(dyn)) > 1e-3


def test_by_hand() -> None:
    """The paper's symbols, g_i and not h_i, with the duals of all clients at the server."""
    lam, rho, alpha = 4.0, 0.3, 0.6
    settings = {"lam": lam, "rho": rho, "alpha": alpha}
    fed = tiny.federation("fedspeed", hand.TASK, cohort=3, epochs=2, settings=settings)
    w = hand.initial()
    g = [tree.zeros_like(w) for _ in range(5)]
    for round in range(1, 5):
        chosen, models = fed.schedule.clients(round).tolist(), []
        for i in chosen:

            def rule(slope: hand.Slope, v: Tree, i: int = i, w: Tree = w) -> Tree:
                g1 = slope(v)
                g2 = slope(hand.up(v, g1, rho / (float(hand.norm(g1)) + 1e-7)))
                q = {n: (1 - alpha) * g1[n] + alpha * g2[n] for n in v}
                return {n: q[n] - g[i][n] + (v[n] - w[n]) / lam for n in v}

            models.append(hand.steps(fed, round, i, w, rule, epochs=2)[0])
        for i, v in zip(chosen, models, strict=True):
            g[i] = hand.up(g[i], tree.sub(v, w), -1.0 / lam)
        w = hand.up(hand.mean(models), hand.mean(g), -lam)
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-11


def test_the_dual_is_the_sum_of_own_updates_and_the_server_holds_the_mean() -> None:
    lam = 4.0
    fed = tiny.federation("fedspeed", hand.TASK, cohort=2, settings={"lam": lam})
    sums = tree.zeros_like({n: torch.stack([x] * 5) for n, x in hand.initial().items()})

    class Watched(Sequential):
        def run(self, method: Method, ground: Ground, cohort: Cohort) -> Done:
            done = super().run(method, ground, cohort)
            for row, client in enumerate(cohort.clients):
                for n, x in done.updates.delta.items():
                    sums[n][client] += x[row]
            return done

    fed.executor = Watched()
    for _ in range(8):
        fed.step()
        h = {n.removeprefix("h/"): x for n, x in tiny.kept(fed).items()}
        g = tree.scale(h, -1.0 / lam)
        assert tiny.apart(g, tree.scale(sums, -1.0 / lam)) < 1e-13
        assert tiny.apart({n: x.sum(0) / 5 for n, x in h.items()}, fed.state["h"]) < 1e-12
    assert len(fed.store) == 5 and float(hand.norm(fed.state["h"])) > 1e-2


def test_a_step_comes_back_to_where_it_was() -> None:
    """With a learning rate near nothing, the perturbation leaves no trace in the weights."""
    fed = tiny.play("fedspeed", hand.TASK, 1, lr=1e-300, settings={"rho": 7.0})
    assert tree.equal(hand.shared(fed), hand.initial())


@pytest.mark.parametrize("steps", [1, 10, pytest.param(50, marks=pytest.mark.slow)])
def test_parabolas_are_solved_exactly(steps: int) -> None:
    """Everyone in every round: no error and no sum of duals; FedAvg is off as soon as K > 1."""
    task, a, b = hand.quadratics()
    keys = {"lr": 0.2, "steps": steps, **QUICK}
    speed = tiny.play("fedspeed", task, 36, settings={"lam": 0.5, "rho": 0.0}, **keys)
    assert abs(float(hand.shared(speed)["w"]) - hand.optimum(a, b)) < 1e-8
    duals = tiny.kept(speed)["h/w"] / 0.5
    assert abs(float(duals.sum())) < 1e-7 < 1.0 < float(duals.abs().max())
    if steps > 1:
        avg = tiny.play("fedavg", task, 8, **keys)
        assert abs(float(hand.shared(avg)["w"]) - hand.optimum(a, b)) > 1e-3


class ParticipantsOnly(FedSpeed):
    """The rule of the paper's box: w <- mean_S (v_i + h_i)."""

    def finish(
        self, visit: Visit, params: Tree, down: Tree, carry: Carry, kept: Tree
    ) -> tuple[Update, Tree]:
        update, local = super().finish(visit, params, down, carry, kept)
        update.delta = {n: x + local[f"h/{n}"] for n, x in update.delta.items()}
        return update, local

    def server(self, state: State, reduced: Reduced, meta: Sequence[Meta]) -> State:
        return {**state, "shared": tree.add(state["shared"], reduced.tensors)}


@pytest.mark.slow
def test_the_mean_of_all_duals_decides_with_few_participants() -> None:
    """Five of ten clients: no error with the mean over all, a wandering model without."""
    task, a, b = hand.quadratics()
    keys = {"lr": 0.2, "steps": 4, "cohort": 5, "settings": {"lam": 0.5, "rho": 0.0}, **QUICK}
    fed, other = (tiny.federation("fedspeed", task, **keys) for _ in range(2))
    other.method.__class__ = ParticipantsOnly
    errors = []
    for round in range(75):
        fed.step()
        if round < 40:
            other.step()
            errors.append(abs(float(hand.shared(other)["w"]) - hand.optimum(a, b)))
    assert abs(float(hand.shared(fed)["w"]) - hand.optimum(a, b)) < 1e-6
    assert sum(errors[10:]) / 30 > 0.3


def test_two_gradients_a_step_are_counted() -> None:
    """In the ledger's work and in virtual time alike."""
    speed, dyn = (tiny.play(name, hand.TASK, 2, epochs=3) for name in ("fedspeed", "feddyn"))
    assert speed.ledger.total("flops") == 2 * dyn.ledger.total("flops") > 0

    def seconds(fed: Federation) -> float:
        return sum(row["seconds"] for row in fed.ledger.rows() if row["what"] == "work")

    assert seconds(speed) == pytest.approx(2 * seconds(dyn))


def test_other_optimisers_are_refused() -> None:
    with pytest.raises(InputError, match="plain sgd with method fedspeed"):
        tiny.federation("fedspeed", hand.TASK, optimiser="sgd:momentum=0.5")
