"""The ledger: sums against brute force, exact files, resuming, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import InputError
from isthmus.wire.ledger import Ledger
from isthmus.wire.tally import direction

FIELDS = [
    *("id", "t", "what", "from", "to", "kind", "round", "bytes", "values", "seconds", "joules"),
    *("money", "flops", "session", "sequence", "note"),
]
PARTIES = ["server", "edge/1", "client/1", "client/2", 'odd "%d" %s\n', "Zürich"]

amounts = st.floats(0, 1e6, allow_subnormal=False)
counts = st.integers(0, 2**40)
crossings = st.fixed_dictionaries(
    {
        "sender": st.sampled_from(PARTIES),
        "receiver": st.sampled_from(PARTIES),
        "kind": st.sampled_from(["model", "update"]),
        "t": amounts,
        "bytes": counts,
        "values": counts,
        "seconds": amounts,
        "joules": amounts,
        "round": st.integers(0, 3),
        "session": st.integers(0, 2),
        "sequence": st.integers(0, 3),
    }
)


def entered(rows: list[dict[str, Any]]) -> Ledger:
    ledger = Ledger()
    for row in rows:
        ledger.cross(**row)
    return ledger


def content(ledger: Ledger) -> list[dict[str, Any]]:
    return list(ledger.rows())


def random_block(n: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "sender": [f"client/{i}" for i in rng.integers(0, 5, n)],
        "receiver": "server",
        "kind": "update",
        "t": rng.random(n) * 10,
        "bytes": rng.integers(0, 1000, n),
        "values": rng.integers(0, 900, n),
        "seconds": rng.random(n),
        "joules": rng.random(n) * 1e-3,
        "round": seed,
    }


@given(st.lists(crossings, max_size=12), st.integers(0, 12))
def test_sums_equal_brute_force(rows: list[dict[str, Any]], start: int) -> None:
    ledger = entered(rows)
    ledger.work(party="client/1", kind="train", flops=7e9, seconds=2.0)
    expected: dict[tuple[str, str], int] = {}
    late: dict[int, int] = {}
    for i, row in enumerate(rows):
        key = (row["kind"], direction(row["sender"], row["receiver"]))
        expected[key] = expected.get(key, 0) + row["bytes"]
        if i >= start and row["sender"].startswith("client/"):
            late[row["round"]] = late.get(row["round"], 0) + row["values"]
    assert ledger.sums("bytes", by=("kind", "direction"), what="crossing") == expected
    found = ledger.sums("values", by="round", sender="client/*", what="crossing", start=start)
    assert found == late
    assert ledger.total("bytes") == sum(row["bytes"] for row in rows)
    chosen = sum(row["bytes"] for row in rows if row["receiver"] == "server")
    assert ledger.total("bytes", to="server", kind=["model", "update"]) == chosen
    assert ledger.total("rows", what="crossing", round=[1, 3]) == sum(r["round"] % 2 for r in rows)
    assert ledger.total("seconds", what="crossing") == pytest.approx(
        sum(row["seconds"] for row in rows), rel=1e-9, abs=1e-9
    )
    assert ledger.total("flops", direction="local", what="work") == 7e9


def test_direction_is_by_height() -> None:
    up = [("client/1", "edge/2"), ("edge/2", "server"), ("server", "cloud"), ("x", "cloud")]
    assert {direction(a, b) for a, b in up} == {"up"}
    assert {direction(b, a) for a, b in up} == {"down"}
    assert direction("client/1", "client/2") == "across"
    assert direction("server", "server") == "local"


def test_a_block_is_its_rows_one_by_one(tmp_path: Path) -> None:
    block = random_block(50, 3)
    together, single = Ledger(tmp_path / "a.jsonl"), Ledger(tmp_path / "b.jsonl")
    assert together.cross_many(**block) == range(50)
    for i in range(50):
        one = {k: v[i] if isinstance(v, list | np.ndarray) else v for k, v in block.items()}
        single.cross(**one)
    assert content(together) == content(single)
    together.flush()
    single.flush()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == content(together)
    assert lines == [json.loads(x) for x in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert list(lines[0]) == FIELDS


@given(st.lists(st.tuples(crossings, st.integers(1, 9)), min_size=1, max_size=6))
def test_a_file_does_not_depend_on_which_rows_were_written_together(
    tmp_path_factory: pytest.TempPathFactory, groups: list[tuple[dict[str, Any], int]]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    rows = [{**row, "note": "100%", "money": -0.0} for row, n in groups for _ in range(n)]
    together, single = Ledger(folder / "a.jsonl"), Ledger(folder / "b.jsonl")
    together.cross_many(**{name: [row[name] for row in rows] for name in rows[0]})
    for row in rows:
        single.cross(**{**row, "money": 0.0})
    together.close()
    single.close()
    assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()


@given(st.lists(crossings, min_size=1, max_size=8), st.floats(0, 1e15))
def test_a_file_has_the_bits_of_its_ledger(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], odd: float
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = Ledger(path)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    ledger.cross_many(**columns)
    ledger.cross_many(**{**columns, "t": odd, "money": [odd] * len(rows), "note": "100%"})
    ledger.work_many(party=columns["sender"], kind="train", flops=[odd] * len(rows), joules=odd)
    ledger.close()
    copy = Ledger.read(path)
    for name, column in ledger.table().items():
        assert (copy.table()[name] == column).all(), name
    assert abs(ledger.table()["money"][len(rows)] - odd) <= 5e-13


def test_times_are_kept_to_the_picosecond() -> None:
    ledger = Ledger()
    ledger.work(party="a", kind="w", t=0.1, seconds=1.23456789012345e-9, flops=3e15 + 1)
    row = content(ledger)[0]
    assert (row["t"], row["seconds"], row["flops"]) == (0.1, 1.235e-9, 3e15 + 1)
    late = np.random.default_rng(0).random(500) * 1e6 + 8192.0  # doubles are coarser there
    ledger.work_many(party="a", kind="w", t=late)
    assert ledger.table()["t"][1:].tolist() == late.tolist()


@pytest.mark.parametrize(
    ("cells", "field"),
    [
        ({"bytes": -1}, "bytes"),
        ({"bytes": 1.5}, "bytes"),
        ({"bytes": [1, 2]}, "bytes"),
        ({"bytes": np.array([1.0, 2.0, 3.0])}, "bytes"),
        ({"seconds": float("nan")}, "seconds"),
        ({"joules": [0.0, float("inf"), 1.0]}, "joules"),
        ({"t": "soon"}, "t"),
        ({"kind": 3}, "kind"),
        ({"sender": None}, "from"),
        ({"receiver": ["a", None, "b"]}, "to"),
        ({"round": 2**70}, "round"),
        ({"note": ["", "lost", ""], "values": 4}, "values"),
        ({"note": "repeat", "values": [0, 0, 1]}, "values"),
    ],
)
def test_bad_cells_are_refused_and_leave_no_trace(cells: dict[str, Any], field: str) -> None:
    ledger = Ledger()
    good = {"sender": ["a", "b", "c"], "receiver": "server", "kind": "update"}
    with pytest.raises(InputError) as refused:
        ledger.cross_many(**{**good, "bytes": 9, "session": 5, **cells})
    assert refused.value.field == field
    assert len(ledger) == 0
    ledger.cross_many(**good)
    assert ledger.total("bytes") == 0 and ledger.table()["session"].tolist() == [0, 0, 0]


def test_unknown_columns_are_named() -> None:
    with pytest.raises(InputError, match="nearest: bytes"):
        Ledger().total("byte")
    with pytest.raises(InputError, match="nearest: sender"):
        Ledger().sums("bytes", by="sendr")


def test_honest_and_paper_counts_differ_by_what_was_lost() -> None:
    ledger = Ledger()
    ledger.cross_many(
        sender="client/1", receiver="server", kind="update", bytes=[120, 120, 120],
        values=[0, 100, 0], note=["lost", "", "repeat"], session=4, sequence=9,
    )  # fmt: skip
    assert (ledger.total("bytes"), ledger.total("values")) == (360, 100)
    assert ledger.sums("bytes", by="note") == {"": 120, "lost": 120, "repeat": 120}


def test_confirm_adds_only_seconds_and_joules() -> None:
    ledger = Ledger()
    ledger.cross(
        sender="server", receiver="client/4", kind="model", bytes=50, values=40, round=7,
        seconds=1.0, session=2, sequence=3,
    )  # fmt: skip
    ledger.confirm(2, 3, seconds=0.25, joules=0.5)
    assert ledger.total("bytes") == 50 and ledger.total("values") == 40
    assert ledger.sums("seconds", by=("what", "to", "kind", "round")) == {
        ("confirm", "client/4", "model", 7): 0.25,
        ("crossing", "client/4", "model", 7): 1.0,
    }
    with pytest.raises(InputError, match="sequence"):
        ledger.confirm(2, 4)


GAUSSIAN = {
    "mechanism": "gaussian",
    "parameters": {"noise_multiplier": 1.1, "sampling": 0.01},
    "unit": "client",
    "adjacency": "add-remove",
}
PAIR = {"pair": {"upper": [0.25, 0.75], "lower": [0.75, 0.25]}, "unit": "token", "adjacency": "%s"}


def test_privacy_events_come_back_as_entered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.privacy(1.5, "client/1", GAUSSIAN, round=2)
    ledger.privacy(2.5, "client/2", PAIR)
    ledger.close()
    for book in (ledger, Ledger.read(tmp_path / "ledger.jsonl")):
        first, second = book.rows()
        assert first["event"] == GAUSSIAN and second["event"] == PAIR
        assert (first["what"], first["from"], first["to"]) == ("privacy", "client/1", "client/1")
        assert (first["kind"], second["kind"], first["round"]) == ("gaussian", "pair", 2)
    assert "epsilon" not in ledger.table()
    assert content(Ledger.merge(ledger, ledger)) == content(ledger)


@pytest.mark.parametrize(
    "change",
    [
        {"unit": None},
        {"adjacency": 3},
        {"pair": {}},
        {"mechanism": None},
        {"epsilon": 1.0},
        {"parameters": {"sigma": float("nan")}},
    ],
)
def test_what_is_no_privacy_event_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Ledger().privacy(0.0, "client/1", GAUSSIAN | change)


def test_a_half_written_line_is_left_out_by_read_and_cut_by_resume(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.cross_many(**random_block(20, 1))
    length = ledger.length()
    at_checkpoint = content(ledger)
    ledger.cross_many(**random_block(20, 2))
    ledger.close()
    whole = path.read_bytes()
    assert length == sum(len(line) for line in whole.splitlines(keepends=True)[:20])

    path.write_bytes(whole[:-37])
    assert content(Ledger.read(path)) == content(ledger)[:39]

    resumed = Ledger.resume(path, length)
    assert content(resumed) == at_checkpoint and resumed.length() == length
    resumed.cross_many(**random_block(20, 2))
    resumed.close()
    assert path.read_bytes() == whole
    assert resumed.sums("joules", by=("from", "round")) == ledger.sums("joules", ("from", "round"))


def test_resume_asks_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.cross_many(**random_block(3, 1))
    ledger.close()
    size = path.stat().st_size
    for length in (size - 1, size + 1, -1):
        with pytest.raises(InputError, match="length"):
            Ledger.resume(path, length)
    assert path.stat().st_size == size
    with pytest.raises(InputError, match="resume"):
        Ledger(path)
    emptied = Ledger.resume(path, 0)
    assert len(emptied) == 0 and path.stat().st_size == 0


def test_a_file_can_be_read_while_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.cross_many(**random_block(2000, 1))  # more than the buffer holds
    seen = Ledger.read(path)
    assert 0 < len(seen) <= 2000 and content(seen) == content(ledger)[: len(seen)]
    ledger.flush()
    assert len(Ledger.read(path)) == 2000


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "not json", '{"id": 1}', '{"id":2}', '{"id":1},{"id":2}']
)
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.cross_many(**random_block(1, 1))
    ledger.close()
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match="line"):
        Ledger.read(path)


def test_lines_of_many_read_blocks(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for seed in range(3):
        ledger.cross_many(**random_block(4000, seed))
    ledger.close()
    assert path.stat().st_size > 1 << 21
    assert content(Ledger.read(path)) == content(ledger)


@settings(max_examples=50)
@given(
    st.lists(crossings, max_size=8),
    st.lists(st.integers(0, 7), max_size=10),
    st.lists(st.integers(0, 7), max_size=10),
)
def test_merging_is_a_join(rows: list[dict[str, Any]], first: list[int], second: list[int]) -> None:
    a = entered([rows[i] for i in first if i < len(rows)])
    b = entered([rows[i] for i in reversed(second) if i < len(rows)])
    ab = Ledger.merge(a, b)
    assert content(ab) == content(Ledger.merge(b, a))
    assert content(Ledger.merge(ab, b)) == content(ab) == content(Ledger.merge(ab, ab))
    assert content(Ledger.merge(Ledger.merge(a, a), b)) == content(ab)
    # Against the definition: each distinct row as often as the ledger with most copies has it.
    unnumbered = [[json.dumps(row | {"id": 0}) for row in book.rows()] for book in (a, b, ab)]
    for line in {*unnumbered[0], *unnumbered[1]}:
        copies = [lines.count(line) for lines in unnumbered]
        assert copies[2] == max(copies[:2])
    assert len(ab) == len([line for line in unnumbered[2] if line in unnumbered[0] + unnumbered[1]])
    times = ab.table()["t"]
    assert (np.diff(times) >= 0).all()


def test_disjoint_ledgers_add_up_in_a_file(tmp_path: Path) -> None:
    a, b = Ledger(), Ledger()
    a.cross_many(**random_block(30, 1))
    b.cross_many(**random_block(40, 2))
    b.privacy(0.5, "client/2", GAUSSIAN)
    merged = Ledger.merge(a, b, path=tmp_path / "merged.jsonl")
    assert merged.total("bytes") == a.total("bytes") + b.total("bytes")
    assert merged.total("rows") == 71
    assert content(Ledger.read(tmp_path / "merged.jsonl")) == content(merged)
    assert len(Ledger.merge()) == 0


def test_rows_entered_later_are_the_rows_entered_at_once(tmp_path: Path) -> None:
    """Any mix of blocks, with scalars and arrays, read back in order and to the byte."""
    now, later = Ledger(tmp_path / "now"), Ledger(tmp_path / "later")
    for n, seed in [(3, 1), (1, 2), (700, 3), (500, 4), (2, 5)]:
        block = random_block(n, seed) | {"round": seed, "note": "x" if seed == 2 else ""}
        now.cross_many(**block)
        later.later(n, "crossing", **block)
        work = {"kind": "train", "t": 1.5, "flops": np.arange(n), "round": seed}
        names = [f"client/{i}" for i in range(n)]
        now.work_many(party=names, **work)
        later.later(n, "work", sender=names, receiver=names, **work)
        assert len(now) == len(later)
        if seed == 1:  # a row entered at once comes after those that wait
            now.cross(sender="a", receiver="b", kind="k", bytes=7)
            later.cross(sender="a", receiver="b", kind="k", bytes=7)
    assert content(now) == content(later)
    now.close()
    later.close()
    assert (tmp_path / "now").read_bytes() == (tmp_path / "later").read_bytes()
    assert content(Ledger.read(tmp_path / "later")) == content(now)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_defect_among_rows_that_wait_is_named_and_nothing_of_them_stays(bad: float) -> None:
    ledger = Ledger()
    ledger.cross(sender="a", receiver="b", kind="k", bytes=7)
    ledger.later(2, "crossing", sender="a", receiver="b", kind="k", seconds=np.array([1.0, bad]))
    with pytest.raises(InputError, match="seconds"):
        ledger.total("bytes")
    assert ledger.total("bytes") == 7 and len(ledger) == 1
