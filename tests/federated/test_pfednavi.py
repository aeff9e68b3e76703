"""pFedNavi: its mixing by hand, its identities, and what nobody may train on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from torch import Tensor, nn

from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.method import Method
from isthmus.federated.round import Federation
from isthmus.federated.score import models_of
from isthmus.learn.phase import Opt, Visit
from isthmus.models.bind import bind, tensors_of
from isthmus.tree import Tree

TASK = tiny.task()
LAYERS = ["features.lower", "head"]


def made(**settings: Any) -> Federation:
    return tiny.federation("pfednavi", TASK, settings=settings, epochs=2)


def visit(purpose: Any = "train") -> Visit:
    zero, one = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.float64)
    return Visit(zero, zero, zero, zero, zero, one, one, one, purpose)


def other(seed: int) -> Tree:
    return tree.clone(tensors_of(TASK.build(seed=seed)))


def kept(method: Any, a: list[float], local: Tree, visits: int = 3) -> Tree:
    named = {f"local/{name}": x for name, x in local.items()}
    return {**named, "a": torch.tensor(a, dtype=torch.float64), "visits": torch.tensor(visits)}


def by_hand(w: Tree) -> tuple[Tree, float]:
    """The gradient of the loss on some items at `w`, and the loss."""
    x, y = tiny.data((12,), torch.float64, seed=8)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in w.items()}
    loss = nn.functional.cross_entropy(bind(TASK.build(), leaves)(x), y)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)), float(
        loss.detach()
    )


def opt(method: Method) -> Opt:
    return Opt(method.local.optimiser, {}, torch.tensor(0.1))


def test_a_layer_below_tau_starts_between_and_the_others_are_global_bit_for_bit() -> None:
    method: Any = made().method
    assert method.layers == LAYERS
    ours, mine = other(1), other(2)
    params, carry = method.start(visit(), ours, kept(method, [0.25, 0.75], mine))
    for name in ("head.weight", "head.bias"):
        assert torch.equal(params[name], ours[name])
    for name in ("features.lower.weight", "features.lower.bias"):
        torch.testing.assert_close(params[name], 0.75 * mine[name] + 0.25 * ours[name])
    for a, source in ((0.0, mine), (1.0, ours)):
        exact, _ = made(tau=2.0).method.start(visit(), ours, kept(method, [a, a], mine))  # type: ignore[union-attr]
        assert all(torch.equal(exact[name], source[name]) for name in source)
    first, carry = method.start(visit(), ours, kept(method, [0.2, 0.2], mine, visits=0))
    assert all(torch.equal(first[name], ours[name]) for name in ours)
    assert torch.equal(carry["mix"]["local"]["head.bias"], ours["head.bias"])


def test_the_k_smallest() -> None:
    a = torch.tensor([0.9, 0.7])
    for k, expected in ((1, [False, True]), (2, [True, True])):
        assert made(k=k).method.personal(a).tolist() == expected  # type: ignore[attr-defined]
    assert made(tau=0.8).method.personal(a).tolist() == [False, True]  # type: ignore[attr-defined]
    assert made(k=1).method.personal(torch.ones(2)).tolist() == [True, False]  # type: ignore[attr-defined]


def test_candidates_restrict_what_is_mixed_and_kept() -> None:
    fed = made(candidates=("head",), tau=2.0)
    assert sorted(tiny.kept(fed)) == ["a", "local/head.bias", "local/head.weight", "visits"]
    assert tiny.kept(fed)["a"].shape == (5, 1)
    with pytest.raises(InputError, match=r"settings.candidates: tail given.*features.lower, head"):
        made(candidates=("tail",))


def test_one_step_of_a_is_the_normalised_gradient_of_the_loss_by_a() -> None:
    method: Any = made(eta=0.3).method
    ours, mine = other(1), other(2)
    _, carry = method.start(visit(), ours, kept(method, [0.6, 0.9], mine))

    def loss(a: Tensor) -> Tensor:
        x, y = tiny.data((12,), torch.float64, seed=8)
        share = {n: a[LAYERS.index(n.rpartition(".")[0])] for n in ours}
        theta = {n: mine[n] + share[n] * (ours[n] - mine[n]) for n in ours}
        return nn.functional.cross_entropy(bind(TASK.build(), theta)(x), y)

    a = torch.tensor([0.6, 0.9], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(loss(a), a)
    expected = (a.detach() - 0.3 * g / g.norm()).clamp(0, 1)
    params, _, carry = method.step_a(lambda w: (by_hand(w)[0], {}), {}, opt(method), carry, None)
    torch.testing.assert_close(carry["mix"]["a"], expected, rtol=1e-12, atol=0)
    assert abs(float(g[0])) > 1e-3 and float(g[0] / g[1]) != pytest.approx(1.0, abs=0.1)
    assert float(loss(carry["mix"]["a"])) < float(loss(a.detach()))
    again, _ = method.start(visit(), ours, kept(method, carry["mix"]["a"].tolist(), mine))
    assert tree.equal({n: params[n] for n in ours}, {n: again[n] for n in ours})
    still = {**carry, "mix": {**carry["mix"], "local": ours}}  # no difference, no direction
    _, _, after = method.step_a(lambda w: (by_hand(w)[0], {}), {}, opt(method), still, None)
    assert torch.equal(after["mix"]["a"], carry["mix"]["a"])


def test_steps_of_w_are_gradient_descent_on_w_in_personal_layers() -> None:
    method: Any = made(eta_w=4.0).method
    ours, mine = other(1), other(2)
    params, carry = method.start(visit(), ours, kept(method, [0.4, 0.7], mine))
    lower = [n for n in ours if n.startswith("features")]
    w = {n: torch.full_like(ours[n], 0.4) for n in lower}
    for _ in range(3):
        leaves = {n: x.clone().requires_grad_() for n, x in w.items()}
        hat = {**ours, **{n: mine[n] + leaves[n] * (ours[n] - mine[n]) for n in lower}}
        x, y = tiny.data((12,), torch.float64, seed=8)
        value = nn.functional.cross_entropy(bind(TASK.build(), hat)(x), y)
        got = torch.autograd.grad(value, list(leaves.values()))
        w = {n: (w[n] - 4.0 * g).clamp(0, 1) for n, g in zip(lower, got, strict=True)}
        step = method.step_w(lambda w: (by_hand(w)[0], {}), params, opt(method), carry, None)
        params, _, carry = step
    for name in lower:
        torch.testing.assert_close(params[name], mine[name] + w[name] * (ours[name] - mine[name]))
        inside = torch.minimum(ours[name], mine[name]) - 1e-12 <= params[name]
        assert (inside & (params[name] <= torch.maximum(ours[name], mine[name]) + 1e-12)).all()
    assert all(torch.equal(params[n], ours[n]) for n in ours if n not in lower)
    flat = torch.cat([x.reshape(-1) for x in w.values()])
    assert float(flat.min()) == 0.0 and 0.4 < float(flat.max()) <= 1.0  # both pulled and clipped
    assert by_hand({n: params[n] for n in ours})[1] < by_hand({**ours, **{
        n: mine[n] + 0.4 * (ours[n] - mine[n]) for n in lower}})[1]  # fmt: skip


def test_without_anything_personal_it_is_fedavg() -> None:
    keys: dict[str, Any] = {"batch": 0, "epochs": 3}  # full batches: the order does not matter
    plain = tiny.play("fedavg", TASK, 4, **keys)
    for settings in ({"held": 0.0}, {"held": 0.0, "tau": 0.0, "eta_w": 0.0}):
        same = tiny.play("pfednavi", TASK, 4, settings=settings, **keys)
        assert tiny.apart(tiny.state(plain), tiny.state(same)) < 1e-12
        assert torch.equal(tiny.kept(same)["a"], torch.ones(5, 2, dtype=torch.float64))
    mixed = tiny.play("pfednavi", TASK, 4, settings={"eta": 0.5}, **keys)
    assert tiny.apart(tiny.state(plain), tiny.state(mixed)) > 1e-3


def test_coefficients_stay_in_bounds_and_move() -> None:
    fed = tiny.play("pfednavi", TASK, 8, settings={"eta": 0.3}, epochs=2)
    a = tiny.kept(fed)["a"]
    assert ((a >= 0) & (a <= 1)).all()
    assert (a[[0, 2]] == 1).all()  # 3 items and 1: nothing is held out, nothing learned
    assert (a[[1, 3, 4]] < 1).any()
    assert tiny.kept(fed)["visits"].tolist() == [8] * 5


def test_held_out_items_are_the_same_in_every_visit_and_in_no_other_phase() -> None:
    fed = made()
    cohort_keys, sizes = np.array([5, 6, 7, 8, 9]), np.array(tiny.RAGGED)
    seen: dict[str, list[set[int]]] = {}
    for phase in fed.method.phases("train"):
        assert phase.plans is not None
        for keys in (cohort_keys, cohort_keys + 100):
            plan = phase.plans(keys, sizes)
            rows = [set(i[w > 0].tolist()) for i, w in zip(plan.index, plan.weight, strict=True)]
            counts = (plan.weight > 0).sum((1, 2)).tolist()
            passes = 2 if phase.name in ("train", "rejoin") else 1
            assert counts == [passes * len(r) for r in rows]
            assert seen.setdefault(phase.name, rows) == rows
    assert list(seen) == ["layers", "elements", "train", "rejoin"]
    assert seen["layers"] == seen["rejoin"] and seen["elements"] == seen["train"]
    for held, rest, size in zip(seen["layers"], seen["train"], tiny.RAGGED, strict=True):
        assert len(held) == size // 4 and held | rest == set(range(size)) and not held & rest
    assert seen["layers"][1] != set(range(10)) and seen["layers"][1] != set(range(30, 40))
    assert [p.name for p in made(rejoin=False, eta_w=0.0).method.phases("train")] == [
        "layers", "train"]  # fmt: skip
    assert [p.name for p in fed.method.phases("score")] == ["layers", "elements"]
    assert not fed.method.phases("warm-up")


@pytest.mark.parametrize("rejoin", [True, False])
def test_the_local_model_never_sees_held_out_items(rejoin: bool) -> None:
    phase = made().method.phases("train")[0]
    assert phase.plans is not None
    plan = phase.plans(np.arange(5), np.array(tiny.RAGGED))
    held = [i[w > 0] for i, w in zip(plan.index, plan.weight, strict=True)]
    starts = np.cumsum([0, *tiny.RAGGED])
    x, y = tiny.data(tiny.RAGGED, torch.float64)
    changed = y.clone()
    for rows, start in zip(held, starts[:-1], strict=True):
        changed[rows + int(start)] = (changed[rows + int(start)] + 1) % tiny.CLASSES
    assert int((changed != y).sum()) == sum(size // 4 for size in tiny.RAGGED)
    feds = [
        tiny.play("pfednavi", tiny.task(data=(x, labels)), 1, settings={"rejoin": rejoin})
        for labels in (y, changed)
    ]
    local = [{n: t for n, t in tiny.kept(f).items() if n.startswith("local/")} for f in feds]
    assert tree.equal(*local)
    moved = tiny.apart(tiny.state(feds[0]), tiny.state(feds[1]))
    assert (moved > 1e-3) is rejoin
    begun = {n: x.expand(5, *x.shape) for n, x in kept(None, [1, 1], other(0)).items()}
    assert tiny.apart(local[0], {n: begun[n] for n in local[0]}) > 1e-3


def test_scoring_uses_the_personal_mixture() -> None:
    fed = tiny.play("pfednavi", TASK, 3, settings={"tau": 2.0, "eta": 0.0, "eta_w": 0.0}, epochs=2)
    half = torch.tensor([[0.0, 0.5]], dtype=torch.float64)
    row = {name: x[1:2] for name, x in tiny.kept(fed).items()}
    fed.store.put(np.array([1]), 3, {**row, "a": half})
    now = tiny.kept(fed)
    models = list(models_of(fed, np.arange(5), now))
    shared = fed.state["shared"]
    mine = tree.row(now, 1)
    lower, head = "features.lower.weight", "head.weight"
    assert torch.equal(models[1][lower], mine["local/" + lower])
    torch.testing.assert_close(models[1][head], (mine["local/" + head] + shared[head]) / 2)
    assert torch.equal(models[3][lower], shared[lower])  # a is still 1


def test_settings_are_bounded() -> None:
    for bad in ({"held": 1.0}, {"eta": -1}, {"k": -1}, {"tau": -0.1}):
        with pytest.raises(InputError, match=f"settings.{next(iter(bad))}"):
            made(**bad)
