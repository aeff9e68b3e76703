"""FedProto: prototypes by hand, nearest ones predict, and no weight crosses."""

from __future__ import annotations

import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from tests.federated.methods.by_hand import BODY
from torch import Tensor

from isthmus import tree
from isthmus.tree import Tree


def features(w: Tree, x: Tensor) -> Tensor:
    return torch.tanh(x @ w[BODY[0]].T + w[BODY[1]])


def sparse():
    """Client 0 alone has class 3; nobody has class 1 but client 4."""
    x, y = tiny.data(tiny.RAGGED, torch.float64)
    owner = torch.arange(5).repeat_interleave(torch.tensor(tiny.RAGGED))
    y = torch.where((y == 3) & (owner != 0), 2, y)
    y = torch.where((y == 1) & (owner != 4), 0, y)
    return tiny.task(data=(x, torch.where(owner == 0, 3, y)))


def test_by_hand_with_a_partial_cohort() -> None:
    lam, task = 0.8, sparse()
    fed = tiny.federation("fedproto", task, cohort=3, epochs=2, settings={"lam": lam})
    models = [by_hand.initial()] * 5
    C, seen = torch.zeros(4, 9).double(), torch.zeros(4).double()
    for round in range(1, 5):
        sums, counts = torch.zeros(4, 9).double(), torch.zeros(4).double()
        chosen = fed.schedule.clients(round).tolist()
        for i in chosen:

            def loss(w: Tree, x: Tensor, y: Tensor, C: Tensor = C, seen: Tensor = seen) -> Tensor:
                pull = (seen[y, None] * (features(w, x) - C[y]).square()).mean()
                return by_hand.entropy(w, x, y) + lam * pull

            parts = by_hand.batches(fed, by_hand.key_of(fed, round, i), i, 2)
            models[i] = by_hand.descend(models[i], parts, loss=loss)
            ((x, y),) = by_hand.batches(fed, 0, i, 1, 0)
            for c in range(4):
                sums[c] += features(models[i], x)[y == c].sum(0)
                counts[c] += int((y == c).sum())
        C = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], C)
        seen = ((seen > 0) | (counts > 0)).double()
        fed.step()
        assert tiny.apart(tiny.kept(fed), tree.stack(models)) < 1e-12
        torch.testing.assert_close(fed.state["shared"]["prototypes"], C, rtol=1e-11, atol=1e-12)
        assert torch.equal(fed.state["shared"]["prototypes_seen"], seen)
    assert 0 < float(seen.sum()) <= 4
    x = fed.ground.columns["x"][:30]
    for i, model in enumerate(by_hand.each(fed)):
        said = by_hand.said(fed, i, model, x, task)
        gap = torch.cdist(features(models[i], x), C).masked_fill(seen == 0, torch.inf)
        assert torch.equal(said.argmax(1), gap.argmin(1)) and bool(said.isfinite().all())


def test_a_class_without_a_prototype_comes_last_and_before_the_first_the_head_speaks() -> None:
    task = sparse()
    fed = tiny.federation("fedproto", task)
    x = fed.ground.columns["x"][:9]
    model = by_hand.each(fed)[0]
    said = by_hand.said(fed, 0, model, x, task)
    torch.testing.assert_close(said, by_hand.logits(by_hand.initial(), x))
    C, seen = torch.randn(4, 9).double(), torch.tensor([1.0, 0, 1, 0]).double()
    said = by_hand.said(fed, 0, {**model, "prototypes": C, "prototypes_seen": seen}, x, task)
    assert bool((said[:, [1, 3]] < said[:, [0, 2]].amin(1, keepdim=True)).all())


def test_no_weight_crosses() -> None:
    fed = tiny.federation("fedproto", sparse())
    down, up, uploads = by_hand.crossed(fed, 2)
    assert down == {"prototypes", "prototypes_seen"}
    assert up == {"prototypes/sums", "prototypes/counts"}
    assert all(not u.delta and not u.buffers for u in uploads)
    numbers = 4 * 9 + 4
    assert fed.ledger.total("values") == 2 * 2 * 5 * numbers * 8
