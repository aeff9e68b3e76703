"""Flower in process, and in two halves, gives the bits of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from tests.federated.flower.halves import Flaky, deployed, flat, keys_of, reference
from tests.federated.test_executors import PARTIAL, mixed_ranks

from isthmus import catalogue, tree
from isthmus.errors import InputError
from isthmus.federated.executors.flower import Failed
from isthmus.federated.flower import ready, visit
from isthmus.federated.flower.app import play
from isthmus.run import deployment
from isthmus.wire.errors import WireError
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

pytest.importorskip("flwr")
ready()

METHODS = [
    name
    for name in ("fedavg", "scaffold", "fedala", "fedmomentum")
    if name in catalogue.names("method")
]
"""Nothing kept, much kept, mixing before training, factors and a backbone that changes."""


def settings(name: str) -> dict[str, Any]:
    """Unequal ranks, and with FedMomentum a backbone that changes in every round."""
    return {**mixed_ranks(name), **({"settings": {"tau": 1.0}} if name == "fedmomentum" else {})}


@pytest.mark.parametrize("name", METHODS)
def test_in_process_is_the_reference(name: str) -> None:
    task = tiny.task(dropout=0.3)
    keys = {**PARTIAL, **settings(name)}
    reference = tiny.play(name, task, 4, **keys)
    flower = tiny.play(name, task, 4, executor="flower", **keys)
    assert tree.equal(tiny.state(reference), tiny.state(flower))
    assert tree.equal(tiny.kept(reference), tiny.kept(flower))
    assert list(reference.ledger.rows()) == list(flower.ledger.rows())
    assert type(flower.executor).__name__ == "InProcess"
    if name == "fedmomentum":
        assert flower.method.version(flower.state) > 1


def test_what_is_not_finite_is_left_to_the_guard() -> None:
    x, y = tiny.data(tiny.RAGGED, torch.float64)
    x[5] = torch.inf
    task = tiny.task(data=(x, y))
    with pytest.raises(WireError, match="NaN"):
        tiny.play("fedavg", task, 1, executor="flower")
    fed = tiny.federation("fedavg", task, executor="flower", guard="drop")
    assert len(fed.step().accepted) == len(tiny.RAGGED) - 1


# -- the two halves of a deployment -------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_two_halves_are_the_reference(name: str) -> None:
    keys = keys_of(name, cohort=2, **settings(name))
    fed, built = reference(keys), deployed(keys)
    assert tree.equal(tiny.state(fed), tiny.state(built.federation))
    assert list(fed.ledger.rows()) == list(built.federation.ledger.rows())
    assert built.federation.ground.columns == {} and built.federation.store.initial == {}
    if name == "fedmomentum":
        assert fed.method.version(fed.state) > 1


def test_a_client_has_its_own_rows_only() -> None:
    deployed(keys_of("scaffold"))
    config = deployment.config_of(flat(keys_of("scaffold")))
    items = tiny.task((9, 24, 14)).synthesise().train.columns["x"]
    for client, (start, stop) in enumerate(((0, 9), (9, 33), (33, 47))):
        ground = deployment._part(config.model_dump_json(), client).ground
        assert torch.equal(ground.columns["x"], items[start:stop])
        assert ground.owned.sizes(np.arange(3)).tolist() == [
            stop - start if i == client else 0 for i in range(3)
        ]


def test_an_upload_that_does_not_count_leaves_no_trace_on_its_node() -> None:
    """The simulated link loses every third message: a client goes on from what counted last."""
    link = "up=1e6,down=1e6,loss=0.35,attempts=1"
    keys = {**keys_of("scaffold"), "link": link, "rounds": 8, "seed": 5}
    fed, built = reference(keys), deployed(keys)
    assert 5 < fed.ledger.total("rows", note="lost", kind="update") < 24
    assert tree.equal(tiny.state(fed), tiny.state(built.federation))


def test_a_visit_that_failed_is_asked_for_again_with_the_same_result() -> None:
    keys = keys_of("scaffold")
    flaky: list[Flaky] = []

    def client(app: Any) -> Flaky:
        flaky.append(Flaky(app, {1, 5, 6, 9}))
        return flaky[0]

    built = deployed(keys, client)
    assert tree.equal(tiny.state(reference(keys)), tiny.state(built.federation))
    assert flaky[0].calls == 3 * 4 + 4


def test_a_node_that_fails_for_good_is_named() -> None:
    with pytest.raises(Failed, match=r"^client 0 failed: .*no room"):
        deployed(keys_of("fedavg"), lambda app: Flaky(app, {1, 4, 5}))


def test_a_node_that_forgot_is_found_out() -> None:
    with pytest.raises(Failed, match="client: 1 without the state of round 1 given"):
        deployed(keys_of("scaffold"), lambda app: Flaky(app, set(), forgets=5))


def test_nodes_that_are_not_the_clients() -> None:
    node = deployment.node_app()

    def server(grid: Any, context: Any) -> None:
        deployment.serve(grid, deployment.config_of(context.run_config))

    def twice(message: Any, context: Any) -> Any:
        context.node_config["partition-id"] = min(1, int(context.node_config["partition-id"]))
        return node(message, context)

    keys = flat(keys_of("fedavg"))
    with pytest.raises(Failed, match="two nodes with partition-id=1"):
        play(server, twice, keys, 3, Link(), Ledger())
    with pytest.raises(Failed, match=r"partition-id: 3 given, allowed: 0 to 2"):
        play(server, node, keys, 4, Link(), Ledger())


REFUSED: dict[str, dict[str, Any]] = {
    "attack": {"attack": "sign-flip", "attackers": 1},
    "mask": {"mask": "secagg", "clip": 1.0},
    "download": {"download": "int8"},
    "schedule": {"schedule": "fedasync"},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_real_nodes_cannot_do_is_refused(field: str) -> None:
    with pytest.raises(InputError) as error:
        deployed({**keys_of("fedavg"), **REFUSED[field]})
    assert error.value.field == field and "in a deployment" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bound_on_slices_of_unequal_rank_is_refused() -> None:
    keys = keys_of("flexlora", ranks=(1, 2))
    deployed({**keys, "rounds": 1})
    with pytest.raises(InputError, match=r"clip: 0.5 given, allowed: none with unequal ranks"):
        deployed({**keys, "clip": 0.5})


def test_a_run_folder_is_left(tmp_path: Path) -> None:
    import isthmus

    out = tmp_path / "run"
    keys = {**keys_of("fedavg"), "evaluate": 2, "task": "digits", "out": str(out)}
    keys.pop("partition")
    play(deployment.server_app(), deployment.node_app(), flat(keys), 3, Link(), Ledger())
    assert (out / "metrics.jsonl").read_text().count('"scope": "global"') == 3
    shared = isthmus.load(out).state_dict()
    plain = reference({k: v for k, v in keys.items() if k != "out"})
    assert all(torch.equal(shared[name], x) for name, x in plain.state["shared"].items())


def test_bytes_that_are_no_visit() -> None:
    with pytest.raises(WireError):
        visit.answer(b"\0" * 64, None)  # type: ignore[arg-type]
