"""FedCP: two rounds by hand in float64, the gate, the MMD, and what crosses."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from tests.federated import tiny
from tests.federated.test_baselines import rows_of
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.claims import fedcp as claims
from isthmus.errors import InputError
from isthmus.federated.methods.fedcp import Conditional, FedCP, Policy, mmd
from isthmus.federated.round import Federation
from isthmus.federated.score import evaluate, model_of
from isthmus.models.bind import bind
from isthmus.run.conformance.methods import Watched
from isthmus.tree import Tree

TASK = tiny.task()
SIZES = torch.tensor(tiny.RAGGED, dtype=torch.float64)
K, C = tiny.HIDDEN, tiny.CLASSES
LOCAL = ("personal.weight", "personal.bias", "context")


def model(fed: Federation, client: int) -> Any:
    """The model with which a client predicts."""
    return bind(fed.ground.module, model_of(fed, tree.row(tiny.kept(fed), client)))


def items(n: int = 11) -> Tensor:
    return seeds.normal(5, (n, tiny.WIDE), torch.float64)


def pairs(a: Tensor, b: Tensor) -> Tensor:
    """The mean of the kernel over all pairs, squares written out."""
    square = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return torch.stack([torch.exp(-square / (2 * q)) for q in (10, 15, 20, 50)]).sum(0).mean()


def visited(fed: Federation, round: int, i: int, down: Tree, own: Tree, lam: float) -> Tree:
    """A visit in plain torch: the shared and own tensors at its end, H and phi0 as they were."""
    trained = {**{n: x for n, x in down.items() if not n.startswith("head.")}, **own}
    context = trained.pop("context")
    for part in rows_of(fed, round, i, 1, 8):
        x, y = fed.ground.columns["x"][part], fed.ground.columns["y"][part]
        w = {n: t.detach().clone().requires_grad_() for n, t in trained.items()}
        h = torch.tanh(F.linear(x, w["features.lower.weight"], w["features.lower.bias"]))
        h0 = torch.tanh(F.linear(x, down["features.lower.weight"], down["features.lower.bias"]))
        g = F.linear(h * context, w["policy.linear.weight"], w["policy.linear.bias"])
        g = F.relu(F.layer_norm(g, (2 * K,), w["policy.norm.weight"], w["policy.norm.bias"]))
        r, s = g[:, :K].exp(), g[:, K:].exp()
        r, s = r / (r + s), s / (r + s)
        logits = F.linear(r * h, w["personal.weight"], w["personal.bias"])
        logits = logits + F.linear(s * h, down["head.weight"], down["head.bias"])
        square = pairs(h, h) + pairs(h0, h0) - 2 * pairs(h, h0)
        (F.cross_entropy(logits, y) + lam * square).backward()
        trained = {n: t.detach() - 0.1 * cast(Tensor, t.grad) for n, t in w.items()}
    v = trained["personal.weight"].sum(0)
    return {**trained, "context": v / v.norm()}


def test_two_rounds_by_hand() -> None:
    fed = tiny.federation("fedcp", TASK, settings={"lam": 3.0})
    w, kept = tree.clone(fed.state["shared"]), tiny.kept(fed)
    own = {i: {n: kept[n][i] for n in LOCAL} for i in range(5)}
    assert own[0]["context"].norm().item() == pytest.approx(1.0)
    for round in (1, 2):
        done = {i: visited(fed, round, i, w, own[i], 3.0) for i in range(5)}
        uploads = []
        for i, end in done.items():
            own[i] = {n: end[n] for n in LOCAL}
            blend = {f"head.{n}": (end[f"personal.{n}"] + w[f"head.{n}"]) / 2
                     for n in ("weight", "bias")}  # fmt: skip
            uploads.append({**{n: end[n] for n in w if n not in blend}, **blend})
        w = tree.weighted_mean(tree.stack(uploads), SIZES / SIZES.sum())
        fed.step()
        assert tiny.apart(fed.state["shared"], w) < 1e-12
        kept = tiny.kept(fed)
        for i in range(5):
            assert tiny.apart({n: kept[n][i] for n in LOCAL}, own[i]) < 1e-12


def test_what_crosses_and_what_is_trained() -> None:
    fed = tiny.federation("fedcp", TASK)
    fed.executor = watched = Watched(fed.executor)
    for _ in range(2):
        fed.step()
    for upload in watched.uploads:
        assert {name.split(".")[0] for name in upload.delta} == {"features", "policy", "head"}
        assert not (upload.values or upload.buffers or upload.scalars)
    (phase,) = fed.method.phases("train")
    assert {name.split(".")[0] for name in phase.trainable} == {"features", "policy", "personal"}
    sent = fed.ledger.sums("values", by="kind", what="crossing")
    assert (
        sent["model"]
        == sent["update"]
        == 10 * 8 * sum(x.numel() for x in fed.state["shared"].values())
    )


def test_even_shares_of_equal_heads_are_one_head_with_two_biases() -> None:
    fed = tiny.federation("fedcp", TASK, settings={"gate": False})
    net = model(fed, 0)
    assert isinstance(net, Conditional)
    h = net.features(items())
    assert torch.equal(net.shares(h), torch.full_like(h, 0.5))
    expected = h @ net.head.weight.T + 2 * cast(Tensor, net.head.bias)
    torch.testing.assert_close(net(items()), expected, rtol=1e-12, atol=1e-13)


def test_the_shares_are_a_softmax_of_pairs_that_the_sample_decides() -> None:
    net = model(tiny.play("fedcp", TASK, 3), 1)
    h = net.features(items())
    r = net.shares(h)
    pair = torch.relu(net.policy.norm(net.policy.linear(h * net.context)))
    s = 1 / (1 + torch.exp(pair[:, :K] - pair[:, K:]))
    torch.testing.assert_close(r + s, torch.ones_like(r), rtol=1e-13, atol=1e-14)
    assert float(r.std(0).mean()) > 1e-3
    other = model(tiny.play("fedcp", TASK, 3, settings={"context": False}), 1)
    assert bool((other.context == 1).all())


def test_mmd() -> None:
    h, other = (seeds.normal(key, (5, K), torch.float64) for key in (1, 2))
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    live = weight > 0
    a, b = h[live], 2.0 * other[live]
    expected = pairs(a, a) + pairs(b, b) - 2 * pairs(a, b)
    assert float(mmd(h, 2.0 * other, weight)) == pytest.approx(float(expected), rel=1e-12)
    assert float(mmd(h, h, weight)) == 0.0 and float(expected) > 0.1
    assert float(mmd(h, h.flip(0), torch.ones(5))) == pytest.approx(0.0, abs=1e-12)
    twice = mmd(torch.cat([h[:2], h[:1]]), torch.cat([other[:2], other[:1]]), torch.ones(3))
    weighed = mmd(h[:2], other[:2], torch.tensor([2.0, 1.0]))
    assert float(twice) == pytest.approx(float(weighed), rel=1e-12)


def test_without_lam_and_without_gate_the_terms_are_gone() -> None:
    runs = [
        tiny.play("fedcp", TASK, 2, settings=settings).state["shared"]
        for settings in ({"lam": 0.0}, {"lam": 5.0}, {"lam": 0.0, "gate": False})
    ]
    for a, b in ((0, 1), (0, 2)):
        assert tiny.apart(runs[a], runs[b]) > 1e-4
    policy = [n for n in runs[2] if n.startswith("policy.")]
    first = tiny.federation("fedcp", TASK).state["shared"]
    assert all(torch.equal(runs[2][n], first[n]) for n in policy)


def test_a_prediction_is_one_number_for_each_sample() -> None:
    """With Gumbel noise in training too; the order of a batch changes nothing."""
    fed = tiny.play("fedcp", TASK, 2, settings={"gumbel": True})
    x, order = items(), torch.tensor([4, 0, 9, 2, 1, 3, 10, 8, 7, 6, 5])
    net = model(fed, 3)
    assert torch.equal(net(x), net(x))
    torch.testing.assert_close(net(x)[order], net(x[order]), rtol=1e-12, atol=1e-13)
    kept = tree.row(tiny.kept(fed), 3)
    sums = [evaluate(TASK, fed.method, fed.ground.module, model_of(fed, kept),
                     TASK.synthesise().test, kept) for _ in range(2)]  # fmt: skip
    assert tree.equal(*sums)
    again = tiny.play("fedcp", TASK, 2, settings={"gumbel": True})
    assert tree.equal(tiny.state(fed), tiny.state(again))
    plain = tiny.play("fedcp", TASK, 2)
    assert tiny.apart(tiny.state(fed), tiny.state(plain)) > 1e-3


def test_gumbel_noise_on_even_odds_makes_shares_uniform() -> None:
    """The difference of two Gumbel draws is logistic, and its sigmoid uniform."""
    policy = Policy(2).double()
    with torch.no_grad():
        policy.linear.weight.zero_()
        policy.linear.bias.zero_()
    policy.noise = torch.tensor(7)
    r = policy(torch.ones(20000, 2, dtype=torch.float64)).detach().flatten().sort().values
    even = (torch.arange(40000) + 0.5) / 40000
    assert float((r - even).abs().max()) < 1.6 / 40000**0.5  # Kolmogorov: 1 in 100
    policy.tau = 0.1
    sharp = policy(torch.ones(2000, 2, dtype=torch.float64)).detach()
    assert float((sharp * (1 - sharp)).mean()) < 0.03  # 1/6 at tau 1


def test_who_is_away_keeps_its_head_and_context() -> None:
    fed = tiny.play("fedcp", TASK, 2, cohort=2)
    before, chosen = tiny.kept(fed), set(fed.schedule.clients(3).tolist())
    fed.step()
    for client in range(5):
        same = tree.equal(tree.row(before, client), tree.row(tiny.kept(fed), client))
        assert same is (client not in chosen)
    rows = tiny.kept(fed)["personal.weight"].sum(1)
    v = tiny.kept(fed)["context"]
    for client in chosen:
        torch.testing.assert_close(v[client], rows[client] / rows[client].norm())


def test_a_model_without_a_linear_head_is_one_line() -> None:
    task = tiny.task(module=lambda seed: nn.Linear(tiny.WIDE, C).double())
    with pytest.raises(InputError, match="linear head, with method fedcp"):
        tiny.federation("fedcp", task)
    assert FedCP.Settings().model_dump()["lam"] == 5.0


@pytest.mark.slow
def test_the_gate_depends_on_the_sample() -> None:
    built = claims.ours(0, rounds=8)
    assert claims.gates(built) > 0.01
    fixed = claims.ours(0, rounds=1, gate=False)
    assert claims.gates(fixed) == 0.0
