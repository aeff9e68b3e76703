"""GPFL: two rounds by hand in float64, the valve, the conditions, and who learns from what."""

from __future__ import annotations

from statistics import mean
from typing import Any, cast

import pytest
import torch
from tests.federated import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.claims import gpfl as claims
from isthmus.errors import InputError
from isthmus.federated.methods.gpfl import GPFL, Valve
from isthmus.federated.round import Federation
from isthmus.federated.score import models_of
from isthmus.learn.plan import shuffled_epochs
from isthmus.models.bind import bind
from isthmus.run.conformance.methods import Watched
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

TASK = tiny.task()
SIZES = torch.tensor(tiny.RAGGED, dtype=torch.float64)
K, C = tiny.HIDDEN, tiny.CLASSES
HEAD = ("head.weight", "head.bias")


def labels(fed: Federation, client: int) -> Tensor:
    return fed.ground.columns["y"][torch.from_numpy(fed.ground.owned.rows(client))]


def condition(fed: Federation, client: int, e: Tensor) -> Tensor:
    """u_i from exact class shares."""
    counts = torch.bincount(labels(fed, client), minlength=C).double()
    return counts / counts.sum() @ e


def batches(fed: Federation, round: int, client: int) -> list[Tensor]:
    """The batches of the training phase, the second one of a visit."""
    visit = int(seeds.keys(seeds.key(fed.seed, "visit", round), [client])[0])
    rows = torch.from_numpy(fed.ground.owned.rows(client))
    plan = shuffled_epochs(int(seeds.fold(visit, 1)), len(rows), 1, 8)
    return [rows[i[w > 0]] for i, w in zip(plan.index, plan.weight, strict=True)]


def valve(f: Tensor, u: Tensor, w: Tree) -> Tensor:
    def condition(name: str, norm: str) -> Tensor:
        x = F.relu(F.linear(u, w[f"cov.{name}.weight"], w[f"cov.{name}.bias"]))
        return F.layer_norm(x, (K,), w[f"cov.{norm}.weight"], w[f"cov.{norm}.bias"])

    return F.relu(f * (condition("A", "norm_gamma") + 1) + condition("B", "norm_beta"))


def visited(
    fed: Federation, round: int, i: int, start: Tree, e: Tensor, per_sample: bool = False
) -> Tree:
    """A visit in plain torch with lam 0.7 and mu 0.2, conditions from the embeddings e."""
    w, e0 = start, start["gce.weight"]
    u_g, u_i = e.mean(0), condition(fed, i, e)
    for part in batches(fed, round, i):
        x, y = fed.ground.columns["x"][part], fed.ground.columns["y"][part]
        v = {n: t.detach().clone().requires_grad_() for n, t in w.items()}
        f = torch.tanh(F.linear(x, v["features.lower.weight"], v["features.lower.bias"]))
        personal = F.cross_entropy(F.linear(valve(f, u_i, v), v[HEAD[0]], v[HEAD[1]]), y)
        f_g = valve(f, u_g, v)
        cosines = F.cosine_similarity(f_g[:, None], v["gce.weight"][None], dim=-1)
        apart = f_g - e0[y]
        size = apart.norm(dim=1).mean() if per_sample else apart.norm()
        decay = sum((v[n] ** 2).sum() for n in v if n.split(".")[0] in ("gce", "cov"))
        loss = personal + F.cross_entropy(cosines, y) + 0.7 * size + 0.2 / 2 * decay
        loss.backward()
        w = {n: t.detach() - 0.1 * cast(Tensor, t.grad) for n, t in v.items()}
    return w


@pytest.mark.parametrize("variant", ["", "per_sample", "stale"])
def test_two_rounds_by_hand(variant: str) -> None:
    settings = {"lam": 0.7, "mu": 0.2, **({variant: True} if variant else {})}
    fed = tiny.federation("gpfl", TASK, settings=settings)
    w, kept = tree.clone(fed.state["shared"]), tiny.kept(fed)
    own = {i: {n: kept[n][i] for n in HEAD} for i in range(5)}
    e = dict.fromkeys(range(5), torch.zeros(C, K, dtype=torch.float64))
    for round in (1, 2):
        ends = {
            i: visited(fed, round, i, {**w, **own[i]}, e[i], variant == "per_sample")
            for i in range(5)
        }
        own = {i: {n: end[n] for n in HEAD} for i, end in ends.items()}
        uploads = tree.stack([{n: end[n] for n in w} for end in ends.values()])
        w = tree.weighted_mean(uploads, SIZES / SIZES.sum())
        used = e
        e = {i: ends[i]["gce.weight"] if variant == "stale" else w["gce.weight"] for i in range(5)}
        fed.step()
        assert tiny.apart(fed.state["shared"], w) < 1e-12
        kept = tiny.kept(fed)
        for i in range(5):
            assert tiny.apart({n: kept[n][i] for n in HEAD}, own[i]) < 1e-12
            torch.testing.assert_close(kept["u"][i], condition(fed, i, used[i]), rtol=1e-12,
                                       atol=1e-13)  # fmt: skip


def test_a_client_predicts_with_the_condition_of_the_mixed_embeddings() -> None:
    fed = tiny.play("gpfl", TASK, 2)
    everyone = torch.arange(5).numpy()
    models = list(models_of(fed, everyone, tiny.kept(fed)))
    for i, model in enumerate(models):
        u = condition(fed, i, fed.state["shared"]["gce.weight"])
        torch.testing.assert_close(model["u"], u, rtol=1e-12, atol=1e-13)
        assert tree.equal({n: model[n] for n in HEAD}, {n: tiny.kept(fed)[n][i] for n in HEAD})
    at_first = next(models_of(tiny.federation("gpfl", TASK), everyone, tiny.kept(fed)))
    assert not bool(at_first["u"].any())


def test_what_crosses() -> None:
    fed = tiny.federation("gpfl", TASK)
    fed.executor = watched = Watched(fed.executor)
    for _ in range(2):
        fed.step()
    for upload in watched.uploads:
        assert {name.split(".")[0] for name in upload.delta} == {"features", "cov", "gce"}
        assert not (upload.values or upload.buffers or upload.scalars)
    sent = fed.ledger.sums("values", by="kind", what="crossing")
    numbers = sum(x.numel() for x in fed.state["shared"].values())
    assert sent["model"] == sent["update"] == 10 * 8 * numbers


def test_counting_is_no_gradient() -> None:
    """A visit costs what its training costs: the phase before it multiplies a few numbers."""
    fed = tiny.play("gpfl", TASK, 1)
    assert sum(fed.ground.cost["count"]) < 0.05 * sum(fed.ground.cost["train"])


def test_a_valve_of_zeros_is_a_relu() -> None:
    cov = Valve(K).double()
    with torch.no_grad():
        for layer in (cov.A, cov.B):
            layer.weight.zero_()
            cast(Tensor, layer.bias).zero_()
    f, u = seeds.normal(1, (7, K), torch.float64), seeds.normal(2, (K,), torch.float64)
    assert torch.equal(cov(f, u), f.relu())
    assert not torch.equal(Valve(K).double()(f, u), f.relu())


def conditioned(fed: Federation, y: Tensor) -> tuple[Any, dict[str, Any]]:
    """The model and the carry of a visit in the second round with these classes."""
    method = fed.method
    assert isinstance(method, GPFL)
    e = fed.state["shared"]["gce.weight"]
    carry = {"e0": e, "e": e, "u_g": e.mean(0), "n": torch.tensor(float(len(y))).double()}
    zero = {"u": torch.zeros(K, dtype=torch.float64)}
    batch = Batch({"y": y}, torch.ones(len(y), dtype=torch.float64))
    params, _, _ = method.count(cast(Any, None), zero, cast(Any, None), carry, batch)
    tensors = {**fed.state["shared"], **{n: tiny.kept(fed)[n][1] for n in HEAD}, **params}
    return bind(fed.ground.module, tensors), carry


def test_even_classes_make_both_routes_one() -> None:
    fed = tiny.play("gpfl", TASK, 2)
    f = seeds.normal(1, (7, K), torch.float64)
    model, carry = conditioned(fed, torch.arange(C).repeat(3))
    torch.testing.assert_close(model.cov(f, model.u), model.cov(f, carry["u_g"]))
    model, carry = conditioned(fed, torch.tensor([0, 0, 1, 3]))
    assert float((model.u - carry["u_g"]).norm()) > 0.1


def test_the_head_learns_from_the_personal_route_alone() -> None:
    fed = tiny.play("gpfl", TASK, 2)
    y = torch.tensor([0, 2, 1, 1, 3])
    model, carry = conditioned(fed, y)
    x = seeds.normal(3, (5, tiny.WIDE), torch.float64)
    batch = Batch({"x": x, "y": y}, torch.ones(5, dtype=torch.float64))
    head = {n: dict(model.named_parameters())[n].detach().requires_grad_() for n in HEAD}
    model = bind(model, head)
    whole, _ = fed.method.loss(model, batch, carry)
    alone = F.cross_entropy(cast(Any, model)(x), y)
    a, b = (torch.autograd.grad(value, list(head.values())) for value in (whole, alone))
    assert all(torch.equal(g, h) for g, h in zip(a, b, strict=True))
    assert float(whole - alone) > 0.1


def test_weight_decay_touches_the_valve_and_the_embeddings_alone() -> None:
    """One step: what mu changes is -lr mu w of these tensors."""
    one = {"batch": 0, "epochs": 1}
    start = tiny.federation("gpfl", TASK).state["shared"]
    with_it, without = (tiny.play("gpfl", TASK, 1, settings={"mu": mu}, **one) for mu in (0.3, 0.0))
    for name, x in start.items():
        pulled = with_it.state["shared"][name] - without.state["shared"][name]
        expected = -0.1 * 0.3 * x if name.split(".")[0] in ("cov", "gce") else torch.zeros_like(x)
        torch.testing.assert_close(pulled, expected, rtol=1e-10, atol=1e-14)
    heads = [tiny.kept(fed)[n] for fed in (with_it, without) for n in HEAD]
    assert torch.equal(heads[0], heads[2]) and torch.equal(heads[1], heads[3])


def test_permuted_classes_permute_the_outputs() -> None:
    fed = tiny.play("gpfl", TASK, 2)
    order = torch.tensor([2, 0, 3, 1])
    y = torch.tensor([0, 2, 1, 1, 3, 0, 0])
    x = seeds.normal(3, (7, tiny.WIDE), torch.float64)
    model, carry = conditioned(fed, y)
    batch = Batch({"x": x, "y": y}, torch.ones(7, dtype=torch.float64))
    there = order.argsort()  # class c is called there[c]
    named = dict(model.named_parameters())
    moved = {n: named[n][order] for n in (*HEAD, "gce.weight")}
    e = moved["gce.weight"]
    renamed = Batch({"x": x, "y": there[y]}, batch.weight)
    method = cast(GPFL, fed.method)
    zero = {"u": torch.zeros(K, dtype=torch.float64)}
    new = {**carry, "e0": e, "e": e}
    params, _, _ = method.count(cast(Any, None), zero, cast(Any, None), new, renamed)
    other: Any = bind(model, {**moved, **params})
    torch.testing.assert_close(other(x), model(x)[:, order])
    torch.testing.assert_close(
        method.loss(other, renamed, new)[0], method.loss(model, batch, carry)[0]
    )


def test_without_the_angle_term_the_embeddings_only_decay() -> None:
    fed = tiny.play("gpfl", TASK, 1, batch=0, settings={"angle": False})
    start = tiny.federation("gpfl", TASK).state["shared"]["gce.weight"]
    torch.testing.assert_close(fed.state["shared"]["gce.weight"], start * (1 - 0.1 * 0.1))


def test_bad_tasks_are_one_line() -> None:
    task = tiny.task(module=lambda seed: nn.Linear(tiny.WIDE, C).double())
    with pytest.raises(InputError, match="linear head, with method gpfl"):
        tiny.federation("gpfl", task)


@pytest.mark.slow
def test_global_features_point_to_their_own_class_by_the_angle_term() -> None:
    """After 8 rounds, the mean of three seeds: +0.12 with it and -0.30 without."""
    with_it, without = (
        mean(claims.margin(claims.ours(seed, rounds=8, angle=on)) for seed in range(3))
        for on in (True, False)
    )
    assert with_it > 0.1 > -0.1 > without
