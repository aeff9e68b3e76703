"""The same keys in YAML, in Python and on the command line; one line for whatever is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated import tiny

import isthmus
from isthmus import cli
from isthmus.errors import InputError
from isthmus.run.build import build
from isthmus.run.config import Config, assign
from isthmus.wire.ledger import Ledger

GIVEN: dict[str, Any] = {
    "task": "digits", "method": "fedprox", "settings": {"mu": 0.1}, "model": "tiny", "clients": 3,
    "cohort": 2, "rounds": 1, "partition": "dirichlet:0.5", "epochs": 2, "batch": 40,
    "optimiser": "sgd:momentum=0.5", "lr": 0.05, "codec": "int8", "download": "dense:fp32",
    "clip": 2.0, "selector": None, "attack": "sign-flip:scale=2", "attackers": 1, "guard": "drop",
    "link": "lte,loss=0.01", "devices": ("phone", "laptop"), "executor": "vectorised",
    "compile": "none", "seed": 4,
}  # fmt: skip


def words(keys: dict[str, Any]) -> list[str]:
    """The keys as options."""
    out: list[str] = []
    for name, value in keys.items():
        if name == "settings":
            out += ["--set", *(f"settings.{k}={v}" for k, v in value.items())]
        elif isinstance(value, tuple):
            out += [f"--{name}", *map(str, value)]
        elif value is not None:
            out += [f"--{name.replace('_', '-')}", str(value)]
    return out


def test_yaml_python_and_command_line_are_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    plain = {**GIVEN, "devices": list(GIVEN["devices"])}
    file.write_text(yaml.safe_dump(plain))
    from_python = isthmus.train(**GIVEN, out=tmp_path / "a")
    assert cli.main(["train", "--config", str(file), "--out", str(tmp_path / "b")]) == 0
    assert cli.main(["train", *words(GIVEN), "--out", str(tmp_path / "c")]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "accuracy" in said.out and "bytes up" in said.out
    for name in ("config.yaml", "ledger.jsonl", "metrics.jsonl", "model/model.safetensors"):
        assert len({(tmp_path / run / name).read_bytes() for run in "abc"}) == 1
    assert from_python.config == Config.make(Config.read(tmp_path / "b/config.yaml"))
    written = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    assert all(written[name] == value for name, value in plain.items())
    assert "auto" not in written.values() and None not in (written["threads"], written["cohort"])


def test_what_is_left_open_is_chosen_and_written_down() -> None:
    task = tiny.task((5, 6), optimiser="adam", lr=0.03, batch_size=7)
    given = {"clients": 2, "rounds": 1}
    made = build(Config.make(given), Ledger(), None, task).config
    chosen = (made.executor, made.compile, made.partition, made.cohort, made.threads)
    assert chosen == ("vectorised", "trace", "iid", 2, 1)
    assert (made.optimiser, made.lr, made.batch) == ("adam", 0.03, 7)
    again = build(Config.make(yaml.safe_load(made.dump())), Ledger(), None, task).config
    assert again == made
    settings = {"targets": tiny.LAYERS}
    adapted = build(
        Config.make({**given, "method": "fedit", "settings": settings}), Ledger(), None, task
    )
    assert adapted.config.compile == "none"


def test_options_come_after_the_file_and_set_after_both(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rounds: 7\nlr: 0.5\nclients: 9\n")
    from isthmus.cli.training import keys_of

    made = keys_of({"seed": 3}, file, {"rounds": "8", "lr": None}, ("clients=4",))
    assert (made.rounds, made.lr, made.clients, made.seed) == (8, 0.5, 4, 3)


@settings(max_examples=30)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "clients": st.integers(1, 10**6),
            "lr": st.floats(1e-9, 1e3),
            "steps": st.none() | st.integers(1, 99),
            "ranks": st.lists(st.integers(1, 64), max_size=4).map(tuple),
            "settings": st.dictionaries(st.sampled_from("ab"), st.floats(allow_nan=False)),
            "codec": st.text(max_size=9),
            "privacy": st.sampled_from(["none", "local", "central"]),
            "feedback": st.booleans(),
            "data_dir": st.just(Path("some/where")),
        },
    )
)
def test_what_is_written_is_read_again(keys: dict[str, Any]) -> None:
    config = Config.make(keys)
    assert Config.make(yaml.safe_load(config.dump())) == config
    assert list(yaml.safe_load(config.dump())) == list(Config.model_fields)


@pytest.mark.parametrize(
    ("keys", "field", "said", "nearest"),
    [
        ({"client": 5}, "client", "clients", "clients"),
        ({"lerning_rate": 5}, "lerning_rate", "lr", None),
        ({"rounds": 0}, "rounds", "greater than or equal to 1", None),
        ({"rounds": "many"}, "rounds", "a valid integer", None),
        ({"lr": -0.1}, "lr", "greater than 0", None),
        ({"guard": "rise"}, "guard", "'raise', 'drop' or 'clip'", None),
        ({"sampling": "poison"}, "sampling", "'fixed' or 'poisson'", None),
        ({"devices": 3}, "devices", "a valid tuple", None),
        ({"method": "fedvag"}, "method", "fedavg", "fedavg"),
        ({"settings": {"mu": -1.0}, "method": "fedprox"}, "settings.mu", "greater", None),
        ({"settings": {"nu": 1.0}, "method": "fedprox"}, "settings.nu", "settings.mu",
         "settings.mu"),
        ({"settings": {"mu": 1.0}}, "settings.mu", "no settings", None),
        ({"optimiser": "sdg"}, "optimiser", "sgd, adam, adamw", "sgd"),
        ({"optimiser": "sgd:momentun=0.9"}, "option of sgd", "momentum", "momentum"),
        ({"codec": "int7x"}, "codec", "", None),
        ({"link": "wify"}, "link", "wifi", "wifi"),
        ({"link": "wifi,los=0.1"}, "link", "loss", "loss"),
        ({"devices": ("phon",)}, "device", "phone", "phone"),
        ({"selector": "crum"}, "selector", "krum", "krum"),
        ({"selector": "krum:g=2"}, "selector krum", "f", None),
        ({"reducer": "trimmed-mean:f"}, "reducer trimmed-mean", "options as name=value", None),
        ({"attack": "sign-flip"}, "attackers", "1 to 4", None),
        ({"attackers": 2}, "attackers", "0 without an attack", None),
        ({"cohort": 9}, "cohort", "1 to 5", None),
        ({"ranks": (2,)}, "ranks", "trains no adapter", None),
        ({"method": "fedit", "ranks": (2, 3), "settings": {"targets": ["lower"]}}, "ranks",
         "one rank for all", None),
        ({"method": "fedit", "settings": {"targets": ["nope"]}}, "targets", "nope", None),
        ({"method": "fedit", "settings": {"targets": ["lower"]}, "reducer": "median"}, "reducer",
         "has its own", None),
        ({"partition": "shards"}, "partition", "", None),
        ({"privacy": "local", "noise": 1.0}, "clip", "a bound", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    keys: dict[str, Any], field: str, said: str, nearest: str | None
) -> None:
    task = tiny.task((5, 6, 7, 3, 4))
    given = {"task": "own", "clients": 5, "rounds": 1, "partition": "natural", **keys}
    if "partition" in keys:
        given["partition"] = "nonsense:" + keys["partition"]
    with pytest.raises(InputError) as caught:
        isthmus.train(task, **{k: v for k, v in given.items() if k != "task"})
    error = caught.value
    assert error.field.startswith(field) and said in f"{error.given} {error.allowed}"
    assert "\n" not in str(error) and (nearest is None or error.nearest == nearest)


REFUSED: dict[str, dict[str, Any]] = {
    "central noise: with coordinate reducer": {"privacy": "central", "reducer": "median"},
    "central noise: with selector": {"privacy": "central", "selector": "krum:f=0"},
    "central noise: with adapter-product reducer": {"privacy": "central", "method": "flexlora"},
    "local noise: with examples in the clear": {"privacy": "local"},
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_stand_together_is_refused(line: str, tmp_path: Path) -> None:
    keys = {"noise": 1.0, "clip": 1.0, **REFUSED[line]}
    if keys.get("method") == "flexlora":
        keys["settings"] = {"targets": tiny.LAYERS}
    with pytest.raises(InputError, match=f"^{line} given, allowed: one of the two") as caught:
        isthmus.train(tiny.task((5, 6, 7)), clients=3, out=tmp_path / "run", **keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # the name is free for the next try


def test_a_method_that_cannot_be_vectorised_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.federated.methods.fedavg import FedAvg

    monkeypatch.setattr(FedAvg, "vectorise", False)
    task = tiny.task((5, 6))
    with pytest.raises(InputError, match="vectorised executor: with method that is not vectorised"):
        isthmus.train(task, clients=2, rounds=1, executor="vectorised")
    made = build(Config.make({"clients": 2, "rounds": 1}), Ledger(), None, task)
    assert made.config.executor == "sequential"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--clients", "0"], "clients: 0 given, allowed: greater than or equal to 1"),
        (["--rounds", "few"], "rounds: few given, allowed: a valid integer"),
        (["--method", "fedvag"], "method: fedvag given, allowed: "),
        (["--set", "settings.mu=1"], "settings.mu: 1 given, allowed: no settings"),
        (["--set", "mu"], "set: mu given, allowed: key=value"),
        (["--set", "round=3"], "round: 3 given, allowed: "),
        (
            ["--config", "missing.yaml"],
            "config: missing.yaml given, allowed: a YAML file that exists",
        ),
        (["--resume", "nowhere"], "run: nowhere given, allowed: a run folder with config.yaml"),
        (["--task", "digit"], "task: digit given, allowed: "),
        (["--lr", "1", "--privacy", "central"], "clip: None given, allowed: a bound"),
    ],
)
def test_the_command_says_it_in_one_line(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--model", "tiny", *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"isthmus: {line}") and said.err.count("\n") == 1
    assert "Traceback" not in said.err


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "", "\x00"])
def test_a_file_that_is_no_configuration(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match="config: ") as caught:
        Config.read(file)
    assert "\n" not in str(caught.value)


def test_assignments() -> None:
    keys = {"a": {"b": 1, "c": 2}, "d": 3}
    got = assign(keys, ["a.b=1e-3", "e.f.g=[1, 2]", "d=null", "h=a=b", "i=true"])
    assert got == {
        "a": {"b": 1e-3, "c": 2}, "d": None, "e": {"f": {"g": [1, 2]}}, "h": "a=b", "i": True,
    }  # fmt: skip
    assert keys == {"a": {"b": 1, "c": 2}, "d": 3}
    for bad in ("a", "=1", ""):
        with pytest.raises(InputError, match="set: "):
            assign({}, [bad])
