"""Data that are missing and disks that are full: one line, or a run that goes on."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from tests.run.test_resume import TASK, configured, files, one_line, same, undisturbed

from isthmus import cli, tree
from isthmus.errors import InputError
from isthmus.federated.score import score
from isthmus.run import api
from isthmus.run.folder import METRICS, Folder
from isthmus.tasks.contract import Items, Splits, Task
from isthmus.wire.ledger import Ledger

__all__ = ["undisturbed"]  # a fixture

# -- clients without data -------------------------------------------------------------------


def test_a_partition_that_gives_a_client_nothing_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "train --clients 60 --partition dirichlet:0.01,minimum=0 --rounds 1"
    assert cli.main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "isthmus: partition: dirichlet:0.01,minimum=0 given" in said
    assert "one that gives client" in said and "minimum=1" in said


def test_more_clients_than_owners_or_items_is_one_line() -> None:
    task = tiny.task((4, 6))
    with pytest.raises(InputError, match="clients: 3 given, allowed: 2 or fewer, the number") as e:
        tiny.built("fedavg", task, clients=3)
    one_line(e)
    with pytest.raises(InputError, match="minimum: 1 given, allowed: 0 or less: 10 items") as e:
        tiny.built("fedavg", task, clients=11, partition="iid")
    one_line(e)


def test_a_client_with_one_item_trains_on_it() -> None:
    """One item each: it is trained on, and nobody is tested on it."""
    lonely = tiny.task((1, 1), data=tiny.data((1, 1), torch.float64))
    whole = lonely.synthesise()
    one = Splits(whole.train, whole.val.take([]), whole.test.take([]))
    lonely.synthesise = lambda seed=0, size="small": one  # type: ignore[method-assign]
    built = tiny.built("fedavg", lonely, clients=2, holdout=0.9)
    assert [len(part) for part in built.clients.parts] == [1, 1]
    assert built.clients.tests is not None and not any(map(len, built.clients.tests))


def owners(train: dict[str, int], test: dict[str, int]) -> Task:
    """A task whose owners have these numbers of items for training and for testing."""
    task = tiny.task((sum(train.values()),))
    x, y = tiny.data((sum(train.values()) + sum(test.values()),), torch.float64)

    def items(first: int, held: dict[str, int]) -> Items:
        names = [name for name, n in held.items() for _ in range(n)]
        rows = slice(first, first + len(names))
        return Items({"x": x[rows], "y": y[rows]}, names)

    made = items(0, train), items(0, {}), items(sum(train.values()), test)
    splits = Splits(*made)
    task.synthesise = lambda seed=0, size="small": splits  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize("method", ["fedavg", "fedper"])
def test_a_client_without_test_items_trains_and_is_not_scored(method: str) -> None:
    """And an owner who has test items alone is no client; nothing is NaN."""
    task = owners({"a": 7, "b": 5, "c": 9}, {"a": 4, "c": 3, "z": 6})
    built = tiny.built(method, task, clients=3)
    fed = built.federation
    assert fed.step().accepted == [0, 1, 2]
    assert built.clients.tests is not None
    assert [len(part) for part in built.clients.tests] == [4, 0, 3]
    rows = list(score(fed, built.task, built.clients.scored, built.clients.tests, "test"))
    assert [row["scope"] for row in rows] == ["global", "client/a", "client/c"]
    mean = (4 * rows[1]["accuracy"] + 3 * rows[2]["accuracy"]) / 7
    assert rows[0]["accuracy"] == pytest.approx(mean)
    assert all(math.isfinite(row[name]) for row in rows for name in ("accuracy", "loss"))


# -- classes that somebody, or everybody, lacks ----------------------------------------------

PER_CLASS = ["fedproto", "gpfl", "dbe", "fedrod", "moon", "fedavg-ft", "moe-customisation"]
PER_CLASS += ["curriculum-fl", "fedsynsam", "dynafed", "forward-forward", "drtp"]


def lacking(absent: tuple[int, ...]) -> Task:
    """Client i has one class alone, and nobody has the `absent`; the test items have all four."""
    there = [c for c in range(tiny.CLASSES) if c not in absent]
    sizes = (5, 12, 3, 9)
    x, _ = tiny.data(sizes, torch.float64)
    y = torch.tensor([there[i % len(there)] for i, n in enumerate(sizes) for _ in range(n)])
    task = tiny.task(sizes, data=(x, y))
    every = torch.arange(20) % tiny.CLASSES
    test = Items({"x": x[:20] + 0.1, "y": every}, ["somebody"] * 20)
    splits = task.synthesise()._replace(test=test)
    task.synthesise = lambda seed=0, size="small": splits  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize("name", PER_CLASS)
def test_classes_that_are_missing_leave_no_nan(name: str) -> None:
    """Class 2 in the middle and class 3 at the end belong to nobody."""
    task = lacking((2, 3))
    built = tiny.built(name, task, clients=4, cohort=3, executor="vectorised")
    other = tiny.federation(name, task, clients=4, cohort=3)
    fed = built.federation
    for _ in range(2):
        report = fed.step()
        other.step()
        assert math.isfinite(report.loss)
    held = tiny.state(fed) | {f"kept/{n}": x for n, x in tiny.kept(fed).items()}
    assert all(bool(torch.isfinite(x).all()) for x in held.values() if x.is_floating_point())
    assert tiny.apart(tiny.state(fed), tiny.state(other)) < 1e-9
    rows = list(score(fed, built.task, built.clients.scored, built.clients.tests, "test"))
    assert all(0.0 <= row["accuracy"] <= 1.0 and math.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize(
    "schedule", ["oort", "tifl:tiers=2", "power-of-choice:d=3", "mobility:mobile=1"]
)
def test_selections_do_not_mind_missing_classes(schedule: str) -> None:
    cohort = 4 if schedule.startswith("mobility") else 2
    fed = tiny.play("fedavg", lacking((2, 3)), 3, clients=4, cohort=cohort, schedule=schedule)
    assert all(bool(torch.isfinite(x).all()) for x in tiny.state(fed).values())


def test_a_partition_by_shards_leaves_classes_out_and_is_learned_all_the_same() -> None:
    run = api.train(
        "digits", "fedproto", model="tiny", clients=6, partition="shards:1", rounds=2, steps=5,
        holdout=0.3, evaluate=0,
    )  # fmt: skip
    scores = [row["accuracy"] for row in run.metrics]
    assert np.isfinite(scores).all() and run.accuracy > 0.5  # one or two classes each


# -- a disk that is full ---------------------------------------------------------------------


class Full:
    """A file in which `room` bytes more have a place."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.file.write(data[: self.room])
        self.room -= len(data)
        if self.room < 0:
            self.room = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("which", ["ledger", "metrics"])
def test_a_full_disk_under_ledger_or_metrics_is_one_line_and_resumed(
    which: str, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(undisturbed("scaffold"))
    room = len(whole["ledger.jsonl" if which == "ledger" else METRICS]) // 2

    if which == "ledger":
        begin = Folder.ledger

        def ledger(folder: Folder) -> Ledger:
            made = begin(folder)
            made._file = Full(made._file, room)  # type: ignore[assignment]
            return made

        monkeypatch.setattr(Folder, "ledger", ledger)
    else:
        start = Folder.begin

        def begun(folder: Folder, *given: Any) -> None:
            start(folder, *given)
            folder._metrics = Full(folder._metrics, room)

        monkeypatch.setattr(Folder, "begin", begun)
    with pytest.raises(InputError, match=r"out: .*No space left.*resumed from its last") as e:
        api.start(configured("scaffold"), tmp_path / "run", task=TASK)
    one_line(e)
    monkeypatch.undo()
    run = api.resume(tmp_path / "run", task=TASK)
    same(undisturbed("scaffold"), tmp_path / "run")
    assert [row["round"] for row in run.metrics if row["scope"] == "global"] == list(range(7))


def test_a_client_that_vanishes_changes_nothing_but_time_and_work() -> None:
    """The others' mean, to the bit; it keeps what it had, and has sent nothing."""
    task = tiny.task((5, 14, 9, 3))
    fed = tiny.federation("scaffold", task, dropout=0.4, seed=2)
    gone = 0
    for _ in range(4):
        before, report = tiny.kept(fed), fed.step()
        rows = [row for row in fed.ledger.rows() if row["round"] == fed.round]
        trained = {row["from"] for row in rows if row["kind"] == "train"}
        sent = {row["from"] for row in rows if row["kind"] == "update"}
        assert len(trained) == 4 and sent == {f"client/{c:03d}" for c in report.accepted}
        for client in set(range(4)) - set(report.accepted):
            gone += 1
            assert tree.equal(tree.row(before, client), tree.row(tiny.kept(fed), client))
    assert gone > 2
