"""pFedMe: by hand, and the envelope's gradient in closed form."""

from __future__ import annotations

import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from tests.federated.test_baselines import quadratic_task

from isthmus import tree
from isthmus.federated.twin import own


def test_by_hand() -> None:
    lam, K, eta, beta = 3.0, 2, 0.04, 1.3
    settings = {"lam": lam, "K": K, "eta": eta, "beta": beta}
    fed = tiny.federation("pfedme", by_hand.TASK, cohort=3, settings=settings)
    w, owns = by_hand.initial(), [by_hand.initial()] * 5
    for round in (1, 2):
        made = []
        chosen = fed.schedule.clients(round).tolist()
        for i in chosen:
            local = theta = w
            for x, y in by_hand.batches(fed, by_hand.key_of(fed, round, i), i):
                for _ in range(K):
                    g = by_hand.gradient(by_hand.entropy, theta, x, y)
                    theta = {n: t - 0.1 * (g[n] + lam * (t - local[n])) for n, t in theta.items()}
                local = {n: t - eta * lam * (t - theta[n]) for n, t in local.items()}
            owns[i] = theta
            made.append(local)
        even = by_hand.mean(made, torch.ones(3).double())
        w = {n: (1 - beta) * w[n] + beta * even[n] for n in w}
        fed.step()
        assert tiny.apart(fed.state["shared"], w) < 1e-13
        kept = tiny.kept(fed)
        assert tiny.apart({n: kept[own(n)] for n in w}, tree.stack(owns)) < 1e-13


def test_the_envelope_of_a_quadratic() -> None:
    """theta* = (b_i + lam w) / (1 + lam), and eta lam (w - theta*) is a step on the envelope."""
    task, lam, eta = quadratic_task(), 2.0, 0.1
    b = task.synthesise().train.columns["x"].view(3, 6, 3).mean(1)
    keys = {"lr": 0.25, "batch": 0, "steps": 1}
    fed = tiny.federation("pfedme", task, settings={"lam": lam, "K": 60, "eta": eta}, **keys)
    w = torch.zeros(3, dtype=torch.float64)
    for _ in range(3):
        theta = (b + lam * w) / (1 + lam)
        w = (w - eta * lam * (w - theta)).mean(0)
        fed.step()
        torch.testing.assert_close(fed.state["shared"]["w"], w, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tiny.kept(fed)["own__w"], theta, rtol=1e-9, atol=1e-9)


def test_beta_0_leaves_the_server_where_it_was_and_theta_never_crosses() -> None:
    fed = tiny.federation("pfedme", by_hand.TASK, settings={"beta": 0.0})
    down, up, _ = by_hand.crossed(fed, 2)
    assert down == up == set(by_hand.ALL)
    assert tree.equal(fed.state["shared"], by_hand.initial())
    start = {name: x.expand(5, *x.shape) for name, x in fed.store.initial.items()}
    assert tiny.apart(start, tiny.kept(fed)) > 1e-2
