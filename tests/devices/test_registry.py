"""The registry: SPARQL beside plain loops on random graphs, and what holds of every match."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from isthmus import catalogue, cli
from isthmus.devices.registry import Registry
from isthmus.errors import InputError

rdflib = pytest.importorskip("rdflib")
pytest.importorskip("pyshacl")
from rdflib.compare import isomorphic  # noqa: E402

OPERATORS = ("ADD", "CONV_2D", "SOFTMAX", "RESHAPE")
QUANTITIES = ("sound", "light", "motion")
HEAD = """@prefix : <urn:test#> . @prefix dcterms: <http://purl.org/dc/terms/> .
@prefix edge: <urn:isthmus:edge#> . @prefix sosa: <http://www.w3.org/ns/sosa/> .
@prefix ssn: <http://www.w3.org/ns/ssn/> . @prefix td: <https://www.w3.org/2019/wot/td#> .
"""


class Device(NamedTuple):
    ram: int
    flash: int
    operators: tuple[tuple[str, ...], ...]
    sensors: tuple[tuple[str, int, float], ...]


class Model(NamedTuple):
    peak: int
    size: int
    operators: tuple[str, ...]
    inputs: tuple[tuple[str, int, float], ...]


class World(NamedTuple):
    devices: dict[str, Device]
    models: dict[str, Model]
    deployed: tuple[tuple[str, str], ...]


def some(rng: np.random.Generator, of: tuple[Any, ...], least: int = 1) -> tuple[Any, ...]:
    return tuple(x for x in of if rng.random() < 0.7) or of[:least]


def reading(rng: np.random.Generator) -> tuple[str, int, float]:
    return str(rng.choice(QUANTITIES)), int(rng.integers(1, 4)), float(rng.integers(1, 5)) / 2


def world(seed: int) -> World:
    rng = np.random.default_rng(seed)
    devices = {
        f"d{i}": Device(
            int(rng.integers(6, 14)),
            int(rng.integers(6, 14)),
            tuple(some(rng, OPERATORS) for _ in range(rng.integers(1, 3))),
            tuple(reading(rng) for _ in range(rng.integers(0, 9))),
        )
        for i in range(6)
    }
    models = {
        f"m{i}": Model(
            int(rng.integers(1, 7)),
            int(rng.integers(1, 7)),
            tuple(x for x in OPERATORS if rng.random() < 0.4) or ("ADD",),
            tuple(reading(rng) for _ in range(rng.integers(1, 3))),
        )
        for i in range(6)
    }
    deployed = [(f"d{rng.integers(6)}", f"m{rng.integers(6)}") for _ in range(3)]
    return World(devices, models, (*deployed, deployed[0]))  # one model twice on one device


def turtle(world: World) -> str:
    lines = [HEAD]
    for name, d in world.devices.items():
        runtimes = ", ".join(
            "[ a edge:Runtime ; edge:operator " + ", ".join(f'"{o}"' for o in ops) + " ]"
            for ops in d.operators
        )
        sensors = ", ".join(
            f"[ a sosa:Sensor ; sosa:observes :{q} ; edge:values {v} ; edge:rate {r} ]"
            for q, v, r in d.sensors
        )
        lines.append(
            f':{name} a edge:Device, td:Thing ; td:title "{name}" ; edge:mcu "x" ; edge:ram {d.ram}'
            f" ; edge:flash {d.flash} ; edge:runtime {runtimes}"
            + (f" ; sosa:hosts {sensors} ." if sensors else " .")
        )
    for name, m in world.models.items():
        operators = ", ".join(f'"{o}"' for o in m.operators)
        inputs = ", ".join(
            f"[ a edge:Input ; edge:quantity :{q} ; edge:values {v} ; edge:rate {r} ;"
            " edge:window 2 ; edge:valueBytes 4 ]"
            for q, v, r in m.inputs
        )
        lines.append(
            f':{name} a edge:Model ; dcterms:title "{name}" ; dcterms:license "MIT" ;'
            f' edge:task "t" ; edge:file "{name}.tflite" ; edge:peakRam {m.peak} ;'
            f" edge:size {m.size} ; edge:operator {operators} ; edge:input {inputs} ."
        )
    for i, (d, m) in enumerate(world.deployed):
        lines.append(
            f":p{i} a ssn:Deployment ; ssn:deployedOnPlatform :{d} ; ssn:deployedSystem :{m} ."
        )
    return "\n".join(lines)


def registry(world: World) -> Registry:
    return Registry(rdflib.Graph().parse(data=turtle(world), format="turtle"))


def by_hand(world: World) -> set[tuple[str, str, int, int]]:
    """Every (device, model, free RAM, free flash) that fits, by loops over the plain records."""
    found = set()
    for device, d in world.devices.items():
        there = [world.models[m] for place, m in world.deployed if place == device]
        ram, flash = d.ram - sum(m.peak for m in there), d.flash - sum(m.size for m in there)
        runs = {operator for ops in d.operators for operator in ops}
        for model, m in world.models.items():
            sensed = all(
                any(q == s and v <= n and Fraction(r) <= Fraction(f) for s, n, f in d.sensors)
                for q, v, r in m.inputs
            )
            if m.peak <= ram and m.size <= flash and set(m.operators) <= runs and sensed:
                found.add((device, model, ram - m.peak, flash - m.size))
    return found


def asked(registry: Registry) -> set[tuple[str, str, int, int]]:
    """All matches by `models_for`; the same as by `devices_for`."""
    one = {tuple(fit) for d in registry.names("Device") for fit in registry.models_for(d)}
    other = {tuple(fit) for m in registry.names("Model") for fit in registry.devices_for(m)}
    assert one == other
    return one


def test_queries_equal_loops_on_random_graphs() -> None:
    matches = 0
    for seed in range(4):
        made = world(seed)
        expected = by_hand(made)
        assert asked(registry(made)) == expected
        matches += len(expected)
    assert 10 < matches < 4 * 36 / 2


def test_matches_are_ranked_by_what_stays_free() -> None:
    made = registry(world(1))
    fits = [made.models_for(device) for device in world(1).devices]
    assert any(len(fit) > 1 for fit in fits)
    for fit in fits:
        free = [(f.free_ram, f.free_flash) for f in fit]
        assert free == sorted(free, reverse=True)


@pytest.mark.parametrize("memory", ["ram", "flash"])
def test_more_memory_never_removes_a_match(memory: str) -> None:
    gained = 0
    for seed in range(30):
        made = world(seed)
        more = {n: d._replace(**{memory: getattr(d, memory) + 3}) for n, d in made.devices.items()}
        grown = made._replace(devices=more)
        before = {fit[:2] for fit in by_hand(made)}
        if gained < 2 and {fit[:2] for fit in by_hand(grown)} != before:
            asked_again = registry(grown)
            after = {fit[:2] for device in more for fit in asked_again.models_for(device)}
            assert before < after
            gained += 1
    assert gained == 2


def test_without_the_needed_sensor_there_is_no_match() -> None:
    removed = 0
    for seed in range(2):
        made = world(seed)
        for device, model, *_ in sorted(by_hand(made)):
            needed = made.models[model].inputs[0][0]
            d = made.devices[device]
            left = tuple(sensor for sensor in d.sensors if sensor[0] != needed)
            blind = {**made.devices, device: d._replace(sensors=left)}
            fits = registry(made._replace(devices=blind)).models_for(device)
            assert model not in {fit.model for fit in fits}
            removed += 1
    assert removed > 5


def test_a_graph_comes_back_from_a_file_as_it_was(tmp_path: Path) -> None:
    for made in (registry(world(0)), Registry.read()):
        made.save(tmp_path / "graph.ttl")
        again = Registry.load(tmp_path / "graph.ttl")
        assert isomorphic(made.graph, again.graph)
        again.graph.remove(next(iter(again.graph)))
        assert not isomorphic(made.graph, again.graph)
    assert [path.name for path in tmp_path.iterdir()] == ["graph.ttl"]


@pytest.mark.parametrize(
    ("taken", "put", "line"),
    [
        ("edge:ram 270336", "edge:location 'roof'", "pico: needs one edge:ram, in whole bytes"),
        (
            "edge:ram 270336",
            "edge:ram 'much'",
            "pico: needs one edge:ram, in whole bytes, not much",
        ),
        ("edge:ram 270336", "edge:ram 0", "pico: needs one edge:ram, in whole bytes, not 0"),
        (
            "edge:runtime :tflm-dense",
            "edge:runtime :nothing",
            "microbit-v2: needs an edge:runtime that is an edge:Runtime, not nothing",
        ),
        (
            "edge:values 3 ; edge:rate 6667",
            "edge:values 3",
            "nicla-vision hosts: needs one edge:rate, readings a second above 0",
        ),
        (
            "edge:window 3072 ;",
            "",
            "ad input: needs one edge:window, a whole number of readings",
        ),
    ],
)
def test_an_incomplete_entry_is_one_line_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], taken: str, put: str, line: str
) -> None:
    from isthmus.devices.registry.registry import text

    whole = text("example.ttl")
    assert taken in whole
    path = tmp_path / "wrong.ttl"
    path.write_text(whole.replace(taken, put, 1))
    assert line in Registry.read(path).violations()
    with pytest.raises(InputError, match="allowed: complete entries"):
        Registry.load(path)
    assert cli.main(["registry", "validate", str(path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert f"{path}: {line}" in out and len(out) <= 2


def test_a_deployment_takes_its_memory_until_nothing_fits(tmp_path: Path) -> None:
    made = Registry.load()
    free = {fit.model: fit for fit in made.models_for("nano-33-ble-sense")}
    first = made.deploy("kws", "nano-33-ble-sense")
    assert first["inputs"] == [
        {"quantity": "sound", "sensor": "MP34DT05", "rate": 16000.0, "window": 16000,
         "buffer_bytes": 32000}
    ]  # fmt: skip
    assert (first["file"], first["free_ram"]) == ("kws_ref_model.tflite", 262144 - 48000)
    now = {fit.model: fit for fit in made.models_for("nano-33-ble-sense")}
    assert now.keys() == free.keys()
    for model, fit in now.items():
        assert free[model].free_ram - fit.free_ram == 48000
        assert free[model].free_flash - fit.free_flash == 53760
    assert made.violations() == []
    made.save(tmp_path / "after.ttl")
    again = Registry.load(tmp_path / "after.ttl")
    names = [again.deploy("kws", "nano-33-ble-sense")["deployment"] for _ in range(4)]
    assert names == [f"nano-33-ble-sense-runs-kws-{i}" for i in (2, 3, 4, 5)]
    with pytest.raises(InputError, match="for kws: nicla-vision"):
        again.deploy("kws", "nano-33-ble-sense")


def test_the_slowest_sensor_that_is_fast_enough_is_bound() -> None:
    sensors = (("sound", 1, 1.0), ("sound", 2, 9.0), ("sound", 2, 4.0), ("light", 2, 3.0))
    made = registry(
        World(
            {"d": Device(9, 9, (("ADD",),), sensors)},
            {"m": Model(1, 1, ("ADD",), (("sound", 2, 2.0),))},
            (),
        )
    )
    made.deploy("m", "d")
    (row,) = made.graph.query(
        "PREFIX edge: <urn:isthmus:edge#> SELECT ?rate ?size WHERE "
        "{ ?b edge:sensor/edge:rate ?rate ; edge:bufferBytes ?size }"
    )
    assert (float(row.rate), int(row.size)) == (4.0, 2 * 2 * 4)


def test_the_command_answers_and_writes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.ttl"
    Registry.read().save(path)
    assert cli.main(["registry", "devices", "kws", "--graph", str(path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["device"] for row in listed] == ["nicla-vision", "nano-33-ble-sense"]
    assert cli.main(["registry", "deploy", "kws", "nicla-vision", "--graph", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "nicla-vision"
    assert cli.main(["registry", "models", "nicla-vision", "--graph", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "1,048,576" not in lines[0]
    assert cli.main(["registry", "models", "pico"]) == 0
    assert capsys.readouterr().out == "nothing fits\n"


def test_what_cannot_be_answered_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.ttl"
    broken.write_text(":a :b")
    for given, said in (
        (["models", "nicla"], "nearest: nicla-vision"),
        (["devices", "kws", "vww"], "a MODEL"),
        (["models", "pico", "--graph", str(broken)], "Turtle"),
        (["models", "pico", "--graph", str(tmp_path / "none.ttl")], "a readable file"),
    ):
        assert cli.main(["registry", *given]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_it_is_the_catalogue_s_tinyml() -> None:
    assert catalogue.find("device", "TinyML") is Registry
