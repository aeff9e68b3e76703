"""TinyML at scale: layers that learn on the device, meta-learning, and a registry of who runs what.

Paper (Ren, Anicic, Runkler, arXiv:2405.07601; its abstract has no figures): learning online on the
device, federated meta-learning and a semantic registry together give better accuracy and less use
of resources; TinyReptile (arXiv:2304.05201) is as good as Reptile at half of the resources.

Here: (A) digits as a stream, the network trained on these very items; halfway all labels are moved
on by one. The online layer on the features is held against the head as it was trained, by their
accuracy over the last quarter. (B) The registry's answers on the example graph are held against
plain loops over its triples.

Thresholds: online above 0.8 and frozen below 0.5 (seen with one seed: 0.937 and 0.000); equal sets.
Meta-learning is not judged here; its rules are held against loops by the tests.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from isthmus import seeds
from isthmus.claims.claim import Check, Progress
from isthmus.devices.registry import Registry
from isthmus.learn.online import Online
from isthmus.run.api import train
from isthmus.tasks.digits import Digits


def claim(progress: Progress) -> list[Check]:
    """Two of the three layers, each beside what it is measured against."""
    progress("a stream whose labels change")
    online, frozen = stream(0)
    progress("the registry")
    asked, counted = matches(Registry.load())
    return [
        Check(
            "learns again after a change",
            "better accuracy by learning on the device",
            f"online {online:.3f}, frozen {frozen:.3f} (above 0.8 and below 0.5 asked)",
            online > 0.8 and frozen < 0.5,
        ),
        Check(
            "finds who can run what",
            "devices and models matched by queries",
            f"{len(asked)} pairs by SPARQL, {len(counted)} by loops",
            asked == counted and len(asked) > 0,
        ),
    ]


def stream(seed: int) -> tuple[float, float]:
    """Accuracy over the last quarter: the online layer, and the head that stays."""
    run = train("digits", "fedavg", clients=1, rounds=20, batch=10,
                lr=0.1, evaluate=0, seed=seed)  # fmt: skip
    items = Digits().synthesise(seed).train.columns
    x, y = items["x"], items["y"].long()
    layer = Online(cast(Any, run.model).features, 32, 10, lr=0.05)
    right, stayed = [], []
    order = torch.from_numpy(seeds.rng(seed, "stream").permutation(len(y)))
    for i, j in enumerate(order.tolist()):
        label = int(y[j]) if i < len(order) // 2 else (int(y[j]) + 1) % 10
        right.append(layer.observe(x[j], label) == label)
        with torch.no_grad():
            stayed.append(int(run.model(x[j][None])[0].argmax()) == label)
    last = 3 * len(order) // 4
    return sum(right[last:]) / len(right[last:]), sum(stayed[last:]) / len(stayed[last:])


Pair = tuple[str, str]


def matches(registry: Registry) -> tuple[set[Pair], set[Pair]]:
    """(device, model): as the registry answers, and by loops over the triples of its graph."""
    asked = {(f.device, f.model) for d in registry.names("Device") for f in registry.models_for(d)}
    rows: dict[str, dict[str, list[Any]]] = {}
    for subject, by, value in registry.graph:
        verb = str(by).rpartition("#")[2].rpartition("/")[2]
        rows.setdefault(str(subject), {}).setdefault(verb, []).append(value)

    def number(node: str, verb: str) -> float:
        return float(rows[node][verb][0])

    def feels(device: str, given: str) -> bool:
        return any(
            rows[s]["observes"] == rows[given]["quantity"]
            and all(number(s, verb) >= number(given, verb) for verb in ("values", "rate"))
            for s in map(str, rows[device].get("hosts", []))
        )

    counted = set()
    for device in (node for node, row in rows.items() if "ram" in row):
        runs = {str(o) for r in rows[device]["runtime"] for o in rows[str(r)]["operator"]}
        for model in (node for node, row in rows.items() if "peakRam" in row):
            if (
                number(device, "ram") >= number(model, "peakRam")
                and number(device, "flash") >= number(model, "size")
                and {str(o) for o in rows[model]["operator"]} <= runs
                and all(feels(device, str(i)) for i in rows[model]["input"])
            ):
                counted.add((device.rpartition("#")[2], model.rpartition("#")[2]))
    return asked, counted
