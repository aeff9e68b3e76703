"""APFL: alpha 0 is the global model, alpha 1 the local one; between, the paper's three updates."""

from __future__ import annotations

import torch
from tests.federated import tiny
from tests.federated.methods import by_hand

from isthmus import tree
from isthmus.federated.twin import own


def test_alpha_0_is_fedavg_and_alpha_1_is_local_training() -> None:
    x = tiny.data((20,), torch.float64, seed=9)[0]
    task = tiny.task(dropout=0.3)
    fedavg, local = (tiny.play(n, task, 3, epochs=2) for n in ("fedavg", "local-only"))
    for alpha in (0.0, 1.0):
        settings = {"alpha": alpha, "adaptive": False}
        fed = tiny.play("apfl", task, 3, epochs=2, settings=settings)
        assert tree.equal(fed.state["shared"], fedavg.state["shared"])
        for i, (model, alone) in enumerate(
            zip(by_hand.each(fed), by_hand.each(local), strict=True)
        ):
            other = fedavg.state["shared"] if alpha == 0 else alone
            said = {"y": by_hand.said(fed, i, model, x)}
            assert tiny.apart(said, {"y": by_hand.logits(other, x)}) < 1e-14


def test_by_hand() -> None:
    fed = tiny.federation("apfl", by_hand.TASK, epochs=2, lr=0.4, settings={"alpha": 0.7})
    w, owns, alphas = by_hand.initial(), [by_hand.initial()] * 5, [0.7] * 5
    for round in (1, 2, 3, 4):
        made = []
        for i in range(5):
            local, v, alpha = w, owns[i], alphas[i]
            for t, (x, y) in enumerate(by_hand.batches(fed, by_hand.key_of(fed, round, i), i, 2)):
                mixed = {n: alpha * v[n] + (1 - alpha) * local[n] for n in w}
                g = by_hand.gradient(by_hand.entropy, local, x, y)
                h = by_hand.gradient(by_hand.entropy, mixed, x, y)
                along = sum(float(((v[n] - local[n]) * h[n]).sum()) for n in w)
                local, v, alpha = (
                    {n: local[n] - 0.4 * g[n] for n in w},
                    {n: v[n] - 0.4 * alpha * h[n] for n in w},
                    min(1.0, max(0.0, alpha - 0.4 * along)) if t == 0 else alpha,
                )
            owns[i], alphas[i] = v, alpha
            made.append(local)
        w = by_hand.mean(made)
        fed.step()
        kept = tiny.kept(fed)
        assert tiny.apart(fed.state["shared"], w) < 1e-12
        assert tiny.apart({n: kept[own(n)] for n in w}, tree.stack(owns)) < 1e-12
        torch.testing.assert_close(kept["apfl_alpha"], torch.tensor(alphas, dtype=torch.float64))
    assert max(alphas) - min(alphas) > 0.01
    x = fed.ground.columns["x"][:5]
    for i, tensors in enumerate(by_hand.each(fed)):
        mixed = {n: alphas[i] * owns[i][n] + (1 - alphas[i]) * w[n] for n in w}
        torch.testing.assert_close(by_hand.said(fed, i, tensors, x), by_hand.logits(mixed, x))


def test_neither_private_model_nor_alpha_crosses() -> None:
    down, up, _ = by_hand.crossed(tiny.federation("apfl", by_hand.TASK), 2)
    assert down == up == set(by_hand.ALL)
