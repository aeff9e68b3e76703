"""Per-FedAvg: the first-order step by hand, the Hessian-free one against second derivatives."""

from __future__ import annotations

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from tests.federated.methods.by_hand import entropy, gradient
from torch import Tensor

from isthmus import tree
from isthmus.learn.plan import random_batches_many
from isthmus.tree import Tree

Part = tuple[Tensor, Tensor]


def dealt(parts: list[Part], deals: int) -> list[list[Part]]:
    return [[(x[k::deals], y[k::deals]) for k in range(deals)] for x, y in parts]


def on(w: Tree, part: Part) -> Tree:
    return gradient(entropy, w, *part) if len(part[1]) else tree.zeros_like(w)


@pytest.mark.parametrize("form", ["fo", "hf"])
def test_by_hand(form: str) -> None:
    alpha, delta = 0.3, 1e-2
    settings = {"alpha": alpha, "form": form, "delta": delta}
    fed = tiny.federation("per-fedavg", by_hand.TASK, epochs=2, batch=4, settings=settings)
    deals = {"fo": 2, "hf": 3}[form]
    w = by_hand.initial()
    for round in (1, 2):
        made = []
        for i in range(5):
            own = w
            parts = by_hand.batches(fed, by_hand.key_of(fed, round, i), i, 2, 4 * deals)
            for d in dealt(parts, deals):
                g = on(tree.add(own, on(own, d[0]), alpha=-alpha), d[1])
                if form == "hf":
                    a, b = (
                        on(tree.add(own, g, alpha=delta), d[2]),
                        on(tree.add(own, g, alpha=-delta), d[2]),
                    )
                    g = {n: g[n] - alpha * (a[n] - b[n]) / (2 * delta) for n in g}
                own = tree.add(own, g, alpha=-0.1)
            made.append(own)
        w = by_hand.mean(made, torch.ones(5).double())
        fed.step()
        assert tiny.apart(fed.state["shared"], w) < 1e-12


def test_the_hessian_free_step_is_the_gradient_of_the_adapted_loss() -> None:
    """All clients and batches hold the same items, so D = D' = D'' and autograd gives the rest."""
    x, y = (t.repeat_interleave(6, 0) for t in tiny.data((5,), torch.float64))
    task = tiny.task((30,), data=(x, y))
    alpha = 0.5
    w = {n: t.requires_grad_() for n, t in by_hand.initial().items()}
    inner = torch.autograd.grad(entropy(w, x, y), list(w.values()), create_graph=True)
    u = {n: t - alpha * g for (n, t), g in zip(w.items(), inner, strict=True)}
    exact = dict(zip(w, torch.autograd.grad(entropy(u, x, y), list(w.values())), strict=True))
    moved = {}
    for form in ("hf", "fo"):
        settings = {"alpha": alpha, "form": form, "delta": 1e-4}
        # In the order of the items, all deals of a full batch hold the same five items.
        fed = tiny.play("per-fedavg", task, 1, lr=1.0, batch=0, settings=settings)
        moved[form] = {n: w[n].detach() - t for n, t in fed.state["shared"].items()}
    assert tiny.apart(exact, moved["hf"]) < 1e-7
    assert tiny.apart(exact, moved["fo"]) > 1e-2


def test_clients_predict_after_one_step_of_their_own() -> None:
    fed = tiny.play("per-fedavg", by_hand.TASK, 2, settings={"alpha": 0.3})
    w = fed.state["shared"]
    for i, model in enumerate(by_hand.each(fed)):
        key = torch.tensor([by_hand.key_of(fed, 3, i, what="score")]).numpy()
        rows = torch.from_numpy(fed.ground.owned.rows(i))
        plan = random_batches_many(key, torch.tensor([len(rows)]).numpy(), 1, 8)
        picked = rows[plan.index[0, 0][plan.weight[0, 0] > 0]]
        part = (fed.ground.columns["x"][picked], fed.ground.columns["y"][picked])
        own = {n: model[n] for n in w}
        assert tiny.apart(own, tree.add(w, on(w, part), alpha=-0.3)) < 1e-13
