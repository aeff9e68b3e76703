"""Peers without a server: what mixing keeps, what it equals, and who hears of whom."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated import tiny

from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.gossip import consensus
from isthmus.federated.schedulers.graph import GRAPHS, graph, matching, metropolis, rho
from isthmus.federated.schedulers.mobility import MOTIONS, Mobility, cover
from isthmus.federated.score import models_of
from isthmus.run import checkpoint

SIZES = (8, 16, 8, 24, 8, 16)


def doubly_stochastic(w: np.ndarray) -> bool:
    one = np.ones(len(w))
    exact = np.allclose(w.sum(0), one, atol=1e-12) and np.allclose(w.sum(1), one, atol=1e-12)
    return bool(exact and (w >= 0).all() and np.array_equal(w, w.T))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 14), seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_matrices_are_doubly_stochastic(n: int, seed: int, share: float) -> None:
    draw = np.random.default_rng(seed)
    near = np.triu(draw.random((n, n)) < share, 1)
    near = near | near.T
    for w in (metropolis(near), matching(near, seed)):
        assert doubly_stochastic(w)
        assert not (w * ~near * (1 - np.eye(n))).any()


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_and_their_rate(name: str) -> None:
    """By the closed form where there is one, and 1 exactly where nothing connects."""
    n = 8
    w = metropolis(graph(name, n))
    if name == "complete":
        np.testing.assert_allclose(w, 1 / n)
        assert rho([w]) < 1e-12
    elif name == "ring":  # eigenvalues (1 + 2 cos(2 pi k / n)) / 3
        assert rho([w]) == pytest.approx(((1 + 2 * np.cos(2 * np.pi / n)) / 3) ** 2)
    elif name == "none":
        assert rho([w]) == pytest.approx(1.0)
    else:
        assert rho([w]) < 1


def test_complete_graph_is_fedavg_with_uniform_weights() -> None:
    """Every peer ends a round with the mean of all trained models, whatever their sizes."""
    task = tiny.task(SIZES)
    keys: dict[str, Any] = {"schedule": "decentralised-sgd:graph=complete", "epochs": 2}
    fed = tiny.federation("fedavg", task, **keys)
    plain = tiny.federation("fedavg", task, epochs=2)
    plain.method.weigh = lambda meta: torch.full((len(meta),), 1 / len(meta), dtype=torch.float64)  # type: ignore
    for _ in range(3):
        fed.step()
        plain.step()
    for name, x in plain.state["shared"].items():
        for i in range(len(SIZES)):
            torch.testing.assert_close(fed.state["peers"][name][i], x, rtol=1e-10, atol=1e-12)
    assert consensus(fed.state["peers"]) < 1e-20


@pytest.mark.parametrize("codec", ["dense", "int8", "topk:0.3"])
@pytest.mark.parametrize("schedule", ["decentralised-sgd", "gossip:graph=ring"])
def test_the_mean_model_stays(schedule: str, codec: str) -> None:
    """Mixing moves no mean, also when the codec loses something; models come closer."""
    task = tiny.task(SIZES)
    fed = tiny.federation("fedavg", task, schedule=schedule, codec=codec)
    trained: list[Any] = []
    mixed = fed._mixed

    def watched(own: Any, *rest: Any) -> Any:
        trained.append({name: x.clone() for name, x in own.items()})
        return mixed(own, *rest)

    fed._mixed = watched
    for _ in range(4):
        fed.step()
        for name, x in fed.state["peers"].items():
            torch.testing.assert_close(x.mean(0), trained[-1][name].mean(0), rtol=1e-9, atol=1e-12)
        if codec != "topk:0.3":
            assert consensus(fed.state["peers"]) < consensus(trained[-1])


def test_one_round_by_hand() -> None:
    """A star of three: W = [[1/3, 1/3, 1/3], [1/3, 2/3, 0], [1/3, 0, 2/3]]."""
    task = tiny.task((8, 8, 8))
    fed = tiny.federation("fedavg", task, schedule="decentralised-sgd:graph=star")
    alone = tiny.federation("fedavg", task, schedule="decentralised-sgd:graph=none")
    fed.step()
    alone.step()
    w = torch.tensor([[1.0, 1, 1], [1, 2, 0], [1, 0, 2]], dtype=torch.float64) / 3
    for name, y in alone.state["peers"].items():
        want = (w @ y.reshape(3, -1)).view_as(y)
        torch.testing.assert_close(fed.state["peers"][name], want, rtol=1e-12, atol=1e-14)
    rows = [row for row in fed.ledger.rows() if row["kind"] == "model"]
    pairs = {(row["from"], row["to"]) for row in rows}
    names = [f"client/{i:03d}" for i in range(3)]
    assert pairs == {(names[0], x) for x in names[1:]} | {(x, names[0]) for x in names[1:]}
    assert not [row for row in alone.ledger.rows() if row["kind"] == "model"]


def test_vectorised_and_resumed(tmp_path: Any) -> None:
    task = tiny.task(SIZES, dropout=0.3)
    keys: dict[str, Any] = {"schedule": "mobility:motion=dam,mobile=2,r=0.3", "epochs": 2}
    keys |= {"link": "wifi,loss=0.2,attempts=2", "speeds": "1,3"}
    one = tiny.federation("fedprox", task, **keys)
    many = tiny.federation("fedprox", task, executor="vectorised", **keys)
    half = tiny.federation("fedprox", task, executor="vectorised", **keys)
    for step in range(6):
        one.step()
        many.step()
        if step < 3:
            half.step()
    assert tiny.apart(tiny.state(one), tiny.state(many)) <= 1e-9
    assert list(one.ledger.rows()) == list(many.ledger.rows())
    checkpoint.write(tmp_path, half, {})
    again = tiny.federation("fedprox", task, executor="vectorised", **keys)
    checkpoint.restore(again, *checkpoint.read(tmp_path))
    for _ in range(3):
        again.step()
    for name, x in tiny.state(many).items():
        assert torch.equal(x, tiny.state(again)[name])
    assert again.now == many.now


def test_islands_know_nothing_of_each_other() -> None:
    """Two islands, nobody moves: other data on one leave the other's bits alone; a shuttle between
    them does not."""
    n, far = 6, 0.9

    def play(shuttle: bool, flip: bool) -> Any:
        x, y = tiny.data((8,) * n, torch.float64)
        if flip:
            y = torch.where(torch.arange(len(y)) >= 24, 3 - y, y)
        task = tiny.task((8,) * n, data=(x, y))
        motion = "waypoint" if shuttle else "static"
        fed = tiny.federation(
            "fedavg", task, schedule=f"mobility:motion={motion},mobile=1,r=0.12,move=1.5"
        )
        places = np.array(
            [[0.05, 0.05 * i] for i in range(3)] + [[far, 0.05 * i] for i in range(3)]
        )
        fed.schedule.places, fed.schedule.movers = places, np.array([1])
        goal = places[4]
        for round in range(6):
            fed.schedule.goals[1] = goal if round % 2 == 0 else np.array([0.05, 0.05])
            fed.step()
        return fed

    for shuttle in (False, True):
        a, b = play(shuttle, False), play(shuttle, True)
        left = [0, 2]
        same = all(
            torch.equal(x[left], b.state["peers"][name][left])
            for name, x in a.state["peers"].items()
        )
        assert same is not shuttle


def histograms(n: int, classes: int = 10) -> np.ndarray:
    held = np.zeros((n, classes), int)
    for i in range(n):
        held[i, [i % classes, (i + 1) % classes]] = 5 + i % 3
    return held


@settings(max_examples=40, deadline=None)
@given(
    motion=st.sampled_from(MOTIONS), seed=st.integers(0, 999), move=st.floats(0, 0.7),
    r=st.floats(0.02, 0.5), explore=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_moves_stay_in_reach_and_replay(
    motion: str, seed: int, move: float, r: float, explore: float
) -> None:
    """At most R_m a round, inside the square, static peers still; the same from a saved state."""
    keys: dict[str, Any] = {"motion": motion, "move": move, "r": r, "explore": explore}

    def fresh() -> Mobility:
        return Mobility(12, seed, histograms(12), mobile=3, **keys)

    m, again = fresh(), fresh()
    for round in range(1, 8):
        before = m.places.copy()
        w = m.mixing(round)
        assert doubly_stochastic(w)
        moved = np.linalg.norm(m.places - before, axis=1)
        assert (moved <= move + 1e-9).all() and not moved[m.static].any()
        assert (m.places >= 0).all() and (m.places <= 1).all()
        if motion == "static":
            assert not moved.any()
        np.testing.assert_array_equal(w, again.mixing(round))
        saved = json.loads(json.dumps(again.state()))
        again = fresh()
        again.restore(saved)


def test_a_shuttle_connects() -> None:
    """rho is 1 for islands, and below 1 for the union over time once somebody travels."""
    still = Mobility(12, 3, histograms(12), motion="static", mobile=3, r=0.1)
    assert rho([still.mixing(t) for t in range(50)]) == pytest.approx(1.0)
    moving = Mobility(6, 3, histograms(6), motion="random", mobile=2, r=0.35, move=1.0)
    assert rho([moving.mixing(t) for t in range(400)]) < 0.9999


def test_nobody_mobile_is_static() -> None:
    none = Mobility(8, 5, histograms(8), motion="dcm", mobile=0)
    still = Mobility(8, 5, histograms(8), motion="static", mobile=0)
    np.testing.assert_array_equal(none.mixing(1), still.mixing(1))


def test_distribution_aware_peers_go_where_labels_are_missing() -> None:
    """One mover with class 0; left all class 0, right all class 1, both within reach: it goes
    right, and back once it has met enough of the right."""
    held = np.array([[9, 0]] + [[9, 0]] * 3 + [[0, 9]] * 3)
    for motion in ("dam", "dcm"):
        m = Mobility(7, 0, held, motion=motion, mobile=1, r=0.15, move=2.0, layout="random")
        m.movers, m.static = np.array([0]), np.arange(1, 7)
        m.places[:] = [[0.1, 0.5], *[[0.1, 0.4 + 0.1 * i] for i in range(3)],
                       *[[0.9, 0.4 + 0.1 * i] for i in range(3)]]  # fmt: skip
        m.spots = cover(m.places[1:], 0.15) if motion == "dcm" else m.places[1:].copy()
        m.met[0] = [1.0, 0.0]
        sides = []
        for t in range(6):
            m.mixing(t)
            sides.append(m.places[0, 0] > 0.5)
        assert sides[0] and not all(sides)


def test_cover_is_greedy_and_complete() -> None:
    points = np.array([[0.0, 0], [0.1, 0], [0.2, 0], [0.9, 0], [1.0, 0]])
    centres = cover(points, 0.1)
    assert centres.tolist()[0] == [0.1, 0.0] and len(centres) == 2
    far = np.linalg.norm(points[:, None] - centres[None], axis=2).min(1)
    assert (far <= 0.1 + 1e-12).all()


def test_every_peer_is_scored_with_its_own_model() -> None:
    fed = tiny.federation("fedavg", tiny.task(SIZES), schedule="decentralised-sgd")
    fed.step()
    who = np.arange(len(SIZES))
    for i, model in enumerate(models_of(fed, who, fed.store.get(who))):
        assert tree.equal(
            {n: model[n] for n in fed.state["peers"]}, tree.row(fed.state["peers"], i)
        )


def test_what_needs_a_server_is_refused() -> None:
    for method in ("scaffold", "fedadam", "fedmomentum"):
        with pytest.raises(InputError, match="gossip schedule"):
            tiny.federation(method, tiny.task(SIZES), schedule="gossip")
    with pytest.raises(InputError, match="cohort: 3 given, allowed: all 6"):
        tiny.federation("fedavg", tiny.task(SIZES), schedule="gossip", cohort=3)
    with pytest.raises(InputError, match=r"motion: damm given.*nearest: dam"):
        tiny.federation("fedavg", tiny.task(SIZES), schedule="mobility:motion=damm")


def test_median_runs_at_each_receiver() -> None:
    """Complete graph: every peer moves to the coordinate median of all trained models."""
    task = tiny.task((8, 8, 8, 8, 8))
    keys: dict[str, Any] = {"schedule": "decentralised-sgd:graph=complete"}
    fed = tiny.federation("fedavg", task, reducer="median", **keys)
    alone = tiny.federation("fedavg", task, schedule="decentralised-sgd:graph=none")
    fed.step()
    alone.step()
    for name, y in alone.state["peers"].items():
        want = y.median(0).values.expand_as(y)
        torch.testing.assert_close(fed.state["peers"][name], want, rtol=1e-9, atol=1e-12)
