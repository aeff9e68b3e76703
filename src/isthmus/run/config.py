"""The settings of a run: the same keys in YAML, in Python and on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isthmus.errors import InputError

Executor = Literal["auto", "vectorised", "sequential", "ray", "flower"]
Compile = Literal["auto", "none", "trace", "compile"]


class Config(BaseModel):
    """Everything that decides a training run; what is `auto` is written out once chosen."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="constants"
    )

    task: str = Field("digits", description="what is learned: a task's name, or path.py:name")
    method: str = Field("fedavg", description="how it is learned: a method's name, or path.py:name")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="the method's own settings, e.g. --set settings.mu=0.1"
    )
    model: str | None = Field(
        None, description="tiny, small or paper; for text a model's name, folder, id or .bin file"
    )
    data_dir: Path | None = Field(
        None, description="folder of real data; without it the task's offline data"
    )

    clients: int = Field(10, ge=1, description="how many clients there are")
    cohort: int | None = Field(None, ge=1, description="clients in a round; all without it")
    sampling: Literal["fixed", "poisson"] = Field(
        "fixed", description="cohorts of fixed size, or every client by its own coin"
    )
    schedule: str = Field(
        "sync", description="who works when: sync, fedasync, fedbuff:k=5, fedcompass:qmin=20 ..."
    )
    rounds: int = Field(20, ge=1, description="rounds of communication, or mixes")
    partition: str = Field(
        "auto", description="iid, dirichlet:0.3,minimum=10, shards:2 or natural (by owner)"
    )
    ranks: tuple[int, ...] = Field(
        (), description="adapter ranks of the clients, repeated in turn; the method's without it"
    )

    epochs: int = Field(1, ge=1, description="passes over a client's data in a round")
    steps: int | None = Field(None, ge=1, description="local updates in a round, instead of epochs")
    batch: int | None = Field(None, ge=0, description="batch size (0: all of a client's data)")
    optimiser: str | None = Field(
        None, description="sgd, adam or adamw, with options: sgd:momentum=0.9"
    )
    lr: float | None = Field(None, gt=0.0, description="learning rate of the clients")
    lr_decay: float = Field(
        1.0, gt=0.0, le=1.0, description="factor on the learning rate per round"
    )

    codec: str = Field(
        "dense", description="of uploads: dense:bf16, int8, topk:0.01|int8, sign ..."
    )
    feedback: bool = Field(False, description="keep the codec's error and send it next time")
    download: str = Field("dense", description="codec of downloads")
    clip: float | None = Field(None, gt=0.0, description="largest norm of an upload")
    privacy: Literal["none", "local", "central"] = Field(
        "none", description="Gaussian noise on each upload, or on their sum"
    )
    mask: str | None = Field(
        None, description="secure aggregation: secagg, with options: secagg:threshold=0.7,bits=16"
    )
    noise: float = Field(0.0, ge=0.0, description="noise multiplier: standard deviation / clip")
    delta: float = Field(1e-5, gt=0.0, lt=1.0, description="delta of the reported epsilon")
    public: tuple[str, ...] = Field(
        (), description="fields that may go up without noise: buffers, scalars, examples"
    )
    selector: str | None = Field(None, description="whose uploads count: krum:f=2, multi-krum:f=2")
    reducer: str | None = Field(None, description="instead of the mean: median, trimmed-mean:f=2")
    attack: str | None = Field(None, description="sign-flip:scale=3, gaussian")
    attackers: int = Field(0, ge=0, description="how many clients the attacker holds (the first)")
    guard: Literal["raise", "drop", "clip"] = Field(
        "raise", description="what happens to uploads with NaN or infinity"
    )

    link: str = Field(
        "wifi", description="each client's link: a name, or up=5e6,down=20e6,latency=0.02"
    )
    devices: tuple[str, ...] = Field(("phone",), description="device profiles, repeated in turn")
    speeds: str = Field(
        "equal", description="how much slower each client is: equal, 1,2,4 or lognormal:0.5"
    )
    jitter: float = Field(0.0, ge=0.0, description="how much a visit's time varies (log scale)")
    dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="chance that a client vanishes before it has sent"
    )
    awake: str | None = Field(None, description="hours a device can be reached, as in 8/24")
    battery: float | None = Field(
        None, gt=0.0, description="joules that a device may spend; then it takes part no more"
    )
    deadline: float | None = Field(
        None, gt=0.0, description="seconds after which a round waits for no upload"
    )

    executor: Executor = Field("auto", description="who computes a cohort")
    compile: Compile = Field("auto", description="replay (trace) or compile the clients' steps")
    chunk: int = Field(0, ge=0, description="clients in memory at a time (0: the whole cohort)")
    threads: int | None = Field(None, ge=1, description="threads of arithmetic")
    workers: int = Field(
        0, ge=0, description="processes of the ray executor (0: one for each processor)"
    )

    evaluate: int = Field(1, ge=0, description="score every so many rounds (0: before and after)")
    evaluate_items: int | None = Field(
        None, ge=1, description="test items to score (of each owner, where owners are natural)"
    )
    holdout: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="share of each client's own items on which it is tested, instead of the task's",
    )
    split: Literal["test", "val"] = Field(
        "test", description="items that are scored: for the result, or to choose by"
    )
    score: Literal["mixed", "trained"] = Field(
        "mixed", description="models are scored just after mixing, or after local training"
    )
    checkpoint: int = Field(1, ge=0, description="checkpoint every so many rounds (0: never)")
    seed: int = Field(0, ge=0, description="of every draw")

    @classmethod
    def make(cls, given: Mapping[str, Any]) -> Config:
        """From plain values; raises one `InputError` that names the field."""
        try:
            return cls(**given)
        except ValidationError as error:
            raise explained(error, cls) from None

    @classmethod
    def read(cls, path: Path | str) -> dict[str, Any]:
        """The keys of a YAML file."""
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError:
            raise InputError("config", path, "a YAML file that exists") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise InputError("config", path, "a file in YAML") from None
        if not isinstance(loaded, dict):
            raise InputError("config", path, "a YAML file of keys and values")
        return loaded

    def dump(self) -> str:
        """As YAML, in the order of the fields."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def explained(error: ValidationError, model: type[BaseModel], prefix: str = "") -> InputError:
    """The first fault that pydantic found, as one line."""
    fault = error.errors()[0]
    where = prefix + ".".join(str(part) for part in fault["loc"])
    given = fault.get("input")
    if fault["type"] == "extra_forbidden":
        names = list(model.model_fields)
        near = difflib.get_close_matches(str(fault["loc"][-1]), names, n=1, cutoff=0.5)
        allowed = ", ".join(prefix + name for name in names) or "no settings"
        return InputError(where, given, allowed, prefix + near[0] if near else None)
    message = str(fault["msg"])
    allowed = message.removeprefix("Input should be ").removeprefix("Value error, ")
    return InputError(where, given, allowed)


def assign(keys: dict[str, Any], assignments: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """`a.b=c` assignments over nested keys; values are read as YAML.

    >>> assign({"rounds": 3}, ["settings.mu=0.1", "rounds=5"])
    {'rounds': 5, 'settings': {'mu': 0.1}}
    """
    out = dict(keys)
    for text in assignments:
        path, sign, value = text.partition("=")
        if not sign or not path:
            raise InputError("set", text, "key=value, as in settings.mu=0.1")
        at = out
        *parents, last = path.split(".")
        for parent in parents:
            inner = at.get(parent)
            at[parent] = dict(inner) if isinstance(inner, dict) else {}
            at = at[parent]
        at[last] = yaml.safe_load(value)
        if isinstance(at[last], str) and _number(at[last]):
            at[last] = float(at[last])
    return out


def _number(text: str) -> bool:
    """YAML reads 1e-3 as a word; people mean a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
