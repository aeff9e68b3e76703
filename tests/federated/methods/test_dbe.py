"""DBE: two rounds and the warm-up by hand in float64, what crosses, and what the shift recovers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import pytest
import torch
from tests.federated import tiny
from tests.federated.test_baselines import rows_of
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.claims import dbe as claims
from isthmus.errors import InputError
from isthmus.federated.methods.dbe import DBE, shifted
from isthmus.federated.round import Federation
from isthmus.models.bind import bind
from isthmus.models.nets import Net
from isthmus.run.conformance.methods import Watched
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

TASK = tiny.task()
SIZES = torch.tensor(tiny.RAGGED, dtype=torch.float64)
K = tiny.HIDDEN
OWN = ("head.z", "head.mu")


def shared(fed: Federation) -> Tree:
    return fed.state["shared"]


def visited(
    fed: Federation, round: int, client: int, w: Tree, z: Tensor, m: Tensor | None, **knobs: Any
) -> tuple[Tree, Tensor, Tensor]:
    """A visit in plain torch: weights, shift and running mean at its end; without m, a warm-up."""
    beta, kappa, debias = knobs["beta"], knobs["kappa"], knobs["debias"]
    w, mu, plain = {**w, "z": z}, torch.zeros(K, dtype=torch.float64), tiny.net(0).double()
    rows = rows_of(fed, round, client, 1, 8)
    for t, part in enumerate(rows, 1):
        x, y = fed.ground.columns["x"][part], fed.ground.columns["y"][part]
        leaves = {n: v.detach().clone().requires_grad_() for n, v in w.items()}
        model: Any = bind(plain, leaves)
        h = model.features(x)
        mu = (1 - beta) * mu.detach() + beta * h.mean(0)
        loss = F.cross_entropy(model.head(h if m is None else h + leaves["z"]), y)
        if m is not None:
            said = mu / (1 - (1 - beta) ** t) if debias else mu
            loss = loss + kappa * K / 512 * ((said - m) ** 2).sum() / K / 2
        g = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        w = {n: v if d is None else v - 0.1 * d for (n, v), d in zip(w.items(), g, strict=True)}
        mu = mu.detach()
    z = w.pop("z")
    return w, z, mu / (1 - (1 - beta) ** len(rows)) if debias and m is None else mu


@pytest.mark.parametrize(("beta", "debias"), [(1.0, False), (0.3, False), (0.3, True)])
def test_the_warm_up_and_two_rounds_by_hand(beta: float, debias: bool) -> None:
    knobs = {"beta": beta, "kappa": 300.0, "debias": debias}
    fed = tiny.federation("dbe", TASK, settings=knobs)
    w = tree.clone(shared(fed))
    z = {i: torch.zeros(K, dtype=torch.float64) for i in range(5)}
    means = [visited(fed, 0, i, w, z[i], None, **knobs)[2] for i in range(5)]
    m = (SIZES / SIZES.sum()) @ torch.stack(means)
    for round in (1, 2):
        done = [visited(fed, round, i, w, z[i], m, **knobs) for i in range(5)]
        w = tree.weighted_mean(tree.stack([d[0] for d in done]), SIZES / SIZES.sum())
        z = {i: d[1] for i, d in enumerate(done)}
        fed.step()
        kept = tiny.kept(fed)
        torch.testing.assert_close(fed.state["dbe"]["head.m"], m, rtol=1e-12, atol=1e-14)
        assert tiny.apart(shared(fed), w) < 1e-12
        for i, (_, shift, mu) in enumerate(done):
            torch.testing.assert_close(kept["head.z"][i], shift, rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(kept["head.mu"][i], mu, rtol=1e-10, atol=1e-13)
    even = torch.stack(means).mean(0)
    assert float((m - even).norm() / m.norm()) > 1e-2  # an even mean is not this one


@pytest.mark.parametrize("behind", ["fedavg", "fedprox", "scaffold"])
def test_without_shift_and_regulariser_it_is_the_method_behind_to_the_bit(behind: str) -> None:
    """So the warm-up has left the global weights as they were, and every draw too."""
    off = {"kappa": 0.0, "shift": False}
    name = "dbe" if behind == "fedavg" else f"dbe+{behind}"
    task = tiny.task(dropout=0.3)
    plain = tiny.play(behind, task, 3, cohort=4, epochs=2)
    same = tiny.play(name, task, 3, cohort=4, epochs=2, settings=off)
    assert tree.equal(shared(plain), shared(same))
    assert not bool(tiny.kept(same)["head.z"].any()) and bool(tiny.kept(same)["head.mu"].any())
    for more in ({"kappa": 300.0}, {"shift": True}):
        other = tiny.play(name, task, 3, cohort=4, epochs=2, settings={**off, **more})
        assert tiny.apart(shared(plain), shared(other)) > 1e-4


def test_shift_and_mean_do_not_cross_and_the_consensus_crosses_once() -> None:
    fed = tiny.federation("dbe", TASK, cohort=3)
    fed.executor = watched = Watched(fed.executor)
    seen: set[int] = set()
    for round in range(1, 5):
        fed.step()
        seen |= set(fed.schedule.clients(round).tolist())
    warm_up, *rounds = watched.uploads
    assert [len(u) for u in watched.uploads] == [5, 3, 3, 3, 3]
    assert set(warm_up.delta) == {"mean"}
    assert not (warm_up.values or warm_up.buffers or warm_up.scalars)
    for upload in rounds:
        assert set(upload.delta) == {n for n in shared(fed) if n not in OWN}
        assert not (upload.values or upload.buffers or upload.scalars)
    up = fed.ledger.sums("values", by="round", kind="update")
    assert up[0] == 5 * K * 8 and up[1] == 3 * 8 * sum(x.numel() for x in shared(fed).values())
    base = [row for row in fed.ledger.rows() if row["kind"] == "base" and row["values"]]
    assert sorted(row["to"] for row in base) == [f"client/{i:03d}" for i in sorted(seen)]
    assert all(row["values"] == K * 8 for row in base) and all(row["round"] > 0 for row in base)


def test_a_linear_head_adds_w_z() -> None:
    head: Any = nn.Linear(5, 3).double()
    head.register_parameter("z", nn.Parameter(seeds.normal(1, (5,), torch.float64)))
    h = seeds.normal(2, (7, 5), torch.float64)
    plain = head(h)
    head.register_forward_pre_hook(shifted)
    torch.testing.assert_close(head(h), plain + head.weight @ head.z, rtol=1e-12, atol=1e-13)


def test_the_regulariser_vanishes_where_the_mean_is_the_consensus_alone() -> None:
    """And the padding of a batch does not count."""
    fed = tiny.play("dbe", TASK, 2, settings={"kappa": 512.0})
    method, module = fed.method, fed.ground.module
    assert isinstance(method, DBE)
    x, y = (fed.ground.columns[name][:6] for name in ("x", "y"))
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    tensors = {**fed.ground.base, **shared(fed), **tree.row(tiny.kept(fed), 1)}
    carry = {"t": torch.zeros((), dtype=torch.float64)}

    def terms(m: Tensor) -> float:
        model = bind(module, {**tensors, "head.m": m})
        with torch.no_grad():
            value, _ = method.loss(model, Batch({"x": x, "y": y}, weight), carry)
            plain, _ = method.stage.loss(model, Batch({"x": x, "y": y}, weight))
        return float(value - plain)

    with torch.no_grad():
        mu = cast(Any, bind(module, tensors)).features(x[weight > 0]).mean(0)
    assert abs(terms(mu)) < 1e-15
    off = torch.arange(K, dtype=torch.float64)
    assert terms(mu + off) == pytest.approx(512 * K / 512 * float(off.square().mean()) / 2)


def test_who_was_never_asked_predicts_without_shift() -> None:
    fed = tiny.play("dbe", TASK, 1, cohort=2)
    chosen = set(fed.schedule.clients(1).tolist())
    z = tiny.kept(fed)["head.z"]
    assert all(bool(z[i].any()) == (i in chosen) for i in range(5))


def test_before_fedala_the_mixing_sees_the_shifted_head() -> None:
    """Both plug-ins keep what is theirs, in either order."""
    for name in ("dbe+fedala", "fedala+dbe"):
        fed = tiny.play(name, TASK, 3)
        kept = tiny.kept(fed)
        assert kept["visits"].tolist() == [3] * 5
        assert bool(kept["head.z"].any()) and float(kept["w/head.weight"].min()) < 1.0
        assert int(fed.state["dbe"]["told"]) == 1


def test_a_model_without_halves_is_one_line() -> None:
    task = tiny.task(module=lambda seed: nn.Linear(tiny.WIDE, 4).double())
    with pytest.raises(InputError, match="model: Linear given, allowed: one with features"):
        tiny.federation("dbe", task)


def test_the_shift_recovers_a_planted_one() -> None:
    """Client i's features come with a constant c_i; W z_i must take W c_i out again."""
    k, classes, sizes = 6, 4, (60, 80, 50, 70, 90)
    weight = seeds.normal(1, (classes, k), torch.float64)
    u = seeds.normal(2, (sum(sizes), k), torch.float64)
    y = (u @ weight.T).argmax(1)
    c = seeds.normal(3, (5, k), torch.float64)
    owner = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))

    def module(seed: int) -> nn.Module:
        same = nn.Linear(k, k, bias=False).double()
        head = nn.Linear(k, classes).double()
        with torch.no_grad():
            same.weight.copy_(torch.eye(k))
            head.weight.copy_(weight)
            head.bias.zero_()
        return Net(nn.Sequential(OrderedDict(same=same)), head)

    fixed = (("features.*", "frozen"),)
    task = tiny.task(sizes, module=module, data=(u + c[owner], y), roles=fixed)
    keys = {"executor": "vectorised", "compile": "trace", "batch": 16}
    fed = tiny.play("dbe", task, 8, epochs=4, lr=0.3, settings={"kappa": 0.0}, **keys)
    w = shared(fed)["head.weight"]
    found, planted = tiny.kept(fed)["head.z"] @ w.T, -c @ w.T
    pairs = torch.stack([found.flatten(), planted.flatten()])
    assert float(torch.corrcoef(pairs)[0, 1]) > 0.9
    for i in range(5):
        assert float(torch.corrcoef(torch.stack([found[i], planted[i]]))[0, 1]) > 0.8


@pytest.mark.slow
def test_features_move_to_the_consensus() -> None:
    with_it, without = (claims.distances(claims.ours(0, k, rounds=8)) for k in (50.0, 0.0))
    assert with_it.consensus < without.consensus / 3
    assert with_it.between < without.between / 3
