"""FedSynSAM: its limits, by hand, what is sent when, and what the server may know."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import hand
from torch import Tensor
from torch.nn import functional as F

from isthmus import seeds, tree
from isthmus.contracts import Meta, Reduced
from isthmus.errors import InputError
from isthmus.federated.methods.fedsynsam import FedSynSAM, mixed
from isthmus.federated.round import Federation
from isthmus.federated.steps import uphill
from isthmus.models.bind import bind
from isthmus.run import api
from isthmus.tree import Tree

FEW: dict[str, Any] = {"R0": 2, "E": 1, "M": 2, "ipc": 2, "iterations": 3, "rho": 0.4}
EVEN = tiny.task((12, 12, 12))


def soft(fed: Federation, at: Tree) -> Tree:
    """The gradient of the cross-entropy on the synthetic set, by autograd."""
    held = fed.state["synthetic"]
    leaves = {n: x.detach().clone().requires_grad_() for n, x in at.items()}
    log = F.log_softmax(bind(fed.ground.module, leaves)(held["x"]), 1)
    loss = -(held["y"] * log).sum() / len(log)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("m", [0.0, 0.3, 1.0])
def test_by_hand(m: float) -> None:
    """FedAvg for R0 rounds; then m = 0 is FedSAM, m = 1 climbs the set alone."""
    fed = tiny.federation("fedsynsam", hand.TASK, cohort=3, settings={**FEW, "m": m})
    w = hand.initial()

    def rule(slope: hand.Slope, v: Tree) -> Tree:
        if fed.round < 2:
            return slope(v)
        a, b = slope(v), soft(fed, v)
        d = hand.up(tree.scale(a, (1 - m) / float(hand.norm(a))), b, m / float(hand.norm(b)))
        return slope(hand.up(v, d, 0.4 / float(hand.norm(d))))

    for round in range(1, 5):
        chosen = fed.schedule.clients(round).tolist()
        w = hand.mean([hand.steps(fed, round, i, w, rule)[0] for i in chosen])
        fed.step()
        assert tiny.apart(hand.shared(fed), w) < 1e-8  # 1e-12 beside the norms of gradients


def test_radius_zero_is_fedavg() -> None:
    a = tiny.play("fedsynsam", EVEN, 4, settings={**FEW, "rho": 0.0})
    b = tiny.play("fedavg", EVEN, 4)
    assert tree.equal(hand.shared(a), hand.shared(b))
    c = tiny.play("fedsynsam", EVEN, 4, settings=FEW)
    assert tiny.apart(hand.shared(c), hand.shared(b)) > 1e-4


def test_the_perturbation_has_length_rho() -> None:
    v, a, b = (
        {"p": seeds.normal(i, (4, 3), torch.float64), "q": seeds.normal(i + 9, (5,), torch.float64)}
        for i in range(3)
    )
    for m in (0.0, 0.2, 0.5, 1.0):
        moved = tree.sub(uphill(v, mixed(a, b, m), 0.37), v)
        assert float(hand.norm(moved)) == pytest.approx(0.37, rel=1e-9)
    assert tiny.apart(mixed(a, b, 1.0), tree.scale(b, 1 / float(hand.norm(b)))) < 1e-9


def test_executors_agree_while_the_set_is_used() -> None:
    keys = {"cohort": 3, "settings": FEW}
    task = tiny.task((3, 16, 1, 7), dropout=0.3)
    one = tiny.play("fedsynsam", task, 4, **keys)
    many = tiny.play("fedsynsam", task, 4, executor="vectorised", **keys)
    assert tiny.apart(tiny.state(one), tiny.state(many)) < 1e-9


def test_the_set_is_sent_once_to_each_client() -> None:
    """With the model of a client's first round after R0, and never again."""
    fed = tiny.federation("fedsynsam", hand.TASK, cohort=2, settings=FEW)
    had: set[int] = set()
    size = 2 * 4 * (tiny.WIDE + tiny.CLASSES) * 8  # ipc x classes rows of x and y, float64
    for round in range(1, 9):
        before = fed.ledger.total("values", kind="base")
        honest = fed.ledger.total("bytes", kind="base")
        fed.step()
        new = set(fed.schedule.clients(round).tolist()) - had if round > 2 else set()
        had |= new
        assert fed.ledger.total("values", kind="base") - before == size * len(new)
        assert (fed.ledger.total("bytes", kind="base") - honest > size * len(new)) == bool(new)
    assert len(had) == 5
    up = fed.ledger.total("values", kind="update")
    assert up == 8 * 2 * sum(x.numel() for x in hand.initial().values()) * 8


def test_a_second_set_is_learned_and_sent_again() -> None:
    fed = tiny.federation("fedsynsam", EVEN, settings={**FEW, "F": 2})
    seen: list[Tensor] = []
    for _ in range(6):
        fed.step()
        seen.append(fed.state["synthetic"]["x"])
    changes = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changes == [True, False, True, False, True]
    size = 2 * 4 * (tiny.WIDE + tiny.CLASSES) * 8
    assert fed.ledger.total("values", kind="base") == 2 * 3 * size  # the third is not yet asked for


def test_the_set_is_made_of_global_models_alone() -> None:
    """Of w_0 .. w_R0 it is a function; who took part or how much they hold is not read."""
    fed = tiny.federation("fedsynsam", hand.TASK, cohort=3, settings=FEW)
    method = fed.method
    assert isinstance(method, FedSynSAM)
    models = [fed.state["shared"]]
    before = fed.state
    for _ in range(2):
        before = fed.state
        fed.step()
        models.append(fed.state["shared"])
    again = method.distil(tree.stack(models), seeds.key("distil", 0))
    assert tree.equal(again, fed.state["synthetic"])
    update = Reduced(tree.sub(models[2], models[1]))
    for who in ([Meta(0, 2, 1, 3.0)], [Meta(4, 2, 1, 900.0, 7), Meta(1, 2, 1, 5.0)]):
        other = method.server(before, update, who)
        assert tiny.apart(other["synthetic"], fed.state["synthetic"]) < 1e-9
    later = fed.method.server(fed.state, update, [])
    assert tree.equal(later["synthetic"], fed.state["synthetic"])


def test_a_run_resumes_with_its_set(tmp_path: Path) -> None:
    task = tiny.task((5, 14, 9), torch.float32)
    config = tiny.config("fedsynsam", clients=3, cohort=2, rounds=5, checkpoint=3, settings=FEW)

    class Stop(Exception):
        pass

    def watch(report: Any, rows: Any) -> None:
        if report.round == 4:
            raise Stop

    whole = api.start(config, tmp_path / "whole", task=task)
    with pytest.raises(Stop):
        api.start(config, tmp_path / "cut", watch, task)
    run = api.resume(tmp_path / "cut", task=task)
    for name in ("checkpoint.safetensors", "ledger.jsonl", "model/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert run.final == whole.final


def test_settings_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(InputError, match=r"settings\.E: 4 given, allowed: at most settings\.R0"):
        tiny.federation("fedsynsam", EVEN, settings={"R0": 3, "E": 4})
    with pytest.raises(InputError, match=r"settings\.shape: nothing, and the model begins with Co"):
        api.train("digits", "fedsynsam", model="paper", rounds=1)
