"""FedFomo: weights, mixtures and who is sent what, by hand."""

from __future__ import annotations

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from torch import Tensor

from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.round import Federation
from isthmus.learn.plan import shuffled_epochs
from isthmus.tree import Tree


def parts(fed: Federation, client: int, s: int) -> tuple[Tensor, Tensor]:
    """The rows that judge, and those that train."""
    rows = torch.from_numpy(fed.ground.owned.rows(client))
    judge = torch.arange(len(rows)) % s == 0
    return rows[judge], rows[~judge]


def mixed(fed: Federation, own: Tree, others: list[Tree], rows: Tensor) -> tuple[Tree, list[float]]:
    x, y = fed.ground.columns["x"][rows], fed.ground.columns["y"][rows]
    loss = float(by_hand.entropy(own, x, y))
    w = []
    for other in others:
        far = sum(float((other[n] - own[n]).square().sum()) for n in own) ** 0.5
        w.append((loss - float(by_hand.entropy(other, x, y))) / far if far else 0.0)
    total = sum(max(0.0, v) for v in w)
    share = [max(0.0, v) / total if total else 0.0 for v in w]
    made = {
        n: own[n] + sum(v * (m[n] - own[n]) for v, m in zip(share, others, strict=True))
        for n in own
    }
    return made, w


def test_by_hand() -> None:
    s, settings = 3, {"M": 2, "eps": 0.5, "s": 3}
    fed = tiny.federation("fedfomo", by_hand.TASK, epochs=2, lr=0.4, settings=settings)
    models = [by_hand.initial()] * 5
    p = torch.zeros(5, 5).double()
    greedy, gained = 0, 0
    for round in (1, 2, 3, 4):
        made = []
        for i in range(5):
            who = fed.method.chosen(fed.state, i).tolist()  # pyright: ignore[reportAttributeAccessIssue]
            assert len(set(who)) == 2 and i not in who
            best = sorted((j for j in range(5) if j != i), key=lambda j: -p[i, j])[:2]
            greedy += round > 1 and set(who) == set(best)
            judge, train = parts(fed, i, s)
            own, w = mixed(fed, models[i], [models[j] for j in who], judge)
            gained += any(v > 0 for v in w)
            key = by_hand.key_of(fed, round, i, 1)
            plan = shuffled_epochs(key, len(train), 2, 8) if len(train) else None
            steps = (
                []
                if plan is None
                else [train[k[v > 0]] for k, v in zip(plan.index, plan.weight, strict=True)]
            )
            columns = fed.ground.columns
            data = [(columns["x"][r], columns["y"][r]) for r in steps]
            made.append((by_hand.descend(own, data, lr=0.4), who, w))
        for i, (model, who, w) in enumerate(made):
            models[i] = model
            p[i, who] += torch.tensor(w, dtype=torch.float64)
        fed.step()
        assert tiny.apart(fed.state["clients"], tree.stack(models)) < 1e-11
        torch.testing.assert_close(fed.state["p"], p, rtol=1e-9, atol=1e-12)
    assert gained >= 3 and greedy >= 5
    for i, model in enumerate(by_hand.each(fed)):
        who = fed.method.chosen(fed.state, i).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        own, _ = mixed(fed, models[i], [models[j] for j in who], parts(fed, i, s)[0])
        assert tiny.apart({n: model[n] for n in own}, own) < 1e-11


def test_what_crosses() -> None:
    fed = tiny.federation("fedfomo", by_hand.TASK, settings={"M": 2})
    down, up, _ = by_hand.crossed(fed, 1)
    assert down == {f"others/{n}" for n in by_hand.ALL} and up == {*by_hand.ALL, "weights"}
    size = by_hand.bytes_of(by_hand.initial(), by_hand.ALL)
    sums = fed.ledger.sums("values", by="kind", what="crossing")
    assert sums == {"model": 5 * 2 * size, "update": 5 * (size + 2 * 8)}


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="clients: 1 given"):
        tiny.federation("fedfomo", tiny.task((9,)))
    with pytest.raises(InputError, match="s: 1 given"):
        tiny.federation("fedfomo", by_hand.TASK, settings={"s": 1})
