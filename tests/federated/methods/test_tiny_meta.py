"""Reptile, TinyReptile and TinyMetaFed by hand; the order of a stream comes from its key."""

from __future__ import annotations

import math

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import by_hand
from tests.federated.methods.by_hand import ALL, BODY, HEAD
from torch import Tensor

from isthmus import tree
from isthmus.contracts import Reduced
from isthmus.federated.method import Names
from isthmus.federated.methods.tinymetafed import CHANGE, PLACE, TinyMetaFed
from isthmus.federated.round import Federation
from isthmus.learn.plan import shuffled_epochs
from isthmus.tree import Tree

Items = list[tuple[Tensor, Tensor]]
EVEN = torch.ones(5, dtype=torch.float64)


def stream(fed: Federation, key: int, client: int, most: int) -> Items:
    """The single items of a visit."""
    rows = torch.from_numpy(fed.ground.owned.rows(client))
    x, y = fed.ground.columns["x"], fed.ground.columns["y"]
    order = shuffled_epochs(key, len(rows), 1, 1).index[:, 0]
    rows = rows[order][: most or None]
    return [(x[i : i + 1], y[i : i + 1]) for i in rows.tolist()]


def moved(begun: Tree, models: list[Tree], alpha: float) -> Tree:
    change = tree.sub(by_hand.mean(models, EVEN), begun)
    return tree.add(begun, change, alpha=alpha)


@pytest.mark.parametrize("most", [0, 6])
def test_tinyreptile_by_hand(most: int) -> None:
    """Five rounds of which the last two have no step left."""
    settings = {"alpha": 0.8, "T": 3, "S": most}
    fed = tiny.federation("tinyreptile", by_hand.TASK, epochs=3, settings=settings)
    w = by_hand.initial()
    for round in (1, 2, 3, 4, 5):
        models = [
            by_hand.descend(w, stream(fed, by_hand.key_of(fed, round, i), i, most))
            for i in range(5)
        ]
        w = moved(w, models, max(0.0, 0.8 * (1 - (round - 1) / 3)))
        fed.step()
        assert tiny.apart(fed.state["shared"], w) < 1e-12
    for i, model in enumerate(by_hand.each(fed)):
        parts = stream(fed, by_hand.key_of(fed, 6, i, what="score"), i, most)
        assert tiny.apart(model, by_hand.descend(w, parts)) < 1e-12


def test_one_item_at_alpha_1_is_one_step_of_sgd() -> None:
    fed = tiny.federation("tinyreptile", tiny.task((1,)), lr=0.3)
    fed.step()
    x, y = fed.ground.columns["x"][:1], fed.ground.columns["y"][:1]
    w = by_hand.initial()
    g = by_hand.gradient(by_hand.entropy, w, x, y)
    assert tiny.apart(fed.state["shared"], tree.add(w, g, alpha=-0.3)) < 1e-14


def test_a_stream_sees_each_item_once() -> None:
    fed = tiny.federation("tinyreptile", by_hand.TASK, settings={"S": 0}, batch=4, epochs=7)
    (phase,) = fed.method.phases("train")
    sizes = torch.tensor(tiny.RAGGED).numpy()
    assert phase.plans is not None
    plan = phase.plans(sizes, sizes)
    assert plan.index.shape == (5, max(tiny.RAGGED), 1)
    for i, size in enumerate(tiny.RAGGED):
        assert sorted(plan.index[i][plan.weight[i] > 0].tolist()) == list(range(size))


def test_reptile_at_alpha_1_is_fedavg_with_even_weights() -> None:
    fed = tiny.play("reptile", by_hand.TASK, 1, epochs=2)
    w = by_hand.initial()
    parts = [by_hand.batches(fed, by_hand.key_of(fed, 1, i), i, 2) for i in range(5)]
    models = [by_hand.descend(w, part) for part in parts]
    assert tiny.apart(fed.state["shared"], by_hand.mean(models, EVEN)) < 1e-13
    half = tiny.play("reptile", by_hand.TASK, 1, epochs=2, settings={"alpha": 0.5})
    assert tiny.apart(half.state["shared"], moved(w, models, 0.5)) < 1e-13


def test_tinymetafed_sends_the_largest_changes_alone() -> None:
    """The mean of the parts that are seen going up, by hand; nothing of the head is among them."""
    fed = tiny.federation("tinymetafed", by_hand.TASK, settings={"P": 7.0, "T": 4, "alpha": 0.6})
    before = tree.clone(fed.state["shared"])
    down, up, uploads = by_hand.crossed(fed, 1)
    assert down == set(BODY) == set(before) and up == {CHANGE, PLACE}
    size = sum(x.numel() for x in before.values())
    many = math.ceil(0.07 * size)
    values = uploads[0].values
    assert values[CHANGE].shape == values[PLACE].shape == (5, many)
    dense = torch.zeros(5, size, dtype=torch.float64)
    for row, (at, by) in enumerate(zip(values[PLACE], values[CHANGE], strict=True)):
        assert len(set(at.tolist())) == many
        dense[row, at.long()] = by
    after = torch.cat([fed.state["shared"][n].flatten() for n in BODY])
    begun = torch.cat([before[n].flatten() for n in BODY])
    torch.testing.assert_close(after - begun, 0.6 * dense.mean(0), rtol=0, atol=1e-14)
    first = by_hand.only(by_hand.initial(), HEAD)
    assert tree.equal(tiny.kept(fed), tree.stack([first] * 5))


def test_the_bytes_of_a_sparse_upload_are_those_of_its_entries() -> None:
    """Beyond the frame, which stays as it is: 8 for a value and 4 for a place."""
    size = sum(x.numel() for n, x in by_hand.initial().items() if n in BODY)
    sent = {}
    for p in (10.0, 30.0, 100.0):
        fed = tiny.play("tinymetafed", by_hand.TASK, 1, settings={"P": p})
        sent[p] = int(fed.ledger.total("bytes", direction="up"))
    frames = {p: up / 5 - (8 + 4) * math.ceil(p * size / 100) for p, up in sent.items()}
    assert max(frames.values()) - min(frames.values()) <= 16  # where the tensors are aligned
    assert 0 < min(frames.values()) < sent[100.0] / 5 / 2


def test_all_of_everything_is_the_mean_of_the_changes() -> None:
    """P = 100 without a local part: FedAvg of changes, and the phase of TinyReptile alone."""
    fed = tiny.federation("tinyreptile", by_hand.TASK)
    names = Names(shared=ALL, local=(), frozen=(), trainable=ALL)
    knobs = TinyMetaFed.Settings(P=100.0)
    method = TinyMetaFed(fed.method.local, fed.method.stage, names, knobs)
    assert [phase.name for phase in method.phases("train")] == ["train"]
    down = by_hand.initial()
    others = [tree.add(down, by_hand.initial(), alpha=scale) for scale in (0.3, -1.0, 2.0)]
    ups = [method.finish(None, w, down, {}, {})[0].values for w in others]  # type: ignore[arg-type]
    reduced = Reduced({}, values=tree.stack(ups))
    state = method.server(method.init(down), reduced, [])
    assert tiny.apart(
        state["shared"], tree.weighted_mean(tree.stack(others), torch.ones(3) / 3)
    ) < (1e-6)


def test_the_largest_are_chosen_by_size_and_not_by_sign() -> None:
    fed = tiny.federation("tinymetafed", by_hand.TASK)
    names = Names(shared=("a", "b"), local=("l",), frozen=(), trainable=("a", "b", "l"))
    knobs = TinyMetaFed.Settings(P=34.0)
    method = TinyMetaFed(fed.method.local, fed.method.stage, names, knobs)
    down = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([[4.0, 5.0]])}
    now = {"a": torch.tensor([1.1, -1.0, 3.5]), "b": torch.tensor([[4.0, 5.6]])}
    update, kept = method.finish(
        None,
        {**now, "l": torch.ones(1)},
        down,
        {},
        {"l": torch.zeros(1)},  # type: ignore[arg-type]
    )
    sent = dict(zip(update.values[PLACE].tolist(), update.values[CHANGE].tolist(), strict=True))
    assert sent == pytest.approx({1: -3.0, 4: 0.6}) and kept == {"l": torch.zeros(1)}
