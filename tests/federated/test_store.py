"""Clients' states on disk: the last row counts, whatever happened to the end of the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.store import ClientStore
from isthmus.tree import Tree

INITIAL: Tree = {
    "w": torch.tensor([[1.5, -2.0, 0.0]]),
    "n": torch.tensor(3, dtype=torch.int64),
    "h": torch.tensor([0.5, 0.25], dtype=torch.bfloat16),
}
EVERYONE = np.arange(7)

PUTS = st.lists(
    st.tuples(st.lists(st.integers(0, 6), unique=True, max_size=4), st.integers(-99, 99)),
    max_size=6,
)


def rows(clients: list[int], value: int) -> Tree:
    """A row for each client that no other client and no other value gives."""
    own = torch.tensor(clients, dtype=torch.float32) / 8 + value
    return {
        "w": own.view(-1, 1, 1) + torch.arange(3.0),
        "n": torch.tensor(clients, dtype=torch.int64) * 1000 + value,
        "h": own.view(-1, 1).bfloat16().repeat(1, 2),
    }


def expected(puts: list[tuple[list[int], int]]) -> list[Tree]:
    held = [dict(INITIAL) for _ in EVERYONE]
    for clients, value in puts:
        for i, client in enumerate(clients):
            held[client] = tree.row(rows(clients, value), i)
    return held


def check(store: ClientStore, puts: list[tuple[list[int], int]]) -> None:
    got = store.get(EVERYONE)
    assert all(tree.equal(tree.row(got, i), one) for i, one in enumerate(expected(puts)))
    assert len(store) == len({client for clients, _ in puts for client in clients})


def filled(puts: list[tuple[list[int], int]], path: Path | None) -> tuple[ClientStore, list[int]]:
    """A store, and its length after each put."""
    store = ClientStore(INITIAL, path)
    lengths = [store.length]
    for round, (clients, value) in enumerate(puts):
        store.put(np.array(clients, np.int64), round, rows(clients, value))
        lengths.append(store.length)
    return store, lengths


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


fresh_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@given(PUTS)
def test_in_memory(puts: list[tuple[list[int], int]]) -> None:
    check(filled(puts, None)[0], puts)


@fresh_files
@given(puts=PUTS, order=st.permutations(range(7)))
def test_on_disk_reopened_and_compacted(
    folder: Path, puts: list[tuple[list[int], int]], order: list[int]
) -> None:
    path, other = folder / "clients.bin", folder / "compact.bin"
    path.unlink(missing_ok=True)
    other.unlink(missing_ok=True)
    store, _ = filled(puts, path)
    check(store, puts)
    some = store.get(np.array(order))
    assert tree.equal(some, {n: x[torch.tensor(order)] for n, x in store.get(EVERYONE).items()})
    store.sync()
    store.close()
    again = ClientStore(INITIAL, path)
    check(again, puts)
    small = again.compacted(other)
    check(small, puts)
    check(again, puts)  # the old one is left as it was
    assert small.length == other.stat().st_size <= again.length
    again.close(), small.close()


@fresh_files
@given(puts=PUTS.filter(bool), cut=st.floats(0, 1), then=PUTS)
def test_a_file_cut_anywhere_holds_every_whole_block(
    folder: Path,
    puts: list[tuple[list[int], int]],
    cut: float,
    then: list[tuple[list[int], int]],
) -> None:
    path = folder / "clients.bin"
    path.unlink(missing_ok=True)
    store, lengths = filled(puts, path)
    store.close()
    size = int(cut * lengths[-1])
    os.truncate(path, size)
    whole = sum(length <= size for length in lengths) - 1
    again = ClientStore(INITIAL, path)
    check(again, puts[:whole])
    assert again.length == lengths[whole]
    for round, (clients, value) in enumerate(then):  # and is written on without a seam
        again.put(np.array(clients, np.int64), round, rows(clients, value))
    again.close()
    once_more = ClientStore(INITIAL, path)
    check(once_more, puts[:whole] + then)
    once_more.close()


@fresh_files
@given(puts=PUTS, back=st.integers(0, 6))
def test_resume_forgets_what_came_after(
    folder: Path, puts: list[tuple[list[int], int]], back: int
) -> None:
    path = folder / "clients.bin"
    path.unlink(missing_ok=True)
    store, lengths = filled(puts, path)
    at = max(0, len(puts) - back)
    store.resume(lengths[at])
    check(store, puts[:at])
    assert path.stat().st_size == store.length == lengths[at]
    if lengths[at]:
        with pytest.raises(InputError, match="store"):
            store.resume(lengths[at] - 1)
    store.close()


@fresh_files
@given(st.binary(min_size=8, max_size=60))
def test_a_file_of_something_else_is_refused_in_one_line(folder: Path, junk: bytes) -> None:
    path = folder / "clients.bin"
    path.write_bytes(junk)
    if junk[:4] == b"ISTK":
        return
    with pytest.raises(InputError, match=r"store: .* given, allowed: a file of client states$"):
        ClientStore(INITIAL, path)
    assert path.read_bytes() == junk


@fresh_files
@given(place=st.integers(8, 100), byte=st.integers(0, 255))
def test_a_damaged_header_never_escapes_as_another_error(
    folder: Path, place: int, byte: int
) -> None:
    path = folder / "clients.bin"
    path.unlink(missing_ok=True)
    store, _ = filled([([1, 2], 5)], path)
    store.close()
    data = bytearray(path.read_bytes())
    data[place] = byte
    path.write_bytes(data)
    try:
        ClientStore(INITIAL, path).close()
    except InputError as error:
        assert error.field == "store"


@pytest.mark.parametrize(
    "other",
    [
        {**INITIAL, "w": torch.zeros(1, 4)},
        {**INITIAL, "w": torch.zeros(1, 3, dtype=torch.float64)},
        {"v": INITIAL["w"], "n": INITIAL["n"], "h": INITIAL["h"]},
        {"w": INITIAL["w"]},
    ],
)
def test_states_of_another_model_are_refused(tmp_path: Path, other: Tree) -> None:
    path = tmp_path / "clients.bin"
    filled([([1], 2)], path)[0].close()
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"store: .*allowed: the shapes ") as caught:
        ClientStore(other, path)
    assert "\n" not in str(caught.value) and path.read_bytes() == before


def test_clients_never_visited_cost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "clients.bin"
    store = ClientStore(INITIAL, path)
    assert store.get(np.array([10**9]))["n"].tolist() == [3] and path.stat().st_size == 0
    store.put(np.array([10**9]), 1, rows([1], 1))
    assert len(store) == 1 and store.get(np.array([0, 10**9]))["n"].tolist() == [3, 1001]
    nothing = ClientStore({}, tmp_path / "empty.bin")
    nothing.put(np.array([1, 2]), 1, {})
    assert nothing.get(np.array([1])) == {} and nothing.length == 0


def test_what_is_worth_compacting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.federated import store as module

    monkeypatch.setattr(module, "_WORTH_COMPACTING", 500)
    store, _ = filled([([1, 2], i) for i in range(9)], tmp_path / "a.bin")
    assert store.worth_compacting
    assert not store.compacted(tmp_path / "b.bin").worth_compacting
    with pytest.raises(InputError, match="in memory given"):
        ClientStore(INITIAL).resume(0)
