from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.errors import InputError
from isthmus.report import RunData, read_all
from isthmus.report.tables import way


def test_reads_every_value_of_the_files(three: list[Path]) -> None:
    run = RunData.read(three[0])
    assert (run.name, run.method, run.title) == ("fedmomentum", "fedmomentum", "FedMomentum")
    assert run.config["adapter"]["targets"] == ["q_proj", "v_proj"]
    assert run.environment["cpu"] == {"cores": 2}
    assert not run.unfinished and run.privacy is None
    rows = [json.loads(line) for line in (three[0] / "ledger.jsonl").open()]
    for name in ("id", "t", "what", "from", "to", "kind", "round", "bytes", "seconds", "joules"):
        assert run.ledger[name].tolist() == [row[name] for row in rows]
    assert set(run.ledger["session"]) == {""}
    values = [json.loads(line) for line in (three[0] / "metrics.jsonl").open()]
    tidy = [(v["round"], v["scope"], m, v[m]) for v in values for m in ("loss", "perplexity")]
    columns = (run.metrics[name].tolist() for name in ("round", "scope", "metric", "value"))
    assert list(zip(*columns, strict=True)) == tidy


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(cut=st.floats(0, 1), name=st.sampled_from(["clienté/7", "client/7"]))
def test_a_file_cut_anywhere_gives_its_whole_lines(tmp_path: Path, cut: float, name: str) -> None:
    (tmp_path / "config.yaml").write_text("method: fedavg\n")
    row = {"id": 1, "from": name, "to": "server", "what": "crossing", "bytes": 70, "t": 0.5}
    lines = [json.dumps(row | {"bytes": 70 + i}, ensure_ascii=False).encode() for i in range(4)]
    whole = b"".join(line + b"\n" for line in lines)
    kept = whole[: int(cut * len(whole))]
    (tmp_path / "ledger.jsonl").write_bytes(kept)
    run = RunData.read(tmp_path)
    tail = kept.rpartition(b"\n")[2]
    done = kept.count(b"\n") + (tail in lines)
    assert run.ledger["bytes"].tolist() == [70 + i for i in range(done)]
    assert run.unfinished == (tail != b"" and tail not in lines)


def test_a_broken_line_inside_is_named(three: list[Path]) -> None:
    path = three[1] / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[6] = lines[6][:-9]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl line 7"):
        RunData.read(three[1])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "method: [unclosed"),
        ("config.yaml", "!!python/object/apply:os.getcwd []"),
        ("config.yaml", "- a list"),
        ("environment.json", "{"),
        ("environment.json", "[1]"),
        ("ledger.jsonl", '{"bytes": "many"}\n'),
        ("ledger.jsonl", "[1, 2]\n"),
    ],
)
def test_broken_files_are_one_line_errors(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "config.yaml").write_text("method: fedavg\n")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        RunData.read(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="run folder"):
            RunData.read(folder)
    with pytest.raises(InputError, match="one or more"):
        read_all([])


def test_a_title_names_one_run(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    folders = [write_run(tmp_path / name, "fedit") for name in ("a", "b")]
    folders.append(write_run(tmp_path / "c", "fedmomentum", "fedit (a)"))
    titles = [run.title for run in read_all([*folders, folders[0]])]
    assert titles == ["fedit (a)", "fedit (b)", "fedit (a) 2", "fedit (a) 3"]


def test_absent_fields_are_empty_and_null_metrics_are_not_numbers(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: {name: fedprox, mu: 0.1}\n")
    (tmp_path / "ledger.jsonl").write_text('{"what": "work", "from": "server"}\n')
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "scope": "global", "loss": null}\n')
    run = RunData.read(tmp_path)
    assert run.title == run.method == "fedprox"
    assert run.ledger["round"].tolist() == [-1] and run.ledger["bytes"].tolist() == [0]
    assert math.isnan(run.metrics["value"][0])


def test_ways() -> None:
    assert way("device", "edge") == way("edge", "cloud") == way("client/1", "edge/2") == "up"
    assert way("cloud", "edge") == way("server", "device") == "down"
    assert way("client/1", "client/10") == "across"
