from __future__ import annotations

import csv
import json
import struct
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from isthmus import report
from isthmus.errors import InputError
from isthmus.report import closing_table, read_all, theme


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_is_tidy_and_whole(three: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "paper"
    written = report.export(three, out, ("csv",))
    assert sorted(p.name for p in written) == [
        "closing.csv",
        "devices.csv",
        "ledger.csv",
        "metrics.csv",
    ]
    metrics = _table(out / "metrics.csv")
    assert list(metrics[0]) == ["run", "method", "round", "t", "scope", "split", "metric", "value"]
    keys = {(r["run"], r["round"], r["scope"], r["split"], r["metric"]) for r in metrics}
    assert (
        len(keys)
        == len(metrics)
        == sum(2 for folder in three for _ in (folder / "metrics.jsonl").open())
    )
    sums: dict[str, int] = defaultdict(int)
    for row in _table(out / "ledger.csv"):
        sums[row["run"]] += int(row["bytes"]) * (row["way"] == "up")
    rows = closing_table(read_all(three))
    assert sums == {row.run: row.bytes_up for row in rows}
    closing = _table(out / "closing.csv")
    assert [float(row["after"]) for row in closing] == [row.after for row in rows]
    assert {len(row) for row in closing} == {16}
    devices = _table(out / "devices.csv")
    assert len(devices) == 24 and {row["metric"] for row in devices} == {"perplexity"}


def test_charts_as_files(three: list[Path], tmp_path: Path) -> None:
    written = report.export(three[1:2], tmp_path, ("png", "svg"))
    names = {path.stem for path in written}
    assert {"perplexity-over-rounds", "quality-bytes", "devices", "bytes"} <= names
    for path in written:
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            first = "part-1" if path.stem in ("bytes", "time", "joules") else "run-1"
            assert "var(--" not in text and theme.TOKENS[first][0] in text
            root = ElementTree.fromstring(text)
            assert float(root.attrib["width"]) >= 400
            assert not [e for e in root.iter() if e.tag.endswith(("image", "script"))]
        else:
            head = path.read_bytes()[:24]
            assert head[:8] == b"\x89PNG\r\n\x1a\n"
            assert struct.unpack(">I", head[16:20])[0] >= 800
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".csv"]


def test_what_cannot_be_exported(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nearest: png"):
        report.export(three, tmp_path / "x", ("pngs",))
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(InputError, match="a folder"):
        report.export(three, tmp_path / "file", ("csv",))


def test_an_empty_run_exports_nothing_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: fedavg\n")
    report.export([tmp_path], tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "closing.csv", "devices.csv", "metrics.csv", "ledger.csv",
    }  # fmt: skip
    assert _table(tmp_path / "out" / "ledger.csv") == []
