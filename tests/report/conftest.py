"""Synthetic runs in the exact file formats: three methods, eight devices, five rounds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

DEVICES = 8
ROUNDS = 5
NAMES = ["0", "1", "2", "3", "4", "5", "6", "anna"]


def _drop(method: str, r: int) -> float:
    rate = {"fedmomentum": 0.205, "fedit": 0.155, "local": 0.09}[method]
    return rate * (1.0 - math.exp(-0.55 * r))


def write_run(folder: Path, method: str, title: str | None = None, seed: int = 0) -> Path:
    """One run folder: `fedmomentum`, `fedit` or `local` (which sends nothing)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(method)])
    config: dict[str, Any] = {
        "task": "text", "method": method, "clients": DEVICES, "rounds": ROUNDS, "seed": seed,
        "adapter": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
        "visit": {"epochs": 1, "batch": 8, "lr": 0.002}, "executor": "vectorised",
    }  # fmt: skip
    if title is not None:
        config["title"] = title
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "environment.json").write_text(
        json.dumps({
            "command": ["isthmus", "tune", "--task", "text", "--method", method],
            "python": "3.12.4", "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
            "cpu": {"cores": 2}, "threads": 2,
        })
    )  # fmt: skip
    start = 52.0 + 16.0 * np.random.default_rng(7).random(DEVICES)
    tilt = 0.02 * rng.standard_normal(DEVICES)
    ledger: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    clock = 0.0

    def enter(what: str, sender: str, receiver: str, kind: str, r: int, **more: Any) -> None:
        ledger.append({
            "id": len(ledger), "t": round(clock, 4), "what": what, "from": sender, "to": receiver,
            "kind": kind, "round": r, "bytes": 0, "values": 0, "seconds": 0.0, "joules": 0.0,
            "money": 0.0, "flops": 0.0, "session": None, "sequence": len(ledger), "note": "",
        } | more)  # fmt: skip

    def score(r: int) -> None:
        values = start * (1.0 - _drop(method, r) * (1.0 + 4.0 * tilt))
        for name, value in zip(NAMES, values, strict=True):
            scope = f"client/{name}" if method != "local" else f"client/{name}/personal"
            metrics.append({"round": r, "t": round(clock, 4), "scope": scope, "split": "test",
                            "loss": math.log(value), "perplexity": float(value)})  # fmt: skip
        if method != "local":
            mean = float(np.exp(np.mean(np.log(values))))
            metrics.append({"round": r, "t": round(clock, 4), "scope": "global", "split": "test",
                            "loss": math.log(mean), "perplexity": mean})  # fmt: skip

    score(0)
    down = {"fedmomentum": 142_336, "fedit": 131_584, "local": 0}[method]
    up = {"fedmomentum": 66_304, "fedit": 131_584, "local": 0}[method]
    for r in range(1, ROUNDS + 1):
        slowest = 0.0
        for i, name in enumerate(NAMES):
            party = f"client/{name}"
            train = 2.1 + 0.35 * i + 0.1 * float(rng.random())
            if down:
                enter("crossing", "server", party, "model", r, bytes=down + 96, values=down,
                      seconds=down / 2.5e5, joules=0.11)  # fmt: skip
            enter("work", party, party, "train", r, seconds=train, joules=4.0 * train, flops=3e9)
            enter("work", party, party, "score", r, seconds=0.4, joules=1.2, flops=4e8)
            if up:
                enter("crossing", party, "server", "update", r, bytes=up + 64, values=up,
                      seconds=up / 8e4, joules=0.42)  # fmt: skip
            slowest = max(slowest, train + 0.4 + down / 2.5e5 + up / 8e4)
        clock += slowest
        if up:
            enter("work", "server", "server", "aggregate", r, seconds=0.12, joules=3.4)
            clock += 0.12
        score(r)
    for name, rows in (("ledger", ledger), ("metrics", metrics)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(name="write_run")
def write_run_fixture() -> Callable[..., Path]:
    return write_run


def _three(root: Path) -> list[Path]:
    return [
        write_run(root / "fedmomentum", "fedmomentum", "FedMomentum"),
        write_run(root / "fedit", "fedit", "FedIT"),
        write_run(root / "local", "local", "Local only"),
    ]


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """The three runs, to be changed by a test as it likes."""
    return _three(tmp_path / "runs")


@pytest.fixture(scope="session")
def three_once(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The three runs, written once, only read."""
    return _three(tmp_path_factory.mktemp("runs"))
