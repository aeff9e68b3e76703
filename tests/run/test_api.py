"""A run as people start it: what it scores, what it leaves behind, what it loads again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from torch import nn

import isthmus
from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.score import evaluate, model_of, recalibrated, rows_at_once, score
from isthmus.models.bind import bind, tensors_of
from isthmus.run import api
from isthmus.tasks.contract import Items, Task
from isthmus.tasks.metrics import Accuracy

KEYS: dict[str, Any] = {
    "partition": "natural",
    "clients": 3,
    "rounds": 3,
    "batch": 8,
    "compile": "none",
}


def separable(module: Any = None, sizes: tuple[int, ...] = (20, 31, 9)) -> Task:
    """Four classes that a linear map can tell apart."""
    x, y = tiny.data(sizes, torch.float32)
    x = x + 3.0 * torch.nn.functional.one_hot(y, tiny.WIDE)
    return tiny.task(sizes, torch.float32, module=module, data=(x, y))


def test_a_run_learns_and_reports(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run = isthmus.train(
        separable(), "fedavg", **KEYS, lr=0.5, epochs=3, out=tmp_path / "run",
        watch=lambda report, rows: seen.append((report.round, len(rows))),
    )  # fmt: skip
    first = next(row for row in run.metrics if row["scope"] == "global")
    assert run.accuracy == run.final["accuracy"] > max(first["accuracy"] + 0.2, 0.8)
    assert seen == [(0, 1), (1, 1), (2, 1), (3, 1)] and not run.model.training
    assert run.bytes_up == run.ledger.total("bytes", kind="update") > 0
    assert run.bytes_down == run.ledger.total("bytes", kind="model") > 0
    assert run.seconds == run.metrics[-1]["t"] > 0 and "fedavg on own: accuracy" in str(run)
    folder = tmp_path / "run"
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "ledger.jsonl", "metrics.jsonl", "environment.json", "model"} <= names
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == run.metrics
    again = api.load(folder, run.task)
    assert tree.equal(tensors_of(again), tensors_of(run.model)) and not again.training
    with pytest.raises(InputError, match=r"out: .*a new or empty folder"):
        isthmus.train(separable(), "fedavg", **KEYS, out=folder)


def test_scores_are_the_metric_of_the_model(tmp_path: Path) -> None:
    task = separable()
    run = isthmus.train(task, "fedavg", **KEYS)
    test = task.synthesise().test
    with torch.no_grad():
        hits = run.model(test.columns["x"]).argmax(1) == test.columns["y"]
    assert run.final["accuracy"] == pytest.approx(float(hits.double().mean()), abs=1e-12)


@pytest.mark.parametrize(("every", "rounds"), [(0, [0, 5]), (2, [0, 2, 4, 5]), (1, list(range(6)))])
def test_when_a_run_is_scored(every: int, rounds: list[int]) -> None:
    run = isthmus.train(separable(), "fedavg", **{**KEYS, "rounds": 5, "evaluate": every})
    assert [row["round"] for row in run.metrics if row["scope"] == "global"] == rounds


def test_personal_models_are_scored_each_on_its_own() -> None:
    task = separable()
    run = isthmus.train(task, "local-only", **KEYS, lr=0.5)
    last = [row for row in run.metrics if row["round"] == 3]
    assert [row["scope"] for row in last] == ["global", "client/000", "client/001", "client/002"]
    fed = tiny.play("local-only", task, 3, lr=0.5)
    test = task.synthesise().test
    shares = []
    for client, row in enumerate(last[1:]):
        model = bind(fed.ground.module, tree.row(tiny.kept(fed), client))
        with torch.no_grad():
            hits = model(test.columns["x"]).argmax(1) == test.columns["y"]
        shares.append(float(hits.double().mean()))
        assert row["accuracy"] == pytest.approx(shares[-1], abs=1e-12)
    assert last[0]["accuracy"] == pytest.approx(np.mean(shares), abs=1e-12)
    assert len(set(shares)) > 1


def test_owners_of_test_items_are_scored_on_their_own() -> None:
    task: Any = separable()
    train = task.synthesise().train
    test = Items(
        {n: x[[0, 1, 2, 25, 26]] for n, x in train.columns.items()}, ["000"] * 3 + ["001"] * 2
    )
    task._test = test
    run = isthmus.train(task, "fedavg", **KEYS, lr=0.5)
    last = {row["scope"]: row for row in run.metrics if row["round"] == 3}
    assert set(last) == {"global", "client/000", "client/001"}  # the third has none
    mean = (3 * last["client/000"]["accuracy"] + 2 * last["client/001"]["accuracy"]) / 5
    assert last["global"]["accuracy"] == pytest.approx(mean, abs=1e-12)


def test_scoring_in_pieces_is_scoring_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.federated import score as module

    fed = tiny.play("fedavg", separable(), 1)
    task = separable()
    test = task.synthesise().test
    given = (task, fed.method, fed.ground.module, model_of(fed, {}), test, {})
    whole = evaluate(*given)
    monkeypatch.setattr(module, "BATCH", 7)
    parts = evaluate(*given)
    assert rows_at_once(test) == 7 and float(parts.pop("loss")) == pytest.approx(
        float(whole.pop("loss")), 1e-6
    )
    assert tree.equal(parts, whole)
    tokens = Items({"x": torch.zeros(9, 1000, dtype=torch.int64)})
    assert (
        rows_at_once(tokens) == 4 and rows_at_once(Items({"x": torch.zeros(3, 10**5).long()})) == 1
    )


def test_dropout_is_off_while_scoring() -> None:
    task = tiny.task((20, 31), torch.float32, dropout=0.5)
    fed = tiny.play("fedavg", task, 1)
    test = task.synthesise().test
    rows = [list(score(fed, task, test, None, "test")) for _ in range(2)]
    assert rows[0] == rows[1]
    plain = tiny.task((20, 31), torch.float32)
    bare = evaluate(plain, fed.method, plain.build(), model_of(fed, {}), test, {})
    assert rows[0][0] == {**rows[0][0], **Accuracy().finish(bare)}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lower = nn.BatchNorm1d(tiny.WIDE), nn.Linear(tiny.WIDE, 9)
        self.deep, self.head = nn.BatchNorm1d(9), nn.Linear(9, tiny.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.deep(self.lower(self.norm(50.0 + 20.0 * x)))))


STATISTICS = [f"{layer}.{n}" for layer in ("norm", "deep") for n in ("running_mean", "running_var")]


def test_batch_normalisation_trains_scores_and_is_kept(tmp_path: Path) -> None:
    task = separable(Normed, (20, 31, 10))
    run = isthmus.train(
        task, "fedavg", **{**KEYS, "rounds": 4}, lr=0.3, epochs=3, out=tmp_path / "r"
    )
    assert run.accuracy > 0.8
    own, start = tensors_of(run.model), tensors_of(Normed())
    x = task.synthesise().train.columns["x"]
    parts = (50.0 + 20.0 * x).split([20, 31, 10])
    mean = sum(len(p) * p.mean(0) for p in parts) / 61
    var = sum(len(p) * p.var(0) for p in parts) / 61
    torch.testing.assert_close(own["norm.running_mean"], mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own["norm.running_var"], var, rtol=1e-4, atol=1e-4)
    assert int(own["norm.num_batches_tracked"]) == 3
    with torch.no_grad():
        test = task.synthesise().test
        hits = run.model(test.columns["x"]).argmax(1) == test.columns["y"]
    assert run.final["accuracy"] == pytest.approx(float(hits.double().mean()), abs=1e-12)
    assert tree.equal(tensors_of(api.load(tmp_path / "r", task)), own)
    stale = bind(run.model, {n: start[n] for n in STATISTICS}).eval()
    with torch.no_grad():
        wrong = stale(test.columns["x"]).argmax(1) == test.columns["y"]
    assert float(wrong.double().mean()) < run.accuracy - 0.2


def test_statistics_cross_in_no_message_and_personal_ones_are_the_clients_own() -> None:
    task = separable(Normed, (20, 31, 10))
    fed = tiny.play("fedavg", task, 1)
    floats = sum(p.numel() for p in Normed().parameters())
    assert fed.ledger.total("values", kind="update") == 3 * floats * 4
    alone = tiny.play("local-only", task, 1)
    kept = tree.row(tiny.kept(alone), 1)
    got = recalibrated(alone, task, model_of(alone, kept), [1])
    x = 50.0 + 20.0 * tiny.owned(task, 1).columns["x"]
    torch.testing.assert_close(got["norm.running_mean"], x.mean(0), rtol=1e-5, atol=1e-4)
    assert tree.equal({n: got[n] for n in kept}, kept)


@pytest.mark.parametrize("method", ["fedmomentum", "fedit", "local-lora"])
def test_adapters_are_saved_and_loaded(method: str, tmp_path: Path) -> None:
    task = separable()
    settings = {"rank": 2, "targets": tiny.LAYERS}
    run = isthmus.train(
        task, method, **KEYS, settings=settings, lr=0.3, out=tmp_path / "run", codec="dense:fp32"
    )
    again = api.load(tmp_path / "run", task)
    x = task.synthesise().test.columns["x"]
    with torch.no_grad():
        torch.testing.assert_close(again(x), run.model(x), rtol=1e-6, atol=1e-6)
        moved = float((run.model(x) - task.build()(x)).abs().max())
    assert (moved > 1e-3) == (method != "local-lora")
    assert (tmp_path / "run/model/backbone.safetensors").exists() == (method == "fedmomentum")


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    before = torch.get_rng_state()
    a, b, c = (isthmus.train(separable(), "scaffold", **KEYS, seed=s) for s in (5, 5, 6))
    assert tree.equal(tensors_of(a.model), tensors_of(b.model)) and a.metrics == b.metrics
    assert list(a.ledger.rows()) == list(b.ledger.rows())
    assert not tree.equal(tensors_of(a.model), tensors_of(c.model))
    assert torch.equal(before, torch.get_rng_state())


def test_a_task_is_left_as_it_was() -> None:
    task = separable(tiny.net(0, 0.2))
    before = tree.clone(tensors_of(task._model))  # type: ignore[attr-defined]
    isthmus.train(task, "fedavg", **KEYS)
    assert tree.equal(tensors_of(task._model), before)  # type: ignore[attr-defined]
    assert any(isinstance(m, nn.Dropout) for m in task._model.modules())  # type: ignore[attr-defined]


def test_what_is_recorded_has_one_number_of_clients() -> None:
    """`auto` replays rounds of a fixed cohort, and not visits that come together as they happen."""
    chosen = [
        tiny.built("fedavg", tiny.task(), schedule=schedule, executor="auto", compile="auto").config
        for schedule in ("sync", "fedbuff:k=2")
    ]
    assert [(c.executor, c.compile) for c in chosen] == [
        ("vectorised", "trace"),
        ("vectorised", "none"),
    ]
