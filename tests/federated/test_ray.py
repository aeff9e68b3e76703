"""Cohorts over Ray's workers: the reference's results, also when workers die in mid-round."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.federated import tiny
from tests.federated.test_executors import mixed_ranks

from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.executors import ray as executor
from isthmus.federated.flower import quiet
from isthmus.federated.round import Federation

METHODS = ("fedavg", "scaffold", "fedmomentum")
KEYS: dict[str, Any] = {"cohort": 4, "workers": 2}


def moving(name: str) -> dict[str, Any]:
    """Settings with which FedMomentum folds something into the backbone in every round."""
    return {**mixed_ranks(name), **({"settings": {"tau": 1.0}} if name == "fedmomentum" else {})}


# -- without Ray: what is done when workers die --------------------------------------------


class Fake:
    """Ray's few functions in this process; the calls whose numbers are in `deaths` kill."""

    class exceptions:
        class RayActorError(Exception): ...

        WorkerCrashedError = NodeDiedError = ObjectLostError = OutOfMemoryError = RayActorError

        class RayTaskError(Exception):
            def __init__(self, cause: BaseException) -> None:
                self.cause = cause

    class cloudpickle:
        @staticmethod
        def register_pickle_by_value(module: Any) -> None: ...

    def __init__(self, deaths: set[int], cpus: int = 3) -> None:
        self.deaths, self.cpus, self.calls, self.workers = deaths, cpus, 0, 0
        self.sent: list[tuple[int, list[str]]] = []
        self.begun = False

    def is_initialized(self) -> bool:
        return self.begun

    def init(self, **options: Any) -> None:
        self.begun = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)}

    def put(self, given: Any) -> Any:
        return copy.deepcopy(given)

    def remote(self, kind: Any) -> Any:
        def start(given: Any) -> Any:
            self.workers += 1
            number, worker = self.workers, kind(copy.deepcopy(given))

            def run(part: Any, base: Any) -> Any:
                self.sent.append((number, list(base)))
                return lambda: worker.run(copy.deepcopy(part), copy.deepcopy(base))

            return SimpleNamespace(run=SimpleNamespace(remote=run))

        return SimpleNamespace(remote=start)

    def get(self, reference: Any) -> Any:
        self.calls += 1
        if self.calls in self.deaths:
            raise self.exceptions.RayActorError("killed")
        try:
            return reference()
        except Exception as error:
            raise self.exceptions.RayTaskError(error) from error


def spread(monkeypatch: pytest.MonkeyPatch, fake: Fake, name: str, rounds: int) -> Federation:
    monkeypatch.setattr(executor, "need", lambda module, extra: fake)
    keys = {"cohort": 4, "workers": 3, "executor": "ray", **moving(name)}
    return tiny.play(name, tiny.task(dropout=0.3), rounds, **keys)


@pytest.mark.parametrize("name", METHODS)
def test_parts_are_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(set())
    many = spread(monkeypatch, fake, name, 4)
    one = tiny.play(name, tiny.task(dropout=0.3), 4, cohort=4, **moving(name))
    assert tiny.apart(tiny.state(one), tiny.state(many)) <= 1e-9
    assert tiny.apart(tiny.kept(one), tiny.kept(many)) <= 1e-8
    assert (fake.workers, fake.calls) == (3, 12)


def test_a_dead_worker_costs_its_part_and_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successor has the backbone as it was at the start, and is sent all that changed."""
    calm = spread(monkeypatch, Fake(set()), "fedmomentum", 3)
    fake = Fake({5, 7})  # the second part of round 2, and then its successor
    struck = spread(monkeypatch, fake, "fedmomentum", 3)
    assert tree.equal(tiny.state(calm), tiny.state(struck))
    assert (fake.workers, fake.calls) == (3 + 2, 9 + 2)
    changed = set(fake.sent[3][1])
    assert changed and changed <= set(struck.method.base(struck.state))
    assert [(number, set(names)) for number, names in fake.sent] == [
        *((number, set()) for number in (1, 2, 3)),
        *((number, changed) for number in (1, 2, 3, 4, 5)),
        *((number, changed) for number in (1, 5, 3)),
    ]


def test_a_part_that_kills_every_worker_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(set(range(1, 100)))
    with pytest.raises(RuntimeError, match="5 workers died over the same part"):
        spread(monkeypatch, fake, "fedavg", 1)


def test_more_workers_than_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="workers: 3 given, allowed: 1 to 2"):
        spread(monkeypatch, Fake(set(), cpus=2), "fedavg", 1)


def test_an_input_error_comes_whole_out_of_another_process() -> None:
    error = copy.copy(InputError("workers", 3, "1 to 2", "two"))  # by `__reduce__`, as Ray does
    assert str(error) == "workers: 3 given, allowed: 1 to 2; nearest: two"
    assert (error.field, error.given, error.nearest) == ("workers", "3", "two")


# -- with Ray -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One local Ray for all tests of this file, and none afterwards."""
    quiet()
    ray = pytest.importorskip("ray")
    own = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False}
    ray.init(**own, logging_level="ERROR", runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    yield ray
    ray.shutdown()


def squared(marker: str) -> Any:
    """A loss that kills the first worker to compute it once the marker is set."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        try:
            os.rename(marker, f"{marker}.{os.getpid()}")
        except FileNotFoundError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
        wanted = targets[..., None] == torch.arange(tiny.CLASSES)
        return (outputs - wanted.to(outputs.dtype)).square().sum(-1)

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_several_processes_are_the_reference(name: str, ray: Any) -> None:
    task = tiny.task(dropout=0.3)
    keys = {**KEYS, **moving(name)}
    reference = tiny.play(name, task, 4, cohort=4, **moving(name))
    spread = tiny.play(name, task, 4, executor="ray", **keys)
    assert tiny.apart(tiny.state(reference), tiny.state(spread)) <= 1e-9
    assert tiny.apart(tiny.kept(reference), tiny.kept(spread)) <= 1e-8
    assert list(reference.ledger.rows()) == list(spread.ledger.rows())


@pytest.mark.slow
def test_a_worker_that_is_killed_in_mid_round_changes_no_bit(ray: Any, tmp_path: Path) -> None:
    marker = tmp_path / "die"
    task = tiny.task(loss=squared(str(marker)), dropout=0.3)
    keys = {**KEYS, "executor": "ray"}
    calm, struck = (tiny.federation("scaffold", task, **keys) for _ in range(2))
    for round in range(1, 4):
        calm.step()
        if round == 2:
            marker.touch()
        struck.step()
    killed = [path for path in tmp_path.iterdir() if path.name.startswith("die.")]
    assert len(killed) == 1 and int(killed[0].suffix[1:]) != os.getpid()
    assert tree.equal(tiny.state(calm), tiny.state(struck))
    assert tree.equal(tiny.kept(calm), tiny.kept(struck))
    assert list(calm.ledger.rows()) == list(struck.ledger.rows())


@pytest.mark.slow
def test_faults_of_a_visit_are_raised_as_they_are(ray: Any) -> None:
    def wrong(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if torch.get_num_threads() == 1 and os.getpid() != here:
            raise InputError("loss", "one that fails", "another")
        return outputs.square().sum(-1)

    here = os.getpid()
    fed = tiny.federation("fedavg", tiny.task(loss=wrong), executor="ray", **KEYS)
    with pytest.raises(InputError, match="one that fails"):
        fed.step()


@pytest.mark.slow
def test_a_method_from_a_file_reaches_the_workers(ray: Any, tmp_path: Path) -> None:
    source = "from isthmus.federated.method import Method\n\n\nclass Half(Method):\n" + (
        "    def finish(self, visit, params, down, carry, kept):\n"
        "        update, kept = super().finish(visit, params, down, carry, kept)\n"
        "        update.delta = {n: x / 2 for n, x in update.delta.items()}\n"
        "        return update, kept\n"
    )
    (tmp_path / "half.py").write_text(source)
    name = f"{tmp_path / 'half.py'}:Half"
    reference = tiny.play(name, tiny.task(), 2)
    spread = tiny.play(name, tiny.task(), 2, executor="ray", workers=2)
    assert tiny.apart(tiny.state(reference), tiny.state(spread)) <= 1e-9
