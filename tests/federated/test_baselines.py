"""The identities of the baselines: hand loops in plain torch, float64, and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.federated import tiny
from torch import Tensor, nn

from isthmus import seeds, tree
from isthmus.errors import InputError
from isthmus.federated.round import Federation
from isthmus.learn.plan import shuffled_epochs
from isthmus.models.bind import bind, tensors_of
from isthmus.tasks.contract import Task
from isthmus.tree import Tree

TASK = tiny.task()
SIZES = torch.tensor(tiny.RAGGED, dtype=torch.float64)
ALL = {"batch": 0, "epochs": 1}


def shared(fed: Federation) -> Tree:
    return fed.state["shared"]


def gradient(module: nn.Module, tensors: Tree, x: Tensor, y: Tensor) -> Tree:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    nn.functional.cross_entropy(bind(module, leaves)(x), y).backward()
    return {n: t.grad for n, t in leaves.items() if t.grad is not None}


def rows_of(fed: Federation, round: int, client: int, epochs: int, batch: int) -> list[Tensor]:
    """The batches of a visit, from its key alone."""
    visit = int(seeds.keys(seeds.key(fed.seed, "visit", round), [client])[0])
    key = int(seeds.fold(visit, 0))
    rows = torch.from_numpy(fed.ground.owned.rows(client))
    plan = shuffled_epochs(key, len(rows), epochs, batch)
    return [rows[i[w > 0]] for i, w in zip(plan.index, plan.weight, strict=True)]


def local_steps(
    fed: Federation, w: Tree, rows: list[Tensor], lr: float, pull: Tree | None = None, mu: float = 0
) -> Tree:
    """Plain SGD; `pull` is added to every gradient, `mu` pulls back to where it began."""
    begun = w
    for part in rows:
        x, y = fed.ground.columns["x"][part], fed.ground.columns["y"][part]
        g = gradient(fed.ground.module, w, x, y)
        w = {
            n: t - lr * (g[n] + (pull[n] if pull else 0.0) + mu * (t - begun[n]))
            for n, t in w.items()
        }
    return w


def initial() -> Tree:
    return tree.clone(tensors_of(TASK.build(seed=0)))


def mean_model(models: list[Tree], weights: Tensor) -> Tree:
    return tree.weighted_mean(tree.stack(models), weights / weights.sum())


def test_fedavg_by_hand() -> None:
    """Two rounds of two epochs over ragged clients, weighted by their items."""
    fed = tiny.federation("fedavg", TASK, epochs=2)
    w = initial()
    for round in (1, 2):
        models = [local_steps(fed, w, rows_of(fed, round, i, 2, 8), 0.1) for i in range(5)]
        w = mean_model(models, SIZES)
        fed.step()
        assert tiny.apart(shared(fed), w) < 1e-13


def test_one_full_batch_step_of_all_is_one_step_of_gradient_descent() -> None:
    w = initial()
    g = gradient(TASK.build(), w, *tiny.data(tiny.RAGGED, torch.float64))
    expected = {n: x - 0.3 * g[n] for n, x in w.items()}
    for name, keys in {"fedavg": ALL, "fedsgd": {"batch": 4, "epochs": 7}, "fedprox": ALL}.items():
        assert tiny.apart(shared(tiny.play(name, TASK, 1, lr=0.3, **keys)), expected) < 1e-13
    a, b = (tiny.play(name, TASK, 3, lr=0.3, **ALL) for name in ("fedavg", "fedsgd"))
    assert tree.equal(shared(a), shared(b))


def test_one_client_is_central_training() -> None:
    """E local passes a round over R rounds are E R passes, item for item."""
    task = tiny.task((23,))
    fed = tiny.play("fedavg", task, 3, epochs=2)
    w = initial()
    for round in (1, 2, 3):
        w = local_steps(fed, w, rows_of(fed, round, 0, 2, 8), 0.1)
    assert tiny.apart(shared(fed), w) < 1e-13


def test_a_partial_cohort_moves_by_its_own_items_alone() -> None:
    fed = tiny.federation("fedavg", TASK, cohort=2)
    seen = set()
    w = initial()
    for round in range(1, 5):
        chosen = fed.schedule.clients(round).tolist()
        seen |= set(chosen)
        models = [local_steps(fed, w, rows_of(fed, round, i, 1, 8), 0.1) for i in chosen]
        w = mean_model(models, SIZES[chosen])
        report = fed.step()
        assert report.clients == chosen == report.accepted and len(chosen) == 2
        assert tiny.apart(shared(fed), w) < 1e-13
    assert len(seen) > 2


def test_fedprox_pulls_back() -> None:
    zero = tiny.play("fedprox", TASK, 2, epochs=2, settings={"mu": 0.0})
    assert tree.equal(shared(zero), shared(tiny.play("fedavg", TASK, 2, epochs=2)))
    fed = tiny.play("fedprox", TASK, 1, epochs=2, settings={"mu": 0.7})
    models = [local_steps(fed, initial(), rows_of(fed, 1, i, 2, 8), 0.1, mu=0.7) for i in range(5)]
    assert tiny.apart(shared(fed), mean_model(models, SIZES)) < 1e-13
    far, near = (
        tree.norm(
            tree.sub(
                shared(tiny.play("fedprox", TASK, 1, epochs=5, settings={"mu": mu})), initial()
            )
        )
        for mu in (0.0, 5.0)
    )
    assert near < 0.9 * far


def control(fed: Federation, prefix: str = "control/") -> tuple[Tree, Tree]:
    """The clients' controls, stacked, and the server's."""
    own = {n.removeprefix(prefix): x for n, x in tiny.kept(fed).items() if n.startswith(prefix)}
    return own, {n.removeprefix(prefix): x for n, x in fed.state["c"].items()}


def test_scaffold_keeps_the_mean_of_its_controls() -> None:
    fed = tiny.federation("scaffold", TASK, cohort=2, epochs=2)
    for _ in range(8):
        fed.step()
        own, c = control(fed)
        assert tiny.apart({n: x.mean(0) for n, x in own.items()}, c) < 1e-12
    assert float(tree.norm(c)) > 1e-2 and len(fed.store) < 6


def test_scaffold_by_hand() -> None:
    fed = tiny.federation("scaffold", TASK, cohort=3, epochs=2)
    w = initial()
    zeros = tree.zeros_like(w)
    c, own = zeros, [zeros] * 5
    for round in range(1, 4):
        chosen = fed.schedule.clients(round).tolist()
        models, changes = [], []
        for i in chosen:
            rows = rows_of(fed, round, i, 2, 8)
            y = local_steps(fed, w, rows, 0.1, pull=tree.sub(c, own[i]))
            k = 0.1 * len(rows)
            new = {n: own[i][n] - c[n] + (w[n] - y[n]) / k for n in w}
            changes.append(tree.sub(new, own[i]))
            models.append(y)
            own[i] = new
        w = mean_model(models, torch.ones(3, dtype=torch.float64))
        step = tree.weighted_mean(tree.stack(changes), torch.full((3,), 1 / 3, dtype=torch.float64))
        c = tree.add(c, step, alpha=3 / 5)
        fed.step()
        assert tiny.apart(shared(fed), w) < 1e-12 and tiny.apart(control(fed)[1], c) < 1e-12
        assert tiny.apart(control(fed)[0], tree.stack(own)) < 1e-11


def test_scaffold_begins_as_fedavg_with_even_weights() -> None:
    even = tiny.task((12, 12, 12))
    first = shared(tiny.play("scaffold", even, 1, epochs=2))
    assert tree.equal(first, shared(tiny.play("fedavg", even, 1, epochs=2)))
    fed = tiny.play("scaffold", TASK, 1)
    models = [local_steps(fed, initial(), rows_of(fed, 1, i, 1, 8), 0.1) for i in range(5)]
    assert tiny.apart(shared(fed), mean_model(models, torch.ones(5).double())) < 1e-13


def test_scaffold_of_one_client_is_gradient_descent() -> None:
    one = tiny.task((23,))
    a, b = (tiny.play(name, one, 4, batch=0, epochs=3) for name in ("scaffold", "fedavg"))
    assert tiny.apart(shared(a), shared(b)) < 1e-12
    with pytest.raises(InputError, match="optimiser: adam given"):
        tiny.federation("scaffold", one, optimiser="adam")
    with pytest.raises(InputError, match="plain sgd"):
        tiny.federation("scaffold", one, optimiser="sgd:momentum=0.9")


def quadratic_task() -> Task:
    """f_i(w) = a/2 ||w - b_i||^2 up to a constant: items of client i lie around b_i."""
    x = torch.cat([i + seeds.normal(i, (6, 3), torch.float64) for i in (0, 4, -9)])

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return 0.5 * outputs.square().sum(1)

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.w

    return tiny.task((6, 6, 6), module=lambda seed: Point(), data=(x, torch.zeros(18).long()),
                     loss=loss)  # fmt: skip


def test_quadratics_in_closed_form() -> None:
    """K full-batch steps take client i to b_i + (1 - lr)^K (w - b_i)."""
    task = quadratic_task()
    x = task.synthesise().train.columns["x"]
    b = x.view(3, 6, 3).mean(1)
    w, lr, steps = torch.zeros(3, dtype=torch.float64), 0.2, 4
    fed = tiny.federation("fedavg", task, lr=lr, batch=0, steps=steps)
    for _ in range(3):
        w = (b + (1 - lr) ** steps * (w - b)).mean(0)
        fed.step()
        torch.testing.assert_close(shared(fed)["w"], w, rtol=1e-12, atol=1e-12)
    mu = 0.5
    prox = tiny.play("fedprox", task, 1, lr=lr, batch=0, steps=60, settings={"mu": mu})
    rest = b.mean(0) / (1 + mu)  # min a/2 |v - b|^2 + mu/2 |v|^2, averaged
    torch.testing.assert_close(shared(prox)["w"], rest, rtol=1e-5, atol=1e-5)


def server_steps(name: str, rounds: int, **settings: float) -> tuple[Federation, list[Tree]]:
    """A federation, and the mean updates D that its server saw."""
    fed = tiny.federation(name, TASK, settings=settings)
    seen: list[Tree] = []
    reduce = fed.method.reducer.reduce

    class Watched:
        needs = frozenset[str]()

        def reduce(self, *given: Any) -> Any:
            made = reduce(*given)
            seen.append(made.tensors)
            return made

    fed.method.reducer = Watched()
    for _ in range(rounds):
        fed.step()
    return fed, seen


def test_fedavgm() -> None:
    plain = tiny.play("fedavg", TASK, 3)
    same = tiny.play("fedavgm", TASK, 3, settings={"beta1": 0.0, "server_lr": 1.0})
    assert tree.equal(shared(plain), shared(same))
    fed, seen = server_steps("fedavgm", 4, beta1=0.6, server_lr=0.8)
    w, m = initial(), tree.zeros_like(initial())
    for d in seen:
        m = {n: 0.6 * m[n] + d[n] for n in m}
        w = {n: w[n] + 0.8 * m[n] for n in w}
    assert tiny.apart(shared(fed), w) < 1e-13 and tiny.apart(fed.state["m"], m) < 1e-13


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_servers(name: str) -> None:
    fed, seen = server_steps(name, 4, beta1=0.5, beta2=0.8, server_lr=0.3, tau=0.02)
    w, m = initial(), tree.zeros_like(initial())
    v = {n: torch.full_like(x, 0.02**2) for n, x in w.items()}
    for d in seen:
        for n in w:
            m[n] = 0.5 * m[n] + 0.5 * d[n]
            square = d[n] ** 2
            if name == "fedadam":
                v[n] = 0.8 * v[n] + 0.2 * square
            else:
                v[n] = v[n] - 0.2 * square * torch.sign(v[n] - square)
            w[n] = w[n] + 0.3 * m[n] / (v[n].sqrt() + 0.02)
    assert tiny.apart(shared(fed), w) < 1e-12 and tiny.apart(fed.state["v"], v) < 1e-12


def test_yogi_and_adam_differ_only_in_v() -> None:
    settings = {"beta2": 0.8, "tau": 0.02}
    adam, yogi = (tiny.play(n, TASK, 1, settings=settings) for n in ("fedadam", "fedyogi"))
    assert tree.equal(adam.state["m"], yogi.state["m"])
    assert tiny.apart(adam.state["v"], yogi.state["v"]) > 1e-2
    for fed in (adam, yogi):
        step = tree.sub(shared(fed), initial())
        expected = {
            n: 0.01 * m / (fed.state["v"][n].sqrt() + 0.02) for n, m in fed.state["m"].items()
        }
        assert tiny.apart(step, expected) < 1e-9


def test_local_only_trains_alone_and_sends_nothing() -> None:
    fed = tiny.play("local-only", TASK, 2, epochs=2)
    kept = tiny.kept(fed)
    for i in range(5):
        w = initial()
        for round in (1, 2):
            w = local_steps(fed, w, rows_of(fed, round, i, 2, 8), 0.1)
        assert tiny.apart(tree.row(kept, i), w) < 1e-13
    assert fed.ledger.sums("rows", by="what") == {"work": 10}
    assert fed.ledger.total("bytes") == fed.ledger.total("values") == 0
    assert fed.state == {"shared": {}} and fed.ledger.total("flops") > 0


def test_the_ledger_counts_what_a_round_really_is() -> None:
    fed = tiny.play("fedavg", TASK, 2, cohort=3)
    numbers = sum(x.numel() for x in initial().values())
    assert fed.ledger.sums("values", by="kind", what="crossing") == {
        "model": 2 * 3 * numbers * 8,
        "update": 2 * 3 * numbers * 8,
    }
    assert fed.ledger.sums("rows", by=("kind", "round")) == {
        (kind, r): 3 for kind in ("model", "train", "update") for r in (1, 2)
    }
    rows = [row for row in fed.ledger.rows() if row["kind"] == "train"]
    sizes = {f"client/{i:03d}": size for i, size in enumerate(tiny.RAGGED)}
    each = {row["flops"] / sizes[row["from"]] for row in rows}
    assert len(each) == 1 and each == {fed.flops}
    wide, hidden, classes = tiny.WIDE, tiny.HIDDEN, tiny.CLASSES
    forward = 2 * (wide * hidden + hidden * classes)
    assert fed.flops == 2 * forward + 2 * hidden * classes  # no gradient of the input is needed
    for row in fed.ledger.rows():
        if row["what"] == "crossing":
            overhead = row["bytes"] - row["values"]
            assert 0 < overhead < 1000
    last = max(row["t"] + row["seconds"] for row in fed.ledger.rows())
    assert fed.now == pytest.approx(last, rel=1e-12)


def test_a_round_starts_when_the_slowest_upload_has_arrived() -> None:
    fed = tiny.federation("fedavg", TASK, devices=("phone", "microcontroller"))
    ends = []
    for _ in range(2):
        start = fed.now
        fed.step()
        rows = [r for r in fed.ledger.rows() if r["round"] == fed.round]
        ends.append(fed.now)
        assert fed.now == pytest.approx(max(r["t"] + r["seconds"] for r in rows), rel=1e-12)
        begun = [r["t"] for r in rows if r["kind"] == "model"]
        assert begun == pytest.approx([start] * 5, rel=1e-9)
        down, work, up = (
            {r["from" if k != "model" else "to"]: r for r in rows if r["kind"] == k}
            for k in ("model", "train", "update")
        )
        for client, row in work.items():
            assert row["t"] == pytest.approx(down[client]["t"] + down[client]["seconds"])
            assert up[client]["t"] == pytest.approx(row["t"] + row["seconds"])
    spent = fed.ledger.sums("seconds", by="from", kind="train")
    flops = fed.ledger.sums("flops", by="from", kind="train")
    rate = {client: flops[client] / seconds for client, seconds in spent.items()}
    assert rate["client/001"] == pytest.approx(1e7) and rate["client/000"] == pytest.approx(1e10)
    assert ends[1] > ends[0]
