"""The bench of rivals: all do the same work, and what is not here is said with its reason."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from isthmus.bench import rivals
from isthmus.bench.federated import CLIENTS, LR, fedavg_on_digits
from isthmus.bench.rivals import RIVALS, Absent, Other, Played

PFL, FEDJAX, FLOWER = RIVALS


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No environment of a rival is named, and this one has no Ray."""
    for rival in RIVALS:
        if rival.variable:
            monkeypatch.delenv(rival.variable, raising=False)
    find = importlib.util.find_spec
    spec = {"ray": None, "flwr": find("json")}  # the one is here, the other not
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec[name] if name in spec else find(name)
    )
    return monkeypatch


def test_rivals_that_are_not_here_are_skipped_with_the_reason(bare: pytest.MonkeyPatch) -> None:
    for name, value in (("WARM", 1), ("BLOCKS", 1), ("ROUNDS", 2)):
        bare.setattr(rivals, name, value)
    bare.setenv(FEDJAX.variable, "/nowhere/python")
    own, pfl, fedjax, flower = rivals.figures("none")
    assert own.unit == "ms" and own.value > 0 and "after 3 rounds" in own.note
    assert pfl.note == "not measured: ISTHMUS_PFL does not name the Python of its environment"
    assert fedjax.note == (
        "not measured: ISTHMUS_FEDJAX names /nowhere/python, which does not exist"
    )
    assert flower.note == "not measured: ray is not installed (extra ray)"
    for figure in (pfl, fedjax, flower):
        assert figure.holds is None and figure.note in figure.name


def test_a_python_without_the_library_says_so(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv(FEDJAX.variable, sys.executable)
    if importlib.util.find_spec("fedjax") is not None:
        pytest.skip("fedjax is here")
    work = tmp_path / "work.npz"
    np.savez(work, x=np.zeros(1))
    other = Other(rivals.command_of(FEDJAX, work), tmp_path / "log")
    try:
        with pytest.raises(Absent, match=r"^ModuleNotFoundError: No module named 'fedjax'$"):
            other.play(1)
    finally:
        other.close()


def test_ratios_are_of_blocks_taken_in_turns() -> None:
    def played(*seconds: float, accuracy: float = 0.9) -> list[Played]:
        return [Played(s, accuracy, 1.0) for s in seconds]

    blocks = {
        "isthmus": played(1.0, 2.0, 4.0),
        PFL.name: played(7.0, 12.0, 20.0),
        FEDJAX.name: played(3.0, 3.0, 3.0),
        FLOWER.name: played(90.0, 90.0, 400.0, accuracy=0.84),
    }
    *ms, pfl, fedjax, flower = rivals._told(blocks, {})
    assert [f.value for f in ms] == [1e3 * s / rivals.ROUNDS for s in (2.0, 12.0, 3.0, 90.0)]
    assert (pfl.value, pfl.holds, pfl.goal) == (6.0, True, "at least 5 x")
    assert (fedjax.value, fedjax.holds, fedjax.goal) == (1.5, False, "at least 2 x")
    assert flower.value == 90.0 and flower.holds is False  # faster, but of something else
    assert flower.note == "not comparable: it learned less (0.840)"


def test_the_work_is_what_our_clients_have(tmp_path: Path) -> None:
    fed = fedavg_on_digits(10, "none", tmp_path)
    rivals.write(tmp_path / "work.npz", fed)
    work = np.load(tmp_path / "work.npz")
    assert len(work["starts"]) == CLIENTS + 1
    for client in (0, 41, 99):
        rows = fed.ground.owned.rows(client)
        start, stop = work["starts"][client : client + 2]
        assert np.array_equal(work["x"][start:stop], fed.ground.columns["x"][rows].flatten(1))
        assert np.array_equal(work["y"][start:stop], fed.ground.columns["y"][rows])
    assert float(work["lr"]) == np.float32(LR) and int(work["batch"]) == 10
    played = rivals.ours(fed, tmp_path / "work.npz")(1)
    fed.ledger.close()
    assert 0.0 < played.moved < 1.0 and 0.0 <= played.accuracy <= 1.0


def test_flowers_client_takes_one_epoch(tmp_path: Path) -> None:
    """With all items in one batch an epoch is one gradient step, whatever the order."""
    pytest.importorskip("flwr")
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

    from isthmus.bench.elsewhere import with_flower
    from isthmus.federated.flower import internals, ready

    ready()
    path = tmp_path / "work.npz"
    fed = fedavg_on_digits(10, "none", tmp_path)
    rivals.write(path, fed, batch=50)
    fed.ledger.close()
    work = {n: torch.as_tensor(x) for n, x in np.load(path).items()}
    first = [work[name] for name in with_flower.NAMES]
    context = Context(1, 5, {"partition-id": 3, "num-partitions": CLIENTS}, RecordDict(), {})
    threads = torch.get_num_threads()
    with internals.identity(1):
        arrays = ArrayRecord([x.numpy() for x in first])
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
        reply = with_flower.fit(str(path), Message(content, 5, "train"), context)
    torch.set_num_threads(threads)
    start, stop = work["starts"][3:5].tolist()
    leaves = [x.clone().requires_grad_() for x in first]
    hidden = (work["x"][start:stop] @ leaves[0].T + leaves[1]).relu()
    loss = F.cross_entropy(hidden @ leaves[2].T + leaves[3], work["y"][start:stop])
    for x, d, got in zip(
        first,
        torch.autograd.grad(loss, leaves),
        reply.content["arrays"].to_numpy_ndarrays(),
        strict=True,
    ):
        assert torch.allclose(torch.as_tensor(got), x - LR * d, atol=1e-7)
    assert reply.content["metrics"]["num-examples"] == stop - start


def moved(work: Any) -> float:
    """How far a round of all clients goes in which each takes one step on all of its items: that
    of the mean gradient over all items."""
    x, y = torch.as_tensor(work["x"]), torch.as_tensor(work["y"])
    w1, b1, w2, b2 = leaves = [
        torch.as_tensor(work[name]).requires_grad_() for name in ("w1", "b1", "w2", "b2")
    ]
    loss = F.cross_entropy((x @ w1.T + b1).relu() @ w2.T + b2, y)
    return LR * float(torch.stack([g.norm() for g in torch.autograd.grad(loss, leaves)]).norm())


def test_our_round_is_the_step_of_the_mean_gradient(tmp_path: Path) -> None:
    fed = fedavg_on_digits(CLIENTS, "none", tmp_path, batch=0)
    rivals.write(tmp_path / "work.npz", fed)
    played = rivals.ours(fed, tmp_path / "work.npz")(1)
    fed.ledger.close()
    assert played.moved == pytest.approx(moved(np.load(tmp_path / "work.npz")), rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rival", RIVALS, ids=lambda r: r.program)
def test_a_rivals_round_is_the_step_of_the_mean_gradient(rival: Any, tmp_path: Path) -> None:
    """With all clients and whole batches (12 items each) nothing is left to chance."""
    fed, path = fedavg_on_digits(CLIENTS, "none", tmp_path), tmp_path / "work.npz"
    fed.ledger.close()
    rivals.write(path, fed, cohort=CLIENTS, batch=12)
    work = dict(np.load(path))
    rows = (work["starts"][:-1, None] + np.arange(12)).ravel()
    starts = np.arange(CLIENTS + 1) * 12
    np.savez(path, **{**work, "x": work["x"][rows], "y": work["y"][rows], "starts": starts})
    try:
        other = Other(rivals.command_of(rival, path), tmp_path / "log")
    except Absent as reason:
        pytest.skip(str(reason))
    try:
        first, second = other.play(1), other.play(40)
    finally:
        other.close()
    assert first.moved == pytest.approx(moved(np.load(path)), rel=1e-4)
    assert second.moved > 5 * first.moved and second.accuracy > first.accuracy
