"""Centralised: one model on everybody's items, whoever has them, and the data on the wire, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import hand
from tests.run import test_resume as resuming

from isthmus import cli, tree
from isthmus.errors import InputError
from isthmus.federated.pooled import Pooled
from isthmus.federated.score import score
from isthmus.run.compare import compare
from isthmus.wire.device import Device
from isthmus.wire.errors import WireError

ALL: dict[str, Any] = {"batch": 0, "epochs": 1, "lr": 0.3}


def test_one_full_batch_step_is_that_of_fedavg_and_fedsgd() -> None:
    """Three rounds; a mean over clients that ignores their sizes is somewhere else."""
    for rounds in (1, 3):
        ours, fedavg, fedsgd = (
            hand.shared(tiny.play(name, hand.TASK, rounds, **ALL))
            for name in ("centralised", "fedavg", "fedsgd")
        )
        assert tiny.apart(ours, fedavg) < 1e-13 and tiny.apart(ours, fedsgd) < 1e-13
        assert tiny.apart(hand.initial(), ours) > 1e-2


def test_it_is_fedavg_of_one_client_that_owns_everything() -> None:
    keys: dict[str, Any] = {"epochs": 2, "optimiser": "sgd:momentum=0.9", "lr_decay": 0.9}
    one = tiny.play("fedavg", tiny.task((sum(tiny.RAGGED),)), 3, **keys)
    for executor in ("sequential", "vectorised"):
        fed = tiny.play("centralised", hand.TASK, 3, executor=executor, **keys)
        assert tiny.apart(hand.shared(fed), hand.shared(one)) < (
            1e-15 if executor == "sequential" else 1e-12
        )
    several = tiny.play("fedavg", hand.TASK, 3, **keys)
    assert tiny.apart(hand.shared(one), hand.shared(several)) > 1e-3


def test_who_has_which_items_changes_no_bit() -> None:
    a, b, c = (
        tiny.play("centralised", hand.TASK, 2, clients=n, partition=how, cohort=2)
        for n, how in ((5, "natural"), (3, "dirichlet:0.5"), (7, "iid"))
    )
    assert tree.equal(tiny.state(a), tiny.state(b)) and tree.equal(tiny.state(a), tiny.state(c))


def test_the_data_cross_once_and_nothing_else_does() -> None:
    fed = tiny.federation("centralised", hand.TASK, link="lte,loss=0.5,attempts=1")
    for _ in range(3):
        fed.step()
    crossings = [row for row in fed.ledger.rows() if row["what"] == "crossing"]
    arrived = {row["from"]: row for row in crossings if row["note"] != "lost"}
    assert len(arrived) == 5 and len(crossings) > 5  # lost messages are sent, and paid, again
    assert {row["kind"] for row in crossings} == {"data"}
    assert {row["to"] for row in crossings} == {"server"}
    for i, size in enumerate(tiny.RAGGED):
        row = arrived[f"client/{i:03d}"]
        assert row["values"] == size * (tiny.WIDE * 8 + 8)  # float64 inputs, int64 classes
        assert 0 < row["bytes"] - row["values"] < 1000
    work = [row for row in fed.ledger.rows() if row["what"] == "work"]
    assert [row["from"] for row in work] == ["server"] * 3
    assert all(row["flops"] == fed.flops * sum(tiny.RAGGED) for row in work)
    begun = max(row["t"] + row["seconds"] for row in crossings)
    each = Device.named("server").spend(work[0]["flops"]).seconds
    assert work[0]["t"] == pytest.approx(begun, rel=1e-9)
    assert fed.now == pytest.approx(begun + 3 * each, rel=1e-9)


def test_items_that_are_tested_do_not_cross_and_clients_are_scored_on_their_own() -> None:
    built = tiny.built("centralised", hand.TASK, holdout=0.3, clients=4, partition="iid")
    fed, tests = built.federation, built.clients.tests
    fed.step()
    assert tests is not None and isinstance(fed, Pooled) and fed.pool is not None
    mine = np.sort(np.concatenate(built.clients.parts))
    assert torch.equal(fed.pool.columns["x"], fed.ground.columns["x"][mine])
    assert not set(mine.tolist()) & set(np.concatenate(tests).tolist())
    assert fed.ledger.total("values", kind="data") == len(mine) * (tiny.WIDE * 8 + 8)
    for moment in ("mixed", "trained"):
        rows = list(score(fed, built.task, built.clients.scored, tests, "test", moment))
        assert [row["scope"] for row in rows] == ["global", *(f"client/{i}" for i in range(4))]
        sizes = np.array([len(part) for part in tests])
        mean = sizes @ np.array([row["accuracy"] for row in rows[1:]]) / sizes.sum()
        assert rows[0]["accuracy"] == pytest.approx(mean)


def test_what_promises_privacy_or_needs_uploads_is_refused() -> None:
    for keys, words in (
        ({"clip": 1.0, "mask": "secagg"}, "in the clear"),
        ({"clip": 1.0, "privacy": "local", "noise": 1.0, "public": ("examples",)}, "in the clear"),
        ({"attack": "sign-flip", "attackers": 1}, "no uploads"),
        ({"selector": "krum:f=1"}, "no uploads"),
        ({"reducer": "median"}, "no uploads"),
        ({"schedule": "fedasync"}, "no uploads"),
        ({"schedule": "gossip"}, "no uploads"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            tiny.federation("centralised", hand.TASK, **keys)
        assert "method that gathers the data" in str(caught.value)


def test_a_pool_that_diverges_is_said() -> None:
    x, y = tiny.data((4, 5), torch.float64)
    x[6] = float("nan")
    with pytest.raises(WireError, match="NaN or infinity"):
        tiny.play("centralised", tiny.task((4, 5), data=(x, y)), 1)


def test_it_is_resumed_without_sending_again(tmp_path: Path) -> None:
    config = resuming.configured("centralised", rounds=4, checkpoint=2)
    resuming.api.start(config, tmp_path / "whole", task=resuming.TASK)
    resuming.stopped(config, tmp_path / "cut", 3)
    resuming.api.resume(tmp_path / "cut", task=resuming.TASK)
    resuming.same(tmp_path / "whole", tmp_path / "cut")
    ledger = (tmp_path / "cut/ledger.jsonl").read_text()
    assert ledger.count('"data"') == 4


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = "train --method centralised --clients 3 --rounds 1 --steps 2 --model tiny --evaluate 0"
    assert cli.main(words.split()) == 0
    assert "centralised on digits" in capsys.readouterr().out


@pytest.mark.slow
def test_in_a_comparison() -> None:
    keys: dict[str, Any] = {"clients": 3, "rounds": 2, "steps": 2, "model": "tiny", "jobs": 1}
    table = compare(["fedavg", "centralised"], seeds=1, rates=(0.1,), **keys)
    ours = table.lines[1]
    assert ours.worst is not None and np.isfinite(ours.score) and ours.total_bytes > 0
