"""A client whose work is NaN: raise, drop or clip, under every engine, and what it keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny

from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.round import Federation
from isthmus.tree import Tree
from isthmus.wire.errors import WireError

SIZES = (5, 14, 9, 3)
SICK = 1
"""The client with a broken sensor: its items are NaN."""
EXECUTORS = ("sequential", "vectorised")
SECURE: dict[str, Any] = {"clip": 0.5, "mask": "secagg:bits=20", "link": "ideal"}


def task(*sick: int) -> Any:
    x, y = tiny.data(SIZES, torch.float64)
    for client in sick or (SICK,):
        first = sum(SIZES[:client])
        x[first : first + SIZES[client]] = float("nan")
    return tiny.task(SIZES, data=(x, y))


def finite(tensors: Tree) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors.values())


def kept_as_it_was(fed: Federation) -> None:
    """The sick client has what it began with, the others have something else."""
    fresh, now = fed.store.initial, tiny.kept(fed)
    others = [i for i in range(len(SIZES)) if i != SICK]
    assert tree.equal(tree.row(now, SICK), fresh) and finite(now)
    assert all(tiny.apart(tree.row(now, i), fresh) > 1e-6 for i in others)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("codec", ["dense", "int8"])
@pytest.mark.parametrize("method", ["scaffold", "ditto"])
def test_dropped(method: str, codec: str, executor: str) -> None:
    """It sends nothing, weighs nothing, and keeps what it had; the rest is a round without it."""
    fed = tiny.federation(method, task(), guard="drop", codec=codec, executor=executor)
    for _ in range(3):
        report = fed.step()
        assert report.clients == [0, 1, 2, 3] and report.accepted == [0, 2, 3]
        assert np.isfinite(report.loss)
    kept_as_it_was(fed)
    assert finite(tiny.state(fed))
    sent = fed.ledger.sums("rows", by="from", kind="update")
    assert sent == {f"client/{i:03d}": 3 for i in (0, 2, 3)}


def test_a_round_with_a_dropped_client_is_one_without_it() -> None:
    """Visits have keys of their own, so the same clients without the sick one do the same."""
    fed = tiny.federation("fedavg", task(), guard="drop")
    well = tiny.federation("fedavg", task(), guard="drop")
    well.schedule = replace(well.schedule)
    object.__setattr__(well.schedule, "clients", lambda round: np.array([0, 2, 3]))
    for _ in range(3):
        fed.step()
        well.step()
    assert tree.equal(tiny.state(fed), tiny.state(well))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("keys", [{}, {"codec": "int8"}, {"clip": 0.5}, SECURE])
def test_raised(keys: dict[str, Any], executor: str) -> None:
    """One line, and neither server nor clients have changed; a clip does not hide it."""
    fed = tiny.federation("scaffold", task(), executor=executor, **keys)
    state, kept = tree.clone(tiny.state(fed)), tiny.kept(fed)
    with pytest.raises(WireError, match="NaN or infinity") as caught:
        fed.step()
    assert "\n" not in str(caught.value)
    assert tree.equal(tiny.state(fed), state) and tree.equal(tiny.kept(fed), kept)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("codec", ["dense", "int8"])
def test_clipped(codec: str, executor: str) -> None:
    """Zeros go up in place of NaN, weigh like any upload, and what it keeps stays finite."""
    fed = tiny.federation("scaffold", task(), guard="clip", codec=codec, executor=executor)
    for _ in range(3):
        assert fed.step().accepted == [0, 1, 2, 3]
    kept_as_it_was(fed)
    assert finite(tiny.state(fed))


@pytest.mark.parametrize("guard", ["drop", "clip"])
def test_the_codec_remembers_what_was_sent(guard: str) -> None:
    """Error feedback goes on for the others, and the sick client's stays finite."""
    keys: dict[str, Any] = {"codec": "topk:0.2", "feedback": True, "guard": guard}
    fed = tiny.play("fedavg", task(), 3, **keys)
    memory = {n: x for n, x in tiny.kept(fed).items() if n.startswith("memory/")}
    assert finite(memory) and finite(tiny.state(fed))
    assert not any(bool(x[SICK].any()) for x in memory.values())
    assert all(bool(x[0].any()) for x in memory.values())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_under_masks(executor: str) -> None:
    """Dropped before it is masked, and the sum opened without it; or zeros are masked."""
    step = 0.5 / (2**19 - 1)
    for guard in ("drop", "clip"):
        keys: dict[str, Any] = {"guard": guard, "executor": executor}
        fed = tiny.federation("fedavg", task(), **keys, **SECURE)
        plain = tiny.federation("fedavg", task(), **keys, clip=0.5)
        for _ in range(2):
            assert fed.step().accepted == plain.step().accepted
        assert ("client/001" in fed.ledger.sums("rows", by="from", kind="update")) == (
            guard == "clip"
        )
        for name, x in tiny.state(plain).items():
            assert float((x - tiny.state(fed)[name]).abs().max()) < 8 * step
        start = tiny.state(tiny.federation("fedavg", task()))
        assert tiny.apart(start, tiny.state(fed)) > 1e-3


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("schedule", ["fedasync", "fedbuff:k=2", "fedcompass:qmin=2,qmax=4"])
def test_without_waiting(schedule: str, executor: str) -> None:
    keys: dict[str, Any] = {"schedule": schedule, "executor": executor, "speeds": "1,1.7,2.9,5.3"}
    fed = tiny.federation("scaffold", task(), guard="drop", **keys)
    mixed = [c for _ in range(8) for c in fed.step().clients]
    assert set(mixed) == {0, 2, 3} and finite(tiny.state(fed))
    assert tree.equal(tree.row(tiny.kept(fed), SICK), fed.store.initial)
    assert finite(tiny.kept(fed))

    fed = tiny.federation("scaffold", task(), guard="clip", **keys)
    mixed = [c for _ in range(12) for c in fed.step().clients]
    assert set(mixed) == {0, 1, 2, 3} and finite(tiny.state(fed))
    assert tree.equal(tree.row(tiny.kept(fed), SICK), fed.store.initial)
    assert finite(tiny.kept(fed))

    fed = tiny.federation("scaffold", task(), **keys)
    with pytest.raises(WireError, match="NaN or infinity"):
        for _ in range(12):
            fed.step()
    assert finite(tiny.state(fed)) and finite(tiny.kept(fed))


@pytest.mark.parametrize("schedule", ["sync", "fedasync", "fedbuff:k=2"])
def test_when_all_have_diverged_it_is_said(schedule: str) -> None:
    """Also where clients do not wait, and would be replaced by each other for ever."""
    fed = tiny.federation("fedavg", task(0, 1, 2, 3), guard="drop", schedule=schedule)
    with pytest.raises(WireError, match="update: NaN or infinity from every client"):
        for _ in range(3):
            fed.step()
    assert finite(tiny.state(fed))


def test_an_attacker_that_sends_nan_is_dropped_without_waiting() -> None:
    """It is found after the guard at the client; the weights of the others stay their own."""
    for codec in ("dense", "int8"):
        fed = tiny.federation(
            "fedavg", tiny.task(SIZES), guard="drop", codec=codec, schedule="fedbuff:k=2",
            attack="sign-flip", attackers=1,
        )  # fmt: skip
        inner = fed.path.attack
        assert inner is not None

        class Broken:
            threat, needs = inner.threat, getattr(inner, "needs", frozenset())

            def craft(self, own: Any, view: Any) -> Any:
                broken = {n: torch.full_like(x, float("nan")) for n, x in own.delta.items()}
                return own.with_delta(broken)

        fed.path.attack = Broken()  # type: ignore[assignment]
        mixed = [c for _ in range(6) for c in fed.step().clients]
        assert set(mixed) == {1, 2, 3} and finite(tiny.state(fed))


def test_peers_that_diverge() -> None:
    """Without a server nobody can be left out: raise and drop are one line, clip goes on."""
    keys: dict[str, Any] = {"schedule": "gossip", "guard": "drop"}
    with pytest.raises(InputError, match="guard: peer 1 has diverged given, allowed: peers that"):
        tiny.federation("fedavg", task(), **keys).step()
    with pytest.raises(WireError, match="NaN or infinity"):
        tiny.federation("fedavg", task(), **{**keys, "guard": "raise"}).step()
    fed = tiny.federation("fedavg", task(), **{**keys, "guard": "clip"})
    for _ in range(3):
        fed.step()
    assert finite(tiny.state(fed))
