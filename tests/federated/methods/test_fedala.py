"""FedALA: the mixing by hand in float64, its sample, its stop, and what it is without passes."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from torch import Tensor
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.claims import fedala as claims
from isthmus.errors import InputError
from isthmus.federated.methods.fedala import SETTLED, FedALA
from isthmus.federated.round import Federation
from isthmus.federated.score import models_of
from isthmus.models.bind import bind
from isthmus.tree import Tree

TASK = tiny.task()
HEAD = ("head.weight", "head.bias")
CLIENTS = range(len(tiny.RAGGED))
SAMPLED = [ceil(0.8 * size) for size in tiny.RAGGED]


def shared(fed: Federation) -> Tree:
    return fed.state["shared"]


def own(fed: Federation, client: int, prefix: str = "theta/") -> Tree:
    """What a client keeps under a prefix."""
    kept = tree.row(tiny.kept(fed), client)
    return {name: kept[prefix + name] for name in HEAD}


def mixed(theta_i: Tree, theta_g: Tree, w: Mapping[str, Tensor]) -> Tree:
    return {n: theta_i[n] + (theta_g[n] - theta_i[n]) * w[n] for n in HEAD}


def counted(method: str, task: Any, **keys: Any) -> tuple[Federation, list[list[int]]]:
    """A federation, and the steps that its clients will take in each round."""
    fed = tiny.federation(method, task, **keys)
    server, steps = fed.method.server, []

    def watched(state: Any, reduced: Any, meta: Any) -> Any:
        steps.append([m.steps for m in meta])
        return server(state, reduced, meta)

    fed.method.server = watched  # of this one object
    return fed, steps


def test_without_passes_it_is_fedavg_to_the_bit() -> None:
    plain = tiny.play("fedavg", TASK, 3, epochs=2)
    same = tiny.play("fedala", TASK, 3, epochs=2, settings={"epochs": 0})
    assert tree.equal(shared(plain), shared(same))
    learned = tiny.play("fedala", TASK, 3, epochs=2)
    assert tiny.apart(shared(plain), shared(learned)) > 1e-3


def test_the_first_visit_is_fedavgs_and_leaves_every_weight_at_one() -> None:
    """theta_i = theta_g moves nothing: one batch is spent, whatever the gradient is."""
    whole = {"batch": 0, "epochs": 3}  # so that the order of the items does not count
    first, plain = (shared(tiny.play(name, TASK, 1, **whole)) for name in ("fedala", "fedavg"))
    assert tiny.apart(first, plain) < 1e-13
    fed, steps = counted("fedala", TASK)
    fed.step()
    for client in CLIENTS:
        assert all(bool((x == 1).all()) for x in own(fed, client, "w/").values())
    assert steps == [[1 + ceil(size / 8) for size in tiny.RAGGED]]


def test_one_batch_by_hand() -> None:
    """The gradient by W is g (theta_g - theta_i), and the start is what W then mixes."""
    fed = tiny.play("fedala", TASK, 3, batch=0, epochs=4, settings={"s": 100, "eta": 40.0})
    before = tiny.kept(fed)
    starts = list(models_of(fed, np.arange(5), before))
    clipped = 0
    for client in CLIENTS:
        theta_i, theta_g, w = own(fed, client), shared(fed), own(fed, client, "w/")
        rows = torch.from_numpy(fed.ground.owned.rows(client))
        x, y = (fed.ground.columns[name][rows] for name in ("x", "y"))
        leaves = {n: t.clone().requires_grad_() for n, t in w.items()}
        model = bind(fed.ground.module, {**theta_g, **mixed(theta_i, theta_g, leaves)})
        by_w = torch.autograd.grad(F.cross_entropy(model(x), y), list(leaves.values()))
        new = {n: (w[n] - 40.0 * g).clamp(0, 1) for n, g in zip(w, by_w, strict=True)}
        clipped += sum(int((t == 0).sum()) for t in new.values())
        expected = mixed(theta_i, theta_g, new)
        start = starts[client]
        assert tiny.apart({n: start[n] for n in HEAD}, expected) < 1e-13
        assert any(not torch.equal(w[n], new[n]) for n in HEAD)
        for n in HEAD:  # between the two, element by element
            low, high = torch.minimum(theta_i[n], theta_g[n]), torch.maximum(theta_i[n], theta_g[n])
            assert bool(((start[n] >= low) & (start[n] <= high)).all())
        for n in theta_g.keys() - set(HEAD):
            assert torch.equal(start[n], theta_g[n])
    assert clipped > 0
    assert tree.equal(before, tiny.kept(fed))  # what a client keeps is not touched by scoring


def test_weights_stay_between_zero_and_one() -> None:
    fed = tiny.play("fedala", TASK, 4, settings={"eta": 300.0})
    for client in CLIENTS:
        w = torch.cat([x.flatten() for x in own(fed, client, "w/").values()])
        assert float(w.min()) == 0.0 and float(w.max()) == 1.0


@pytest.mark.parametrize("recorded", ["mean", "last"])
def test_the_first_time_ends_when_ten_losses_have_settled(recorded: str) -> None:
    """The second visit by hand: passes, losses, stop and W; the third has a single pass."""
    settings = {"eta": 20.0, "threshold": 0.004, "recorded": recorded}
    fed, steps = counted("fedala", TASK, lr=1.0, epochs=3, settings=settings)
    assert isinstance(fed.method, FedALA)
    fed.step()
    theta_g, before = shared(fed), {c: own(fed, c) for c in CLIENTS}
    fed.step()
    after = {c: own(fed, c, "w/") for c in CLIENTS}
    fed.step()
    passes = {}
    for client in (0, 1, 3):
        size = tiny.RAGGED[client]
        visit = int(seeds.keys(seeds.key(fed.seed, "visit", 2), [client])[0])
        plan = fed.method.samples(np.array([seeds.fold(visit, 0)]), np.array([size]))
        per = ceil(SAMPLED[client] / 8)
        rows = torch.from_numpy(fed.ground.owned.rows(client))
        w: dict[str, Tensor] = {n: torch.ones_like(t) for n, t in before[client].items()}
        losses: list[list[float]] = []
        for t, (index, weight) in enumerate(zip(plan.index[0], plan.weight[0], strict=True)):
            part = rows[index[weight > 0]]
            leaves = {n: x.clone().requires_grad_() for n, x in w.items()}
            hat = mixed(before[client], theta_g, leaves)
            model = bind(fed.ground.module, {**theta_g, **hat})
            loss = F.cross_entropy(model(fed.ground.columns["x"][part]),
                                   fed.ground.columns["y"][part])  # fmt: skip
            g = torch.autograd.grad(loss, list(leaves.values()))
            w = {n: (w[n] - 20.0 * x).clamp(0, 1) for n, x in zip(w, g, strict=True)}
            if t % per == 0:
                losses.append([])
            losses[-1].append(loss.item())
            if len(losses[-1]) == per and len(losses) >= SETTLED:
                seen = [float(np.mean(x)) if recorded == "mean" else x[-1] for x in losses]
                if np.std(seen[-SETTLED:]) < 0.004:
                    break
        passes[client] = len(losses)
        training = 3 * ceil(size / 8)
        assert steps[1][client] == per * passes[client] + training
        assert steps[2][client] == per + training
        assert tiny.apart(after[client], w) < 1e-10
    assert SETTLED <= min(passes.values()) < max(passes.values())


def test_no_threshold_is_ever_reached_at_zero() -> None:
    fed, steps = counted("fedala", TASK, settings={"threshold": 0.0, "epochs": 13})
    for _ in range(2):
        fed.step()
    per = [ceil(some / 8) for some in SAMPLED]
    training = [ceil(size / 8) for size in tiny.RAGGED]
    assert steps[1] == [13 * p + t for p, t in zip(per, training, strict=True)]


def test_the_sample_is_random_and_the_same_in_every_pass() -> None:
    method = tiny.federation("fedala", TASK, settings={"epochs": 3}).method
    assert isinstance(method, FedALA)
    sizes = np.array([3, 40, 1, 17, 0])
    plan = method.samples(np.arange(5) + 7, sizes)
    chosen = []
    for client, size in enumerate(sizes.tolist()):
        some = ceil(0.8 * size)
        seen = plan.index[client][plan.weight[client] > 0].view(-1, some) if some else None
        if seen is None:
            assert not bool(plan.weight[client].any())
            continue
        assert len(seen) == 3
        first = seen[0].sort().values
        assert first.unique().numel() == some and int(first.max()) < size
        assert all(torch.equal(first, one.sort().values) for one in seen)
        assert size < 17 or not torch.equal(seen[0], seen[1])
        chosen.append(first)
    assert int(chosen[1].max()) - int(chosen[1].min()) > len(chosen[1])  # no slice
    other = method.samples(np.arange(5) + 107, sizes)
    assert not torch.equal(other.index[1, 0].sort().values, plan.index[1, 0].sort().values)
    whole = method.samples(np.arange(4), np.array([40, 3, 1, 17]))
    alone = method.samples(np.array([0]), np.array([40]))
    assert torch.equal(whole.index[0], alone.index[0])


def test_who_is_away_keeps_its_model_and_its_weights() -> None:
    fed = tiny.play("fedala", TASK, 4, cohort=2)
    visits = [0] * 5
    for round in range(1, 5):
        for client in fed.schedule.clients(round).tolist():
            visits[client] += 1
    assert tiny.kept(fed)["visits"].tolist() == visits and len(set(visits)) > 2
    before, absent = tiny.kept(fed), set(range(5)) - set(fed.schedule.clients(5).tolist())
    fed.step()
    for client in absent:
        assert tree.equal(tree.row(before, client), tree.row(tiny.kept(fed), client))


def test_before_scaffold_the_control_is_measured_from_the_mixed_start() -> None:
    """c_i+ = c_i - c + (hat - y) / (K lr), with the K steps of training alone."""
    three = tiny.play("fedala+scaffold", TASK, 3, epochs=2)
    before, c, down = tiny.kept(three), three.state["c"], shared(three)
    for name, x in c.items():
        torch.testing.assert_close(before[name].mean(0), x, rtol=1e-10, atol=1e-12)
    three.step()
    after = tiny.kept(three)
    for i in CLIENTS:
        k = 2 * ceil(tiny.RAGGED[i] / 8)
        theta_i = {n: before["theta/" + n][i] for n in HEAD}
        w = {n: after["w/" + n][i] for n in HEAD}
        hat, y = mixed(theta_i, down, w), {n: after["theta/" + n][i] for n in HEAD}
        for n in HEAD:
            name = "control/" + n
            expected = before[name][i] - c[name] + (hat[n] - y[n]) / (k * 0.1)
            torch.testing.assert_close(after[name][i], expected, rtol=1e-9, atol=1e-10)
    moved = tree.weighted_mean(
        {n: after["theta/" + n] for n in HEAD}, torch.full((5,), 0.2, dtype=torch.float64)
    )
    assert tiny.apart({n: shared(three)[n] for n in HEAD}, moved) < 1e-12


def test_before_another_method_it_adds_the_mixing_alone() -> None:
    prox, plain = (
        tiny.play(name, TASK, 3, settings=settings)
        for name, settings in (("fedala+fedprox", {"mu": 0.0}), ("fedala", {}))
    )
    assert tree.equal(shared(prox), shared(plain))
    drawn = tiny.play("fedala+fedprox", TASK, 3, settings={"mu": 0.9, "epochs": 0})
    assert tree.equal(shared(drawn), shared(tiny.play("fedprox", TASK, 3, settings={"mu": 0.9})))


def test_layers_that_no_tensor_has_are_one_line() -> None:
    with pytest.raises(InputError, match=r"settings.layers: tail.* given"):
        tiny.federation("fedala", TASK, settings={"layers": ("tail.*",)})
    every = tiny.federation("fedala", TASK, settings={"layers": ("*",)}).method
    assert isinstance(every, FedALA) and set(every.mixed) == set(
        shared(tiny.play("fedavg", TASK, 0))
    )


@pytest.mark.slow
def test_every_client_starts_below_the_global_model_from_round_two_on() -> None:
    leads = claims.leads(0, rounds=4)
    assert leads.shape == (4, 30)
    assert bool((leads > 0).all())
