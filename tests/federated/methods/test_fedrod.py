"""FedRoD: two heads that do not see each other's loss, and a prior that is the client's counts."""

from __future__ import annotations

from typing import Any

import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from tests.federated.methods.by_hand import ALL, BODY, HEAD
from torch import Tensor, nn

from isthmus import tree
from isthmus.tree import Tree

P = ("personal.weight", "personal.bias")


def features(w: Tree, x: Tensor) -> Tensor:
    return torch.tanh(x @ w[BODY[0]].T + w[BODY[1]])


def test_by_hand() -> None:
    gamma = 0.7
    fed = tiny.federation("fedrod", by_hand.TASK, epochs=2, settings={"gamma": gamma})
    shared = by_hand.initial()
    zero = {P[0]: torch.zeros(4, 9).double(), P[1]: torch.zeros(4).double()}
    owns = [zero] * 5
    for round in (1, 2):
        made = []
        for i in range(5):
            ((_, labels),) = by_hand.batches(fed, 0, i, 1, 0)
            prior = torch.bincount(labels, minlength=4).double().pow(gamma)

            def loss(w: Tree, x: Tensor, y: Tensor, prior: Tensor = prior) -> Tensor:
                """Balanced softmax as a ratio of weighted exponentials; the personal head apart."""
                e = prior * by_hand.logits(w, x).exp()
                balanced = -(e[torch.arange(len(y)), y] / e.sum(1)).log().mean()
                still = {n: t.detach() for n, t in w.items()}
                p = by_hand.logits(still, x) + features(still, x) @ w[P[0]].T + w[P[1]]
                return balanced + nn.functional.cross_entropy(p, y)

            parts = by_hand.batches(fed, by_hand.key_of(fed, round, i, 1), i, 2)
            own = by_hand.descend({**shared, **owns[i]}, parts, loss=loss)
            owns[i] = by_hand.only(own, P)
            made.append(by_hand.only(own, ALL))
        shared = by_hand.mean(made)
        fed.step()
        assert tiny.apart(fed.state["shared"], shared) < 1e-12
        assert tiny.apart(tiny.kept(fed), tree.stack(owns)) < 1e-11
    x = fed.ground.columns["x"][:7]
    for i, tensors in enumerate(by_hand.each(fed)):
        p = by_hand.logits(shared, x) + features(shared, x) @ owns[i][P[0]].T + owns[i][P[1]]
        torch.testing.assert_close(by_hand.said(fed, i, tensors, x), p)


def even() -> Any:
    """Three clients, each with as many items of every class."""
    x, _ = tiny.data((8, 16, 4), torch.float64)
    return tiny.task((8, 16, 4), data=(x, torch.arange(28) % 4))


def test_with_even_classes_or_gamma_0_the_generic_model_is_fedavgs() -> None:
    """The personal loss reaches neither body nor generic head."""
    keys = {"batch": 0, "epochs": 3}
    plain, balanced = (
        tiny.play(n, even(), 2, **keys).state["shared"] for n in ("fedavg", "fedrod")
    )
    assert tiny.apart(plain, balanced) < 1e-12
    a = tiny.play("fedavg", by_hand.TASK, 2, **keys).state["shared"]
    b = tiny.play("fedrod", by_hand.TASK, 2, settings={"gamma": 0.0}, **keys).state["shared"]
    c = tiny.play("fedrod", by_hand.TASK, 2, **keys).state["shared"]
    assert tiny.apart(a, b) < 1e-14 and tiny.apart(a, c) > 1e-3


def test_the_personal_head_never_crosses() -> None:
    fed = tiny.federation("fedrod", by_hand.TASK)
    down, up, _ = by_hand.crossed(fed, 2)
    assert down == up == {*BODY, *HEAD}
    assert fed.method.names.local == P
