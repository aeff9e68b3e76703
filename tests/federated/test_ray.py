"""Cohorts over Ray's workers: the reference's results, also when workers die in mid-round."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federated import tiny
from tests.federated.test_executors import mixed_ranks

from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.flower import quiet

quiet()
ray = pytest.importorskip("ray")

METHODS = ("fedavg", "scaffold", "fedmomentum")
KEYS: dict[str, Any] = {"cohort": 4, "workers": 2}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One local Ray for all tests of this file, and none afterwards."""
    environment = {"OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_several_processes_are_the_reference(name: str) -> None:
    task = tiny.task(dropout=0.3)
    keys = {**KEYS, **mixed_ranks(name)}
    reference = tiny.play(name, task, 4, cohort=4, **mixed_ranks(name))
    spread = tiny.play(name, task, 4, executor="ray", **keys)
    assert tiny.apart(tiny.state(reference), tiny.state(spread)) <= 1e-9
    assert tiny.apart(tiny.kept(reference), tiny.kept(spread)) <= 1e-8
    assert list(reference.ledger.rows()) == list(spread.ledger.rows())


def squared(marker: str) -> Any:
    """A loss whose every worker but one dies the first time it is asked after the marker is set."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        try:
            os.rename(marker, f"{marker}.{os.getpid()}")
        except FileNotFoundError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
        wanted = torch.nn.functional.one_hot(targets, tiny.CLASSES).to(outputs.dtype)
        return (outputs - wanted).square().sum(-1)

    return loss


def test_a_worker_that_is_killed_in_mid_round_changes_no_bit(tmp_path: Path) -> None:
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


def test_faults_of_a_visit_are_raised_as_they_are() -> None:
    def wrong(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if torch.get_num_threads() == 1 and os.getpid() != here:
            raise InputError("loss", "one that fails", "another")
        return outputs.square().sum(-1)

    here = os.getpid()
    fed = tiny.federation("fedavg", tiny.task(loss=wrong), executor="ray", **KEYS)
    with pytest.raises(InputError, match="one that fails"):
        fed.step()


def test_more_workers_than_processors_are_refused() -> None:
    fed = tiny.federation("fedavg", tiny.task(), executor="ray", workers=64)
    with pytest.raises(InputError, match="workers: 64 given, allowed: 1 to 2"):
        fed.step()


@pytest.mark.slow
def test_a_method_from_a_file_reaches_the_workers(tmp_path: Path) -> None:
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
