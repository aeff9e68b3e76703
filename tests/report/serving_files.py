"""What two methods answered, written as files with numbers that can be added up by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Token = tuple[str, str, float]

DSSD: list[dict[str, Any]] = [
    {
        "owner": "anna", "prompt": "Once upon", "seconds": 0.5, "rounds": [(4, 2), (2, 2)],
        "tokens": [(" a", "accepted", 0.25), (" time", "accepted", 0.25), (",", "corrected", 0.25),
                   (" in", "accepted", 0.5), ("de", "accepted", 0.5), ("ed", "bonus", 0.5)],
    },
    {
        "owner": "ben", "prompt": "Return", "seconds": 0.75, "rounds": [(4, 0), (0, 0)],
        "tokens": [(" the", "corrected", 0.25), (" end", "target", 0.75)],
    },
]  # fmt: skip
ALONE: list[dict[str, Any]] = [
    {"owner": "anna", "prompt": "Once upon", "seconds": 0.125, "rounds": [],
     "tokens": [("!", "device", 0.0625), ("?", "device", 0.125)]},
]  # fmt: skip


def write_serving(
    run: Path, method: str, answers: list[dict[str, Any]], number: int = 0, /, **about: Any
) -> Path:
    """`RUN/serving/<method>` in the exact file formats."""
    place = run / "serving" / method
    place.mkdir(parents=True)
    told = {"number": number, "method": method, "lossless": method != "device-only",
            "target": "runs/x", "draft": "embedded:draft", "link": "lte", "device": "phone",
            "edge": "edge-server", "seed": 3} | about  # fmt: skip
    (place / "serving.json").write_text(json.dumps(told))
    rows = []
    for answer in answers:
        tokens = [
            {"id": i, "text": text, "origin": origin, "t": t}
            for i, (text, origin, t) in enumerate(answer["tokens"])
        ]
        rounds = [{"at": 0, "drafted": d, "accepted": a} for d, a in answer["rounds"]]
        rows.append({**answer, "tokens": tokens, "rounds": rounds, "problem": ""})
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = [] if method == "device-only" else [
        _row("crossing", "device/0", "edge", "open", bytes=300, joules=0.5),
        _row("crossing", "edge", "device/0", "opened", bytes=100, joules=0.125),
        _row("crossing", "device/0", "edge", "offer", bytes=40, joules=0.25),
        _row("crossing", "device/1", "edge", "offer", bytes=60, joules=0.25),
        _row("crossing", "edge", "device/0", "verdict", bytes=1000, joules=0.75),
        _row("work", "edge", "edge", "verify", joules=64.0),
    ]  # fmt: skip
    ledger.append(_row("work", "device/0", "device/0", "draft", joules=0.375))
    (place / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger))
    return place


def _row(what: str, sender: str, receiver: str, kind: str, **cells: Any) -> dict[str, Any]:
    return {"what": what, "from": sender, "to": receiver, "kind": kind, "t": 0.0, **cells}
