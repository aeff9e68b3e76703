"""A run cut short at any instant ends in the bits, rows and states of one that was not."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.federated import tiny

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.run import api, checkpoint
from isthmus.run.config import Config

TASK = tiny.task((5, 14, 9, 3), torch.float32, dropout=0.2)
ROUNDS = 6
KINDS: dict[str, dict[str, Any]] = {
    "scaffold": {},
    "scaffold with feedback": {"codec": "topk:0.2", "feedback": True},
    "fedmomentum": {"settings": {"tau": 1.0, "rank": 1}},
    "krum": {"method": "fedadam", "selector": "multi-krum:f=0", "clip": 0.1},
    "lossy": {"method": "scaffold", "link": "lte,loss=0.3,attempts=2", "privacy": "local",
              "noise": 8.0, "clip": 1.0, "public": ("examples",)},
}  # fmt: skip


def configured(kind: str, **more: Any) -> Config:
    keys = {"method": kind.partition(" ")[0], **KINDS.get(kind, {}), **more}
    executor = {"executor": "vectorised", "compile": "none"}
    given = {"clients": 4, "cohort": 3, "rounds": ROUNDS, "epochs": 2, **executor, **keys}
    return tiny.config(given.pop("method"), **given)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "environment.json"
    }


def same(a: Path, b: Path) -> None:
    one, two = files(a), files(b)
    assert one.keys() == two.keys()
    for name in ("checkpoint.safetensors", "metrics.jsonl", "ledger.jsonl", "config.yaml"):
        assert name in one
    assert [name for name, data in one.items() if data != two[name]] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an undisturbed run of a kind, played once."""
    made: dict[str, Path] = {}

    def play(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole") / "run"
            api.start(configured(kind), made[kind], task=TASK)
        return made[kind]

    return play


class Stop(Exception):
    pass


def stopped(config: Config, out: Path, after: int, task: Any = TASK) -> None:
    """A run that ends in the middle, one round after its last checkpoint at `after`."""

    def watch(report: Any, rows: Any) -> None:
        if report.round == after:
            raise Stop

    with pytest.raises(Stop):
        api.start(config, out, watch, task)


@pytest.mark.parametrize("name", catalogue.names("method"))
def test_every_method_resumes(name: str, tmp_path: Path) -> None:
    config = configured(name, method=name, rounds=3, checkpoint=2, epochs=1)
    api.start(config, tmp_path / "whole", task=TASK)
    stopped(config, tmp_path / "cut", 3)
    assert (tmp_path / "cut/ledger.jsonl").stat().st_size > 0
    run = api.resume(tmp_path / "cut", task=TASK)
    same(tmp_path / "whole", tmp_path / "cut")
    assert [r["round"] for r in run.metrics if r["scope"] == "global"] == [0, 1, 2, 3]


def test_more_than_ten_versions_of_the_base_keep_their_order(tmp_path: Path) -> None:
    """The checkpoint's own format sorts by name, where version 10 comes before 2."""
    wide = tiny.task((3, 4), torch.float64, module=lambda seed: tiny.net(seed).double())
    config = configured("fedmomentum", clients=2, cohort=1, rounds=14, seed=1, lr=0.5,
                        settings={"tau": 1.0, "rank": 1, "targets": ("lower",)})  # fmt: skip
    api.start(config, tmp_path / "whole", task=wide)
    stopped(config, tmp_path / "cut", 12, wide)
    api.resume(tmp_path / "cut", task=wide)
    same(tmp_path / "whole", tmp_path / "cut")


def grown(folder: Path) -> int:
    names = ("ledger.jsonl", "metrics.jsonl", "clients.bin")
    return sum((folder / n).stat().st_size for n in names if (folder / n).exists())


def killed(config: Config, out: Path, size: int, delay: float) -> bool:
    """Play a run in a process of its own; SIGKILL it once its files have grown to `size` bytes.

    True when it was killed before its end.
    """
    child = os.fork()
    if child == 0:
        try:
            api.start(config, out, task=TASK)
        finally:
            os._exit(0)
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        done, _ = os.waitpid(child, os.WNOHANG)
        if done:
            return False
        if (out / "config.yaml").exists() and grown(out) >= size:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.WIFSIGNALED(status)
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the run did not end")


def kill_and_resume(kind: str, number: int, whole: Path, out: Path) -> bool:
    rng = np.random.default_rng(number)
    size = 0 if number % 7 == 3 else int(rng.integers(1, grown(whole)))
    cut = killed(configured(kind), out, size, float(rng.uniform(0, 0.02)))
    if rng.random() < 0.3:  # killed again while it continues
        child = os.fork()
        if child == 0:
            try:
                api.resume(out, task=TASK)
            finally:
                os._exit(0)
        time.sleep(float(rng.uniform(0, 0.1)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    api.resume(out, task=TASK)
    same(whole, out)
    return cut


@pytest.mark.parametrize("number", range(5))
def test_killed_at_a_random_instant(
    number: int, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    kind = list(KINDS)[number]
    kill_and_resume(kind, number, undisturbed(kind), tmp_path / "cut")


@pytest.mark.slow
def test_killed_fifty_times(undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    cut = 0
    for number in range(100, 150):
        kind = list(KINDS)[number % len(KINDS)]
        cut += kill_and_resume(kind, number, undisturbed(kind), tmp_path / str(number))
    assert cut > 40


def test_resuming_a_finished_run_changes_nothing(
    undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    config = configured("scaffold")
    api.start(config, tmp_path / "run", task=TASK)
    again = api.resume(tmp_path / "run", task=TASK)
    same(undisturbed("scaffold"), tmp_path / "run")
    assert again.metrics[-1]["round"] == ROUNDS


@pytest.mark.parametrize("name", ["environment.json", "checkpoint.safetensors"])
def test_a_half_written_file_is_taken_away(name: str, tmp_path: Path) -> None:
    """Killed while a file was written beside the one it is to replace."""
    stopped(configured("scaffold", checkpoint=3), tmp_path / "run", 4)
    half = tmp_path / "run" / f"{name}.new"
    half.write_bytes(b"{")
    api.resume(tmp_path / "run", task=TASK)
    assert not half.exists()


def test_a_torn_tail_is_cut_off(undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    config = configured("scaffold", checkpoint=3)
    stopped(config, tmp_path / "run", 4)
    for name in ("ledger.jsonl", "metrics.jsonl", "clients.bin"):
        with open(tmp_path / "run" / name, "ab") as file:
            file.write(b'{"id": 7, "half a li')
    api.resume(tmp_path / "run", task=TASK)
    whole, cut = files(undisturbed("scaffold")), files(tmp_path / "run")
    for name in ("ledger.jsonl", "metrics.jsonl", "clients.bin", "checkpoint.safetensors"):
        assert whole[name] == cut[name]


def test_compaction_keeps_every_state(
    undisturbed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.federated import store

    monkeypatch.setattr(store, "_WORTH_COMPACTING", 1)
    monkeypatch.setattr(store.ClientStore, "worth_compacting", property(lambda s: len(s) > 2))
    stopped(configured("scaffold"), tmp_path / "run", 4)
    assert [p.name for p in (tmp_path / "run").glob("clients*.bin")] == ["clients-4.bin"]
    run = api.resume(tmp_path / "run", task=TASK)
    assert [p.name for p in (tmp_path / "run").glob("clients*.bin")] == ["clients-6.bin"]
    assert files(tmp_path / "run")["ledger.jsonl"] == files(undisturbed("scaffold"))["ledger.jsonl"]
    assert run.final == api.start(configured("scaffold"), task=TASK).final


def one_line(caught: pytest.ExceptionInfo[InputError]) -> None:
    assert "\n" not in str(caught.value) and "allowed: " in str(caught.value)


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    stopped(configured("fedavg", method="fedavg"), tmp_path / "run", 2)
    before = files(tmp_path / "run")

    def other(width: int) -> Any:
        return tiny.task((5, 14, 9, 3), torch.float32, module=lambda seed: _other(width))

    with pytest.raises(
        InputError, match=r"resume: \[9, 6\] for shared//features.lower.weight"
    ) as e:
        api.resume(tmp_path / "run", task=other(8))
    one_line(e)
    stopped(configured("scaffold"), tmp_path / "kept", 2)
    with pytest.raises(InputError, match="store: ") as e:
        api.resume(tmp_path / "kept", task=other(8))
    one_line(e)
    assert {n: d for n, d in files(tmp_path / "run").items() if n in before} == before


def _other(width: int) -> Any:
    from torch import nn

    from isthmus.models.nets import Net, initialise

    lower = nn.Sequential()
    lower.add_module("lower", nn.Linear(6, width))
    return initialise(Net(lower, nn.Linear(width, 4)), 0)


def test_a_checkpoint_of_another_method_or_population_is_one_line(tmp_path: Path) -> None:
    stopped(configured("fedavg", method="fedavg"), tmp_path / "run", 2)
    path = tmp_path / "run/config.yaml"
    text = path.read_text()
    path.write_text(text.replace("method: fedavg", "method: fedavgm"))
    with pytest.raises(InputError, match=r"resume: no tensor m//features.lower.weight given") as e:
        api.resume(tmp_path / "run", task=TASK)
    one_line(e)
    path.write_text(text.replace("clients: 4", "clients: 3").replace("natural", "iid"))
    with pytest.raises(InputError, match="resume: 4 clients given, allowed: 3") as e:
        api.resume(tmp_path / "run", task=TASK)
    one_line(e)


@pytest.mark.parametrize("damage", ["cut", "junk", "empty", "foreign", "no order"])
def test_a_damaged_checkpoint_is_one_line(damage: str, tmp_path: Path) -> None:
    stopped(configured("fedavg", method="fedavg"), tmp_path / "run", 1)
    path = tmp_path / "run/checkpoint.safetensors"
    data = path.read_bytes()
    if damage == "foreign":
        save_file({"w": torch.zeros(2)}, str(path))
    elif damage == "no order":
        about = '{"format": 1, "round": 1}'
        save_file({"w": torch.zeros(2)}, str(path), metadata={"isthmus": about})
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "junk": b"x" * 99, "empty": b""}[damage])
    with pytest.raises(InputError, match=r"resume: checkpoint\.safetensors given") as e:
        api.resume(tmp_path / "run", task=TASK)
    one_line(e)


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run: .* given, allowed: a run folder") as e:
        api.resume(tmp_path / "nothing")
    one_line(e)
    stopped(configured("scaffold"), tmp_path / "run", 2)
    os.truncate(tmp_path / "run/ledger.jsonl", 10)
    with pytest.raises(InputError, match=r"resume: ledger.jsonl with 10 bytes given") as e:
        api.resume(tmp_path / "run", task=TASK)
    one_line(e)


def test_the_checkpoint_holds_what_it_says(tmp_path: Path) -> None:
    stopped(configured("scaffold"), tmp_path / "run", 2)
    about, tensors = checkpoint.read(tmp_path / "run")
    assert about["round"] == 2 and about["order"] == list(tensors)
    for name, length in about["lengths"].items():
        assert (tmp_path / "run" / name).stat().st_size >= length > 0
    with safe_open(str(tmp_path / "run/checkpoint.safetensors"), "pt") as file:
        assert set(file.keys()) == set(tensors)
    nested = checkpoint.nest(tensors)
    assert checkpoint.flat(nested) == tensors
    assert set(nested) == {"state", "versions", "journal"}
    assert about["journal"] == {"schedule": {}}


class Full:
    """A file on a disk that is full after half of what is written."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def test_a_full_disk_keeps_the_last_checkpoint(
    undisturbed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        nonlocal written
        file = builtins.open(path, mode, *rest, **more)  # noqa: SIM115
        if "checkpoint" not in str(path) or "w" not in mode:
            return file
        written += 1
        return Full(file) if written > 3 else file  # rounds 0, 1 and 2 fit

    monkeypatch.setattr(checkpoint, "open", opened, raising=False)
    with pytest.raises(
        InputError, match=r"checkpoint: .*No space left.*last checkpoint is kept"
    ) as e:
        api.start(configured("scaffold"), tmp_path / "run", task=TASK)
    one_line(e)
    monkeypatch.undo()
    assert checkpoint.read(tmp_path / "run")[0]["round"] == 2
    assert not list((tmp_path / "run").glob("*.new"))
    api.resume(tmp_path / "run", task=TASK)
    same(undisturbed("scaffold"), tmp_path / "run")


def test_a_full_disk_elsewhere_is_one_line_too(
    undisturbed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.federated import store

    def full(file: int, data: bytes, at: int) -> None:
        if at > 3000:
            os.pwrite(file, data[: len(data) // 2], at)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data, at)

    write = store._write
    monkeypatch.setattr(store, "_write", full)
    with pytest.raises(InputError, match=r"out: .*No space left.*resumed from its last") as e:
        api.start(configured("scaffold"), tmp_path / "run", task=TASK)
    one_line(e)
    monkeypatch.undo()
    api.resume(tmp_path / "run", task=TASK)
    same(undisturbed("scaffold"), tmp_path / "run")


def large_task() -> Any:
    """A model whose checkpoint outweighs every other file of the run."""
    return tiny.task((4, 5), torch.float32, module=lambda seed: _other(2000))


def test_a_limit_on_file_sizes_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    config = configured("fedavg", method="fedavg", clients=2, cohort=2)
    api.start(config, tmp_path / "whole", task=large_task())
    child = os.fork()
    if child == 0:
        status = 1
        try:

            def watch(report: Any, rows: Any) -> None:
                if report.round == 2:
                    size = (tmp_path / "run/checkpoint.safetensors").stat().st_size
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

            api.start(config, tmp_path / "run", watch, large_task())
        except InputError as error:
            status = 7 if str(error).startswith("checkpoint: ") else 1
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended) == 7
    assert checkpoint.read(tmp_path / "run")[0]["round"] == 2
    api.resume(tmp_path / "run", task=large_task())
    same(tmp_path / "whole", tmp_path / "run")


@pytest.fixture(autouse=True)
def _no_children_left() -> Iterator[None]:
    yield
    with contextlib.suppress(ChildProcessError):  # a pool's tracker, alive, may be another's
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)
