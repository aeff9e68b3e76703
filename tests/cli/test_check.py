"""`isthmus check` and the promises behind it: ours keep them, each way to break one is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus import cli
from isthmus.errors import InputError
from isthmus.run import conformance
from isthmus.run.build import method_of
from isthmus.run.conformance import methods

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["own_method.py:FedRoot", "own_task.py:spiral"])
def test_the_examples_keep_every_promise(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(EXAMPLES / name)]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert len(lines) > 5 and all(line.startswith("ok ") for line in lines)
    assert total.endswith(f"{len(lines)} of {len(lines)} promises kept")


def test_the_examples_run() -> None:
    from isthmus import train

    method, task = str(EXAMPLES / "own_method.py:FedRoot"), str(EXAMPLES / "own_task.py:spiral")
    keys = {"clients": 4, "rounds": 2, "partition": "dirichlet:0.3", "link": "wifi"}
    ends = [
        train(task, name, settings=settings, **keys).final["loss"]
        for name, settings in (("fedavg", {}), (method, {"power": 1.0}), (method, {"power": 0.0}))
    ]
    assert ends[0] == ends[1] != ends[2]


@pytest.mark.parametrize("name", ["scaffold", "local-only", "FedMomentum"])
def test_our_own_methods_keep_every_promise(name: str) -> None:
    assert [line for line in conformance.check(name) if not line.ok] == []


def test_a_plug_in_over_another_method_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    """What is looked at has the hooks of both."""
    assert cli.main(["check", "DBE+fedala"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines) and total.startswith("DBE+fedala: 7 of 7")
    both, dbe, fedala = (overridden(name) for name in ("dbe+fedala", "dbe", "fedala"))
    assert both == dbe | fedala and len(both) > max(len(dbe), len(fedala))
    assert both == set(lines[0].partition("overrides ")[2].split(", "))
    for wrong, words in (("fedavg+dbe", "before the +, not fedavg"), ("dbe+fdala", "feda")):
        assert cli.main(["check", wrong]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def overridden(name: str) -> set[str]:
    return set(methods.hooks(method_of(name)).removeprefix("overrides ").split(", "))


HEAD = """
import torch
from isthmus import tree
from isthmus.federated.method import Method

class Mine(Method):
"""

METHODS = {
    "draws": (
        """
    def finish(self, visit, params, down, carry, kept):
        update, kept = super().finish(visit, params, down, carry, kept)
        update.delta = {n: x + 0.01 * torch.randn(x.shape) for n, x in update.delta.items()}
        return update, kept
""",
        {
            "nothing given is changed": "drew from the global generator of torch",
            "the seed decides every bit": "two runs differ in",
            "vectorised equals sequential": "",
        },
    ),
    "mutates": (
        """
    def server(self, state, reduced, meta):
        for name, x in state["shared"].items():
            x += reduced.tensors[name]
        return state
""",
        {"nothing given is changed": "changed in place: the server's state"},
    ),
    "mutates a download": (
        """
    def finish(self, visit, params, down, carry, kept):
        update, kept = super().finish(visit, params, down, carry, kept)
        for x in down.values():
            x.zero_()
        return update, kept
""",
        {
            "nothing given is changed": "changed in place: the download",
            "vectorised equals sequential": "of its norm",  # alone, the next client starts there
        },
    ),
    "remembers": (
        """
    def weigh(self, meta):
        self.count = getattr(self, "count", 0) + 1
        return super().weigh(meta) if self.count == 1 else super().weigh(meta[::-1])
""",
        {"nothing given is changed": "changed in place: self.count"},
    ),
    "branches": (
        """
    def loss(self, model, batch, carry):
        value, aux = super().loss(model, batch, carry)
        return (value if value.item() > 1.0 else 2 * value), aux
""",
        {"vectorised equals sequential": "RuntimeError"},
    ),
    "knows who is alone": (
        """
    def finish(self, visit, params, down, carry, kept):
        update, kept = super().finish(visit, params, down, carry, kept)
        alone = not torch._C._functorch.is_batchedtensor(next(iter(params.values())))
        return type(update)(tree.scale(update.delta, 1.001 if alone else 1.0)), kept
""",
        {"vectorised equals sequential": "of its norm"},
    ),
    "leaks": (
        """
    @classmethod
    def roles(cls, given, places):
        return {n: "local" if n.startswith("head") else r for n, r in given.items()}

    def finish(self, visit, params, down, carry, kept):
        update, kept = super().finish(visit, params, down, carry, kept)
        update.values = {"x/head.bias": params["head.bias"]}
        return update, kept
""",
        {"only shared tensors go up": "x/head.bias: went up and is not shared"},
    ),
    "takes too little": (
        """
    def weigh(self):
        return torch.ones(1)
""",
        {"hooks take what they are called with": "weigh(self, meta)"},
    ),
    "stands still": (
        """
    def server(self, state, reduced, meta):
        return state
""",
        {"training moves the model": "the outputs are those of the start"},
    ),
}


@pytest.mark.parametrize("way", METHODS)
def test_a_broken_promise_of_a_method_is_found(way: str, tmp_path: Path) -> None:
    body, expected = METHODS[way]
    file = tmp_path / "mine.py"
    file.write_text(HEAD + body)
    broken = {line.name: line.detail for line in conformance.check(f"{file}:Mine") if not line.ok}
    for name, words in expected.items():
        assert words in broken.pop(name)
    if way not in ("takes too little", "stands still"):  # these break others on their way
        assert broken == {}


TASK = """
import torch
from torch import nn
from isthmus import seeds
from isthmus.tasks import Task, Items, Splits, Card, Stage, weighted_mean
from isthmus.tasks.losses import cross_entropy
from isthmus.tasks.metrics import Accuracy
from isthmus.models.nets import mlp

class Mean(Accuracy):
    def merge(self, a, b):
        return {name: (a[name] + b[name]) / 2 for name in a}

class Mine(Task):
    card, metric = Card("mine"), Accuracy()
    net = mlp([3, 8, 2], seed=9)
    shift = 0.0

    def synthesise(self, seed=0, size="small"):
        def items(word):
            x = torch.randn(60, 3, generator=self.generator(seed, word))
            return Items({"x": x, "y": (x.sum(1) > 0).long()})
        return Splits(items("train"), items("val"), items("test"))

    def generator(self, seed, word):
        return seeds.generator(seed, word)

    def build(self, size="small", seed=0):
        return mlp([3, 8, 2], seed=seed)

    def stages(self):
        return [Stage("train", self.loss, lr=0.5, batch_size=16)]

    def loss(self, model, batch):
        outputs = self.predict(model, self.inputs(batch.columns))
        return weighted_mean(cross_entropy(outputs, batch["y"]), batch.weight), {}
"""

TASKS = {
    "draws": (
        "    def generator(self, seed, word):\n        return None\n",
        {"same seed, same data": "train differs between two calls"},
    ),
    "forgets the seed": (
        "    def build(self, size='small', seed=0):\n        return nn.Linear(3, 2)\n",
        {"same seed, same model": "the weights differ between two calls"},
    ),
    "reduces": (
        "    def loss(self, model, batch):\n"
        "        outputs = self.predict(model, self.inputs(batch.columns))\n"
        "        return cross_entropy(outputs, batch['y']).mean(), {}\n",
        {"padding does not count": "padded"},
    ),
    "branches": (
        "    def loss(self, model, batch):\n"
        "        value, aux = super().loss(model, batch)\n"
        "        return (value if float(value) > 0 else -value), aux\n",
        {"one loss for one client and for many": "RuntimeError"},
    ),
    "diverges": (
        "    def stages(self):\n"
        "        return [Stage('train', self.loss, lr=300.0, batch_size=16)]\n",
        {"the loss falls": "in 60 steps"},
    ),
    "averages": (
        "    metric = Mean()\n",
        {"the metric of the parts is that of the whole": "merged"},
    ),
    "ignores the model": (
        "    def predict(self, model, inputs, context=None):\n"
        "        return self.net(inputs['x']) + 0 * model(inputs['x'])\n",
        {
            "the loss falls": "in 60 steps",
            "a bound model predicts as the model does": "do not depend on the model's tensors",
        },
    ),
    "deals twice": (
        "    def partition(self, items, n, scheme='iid', seed=0, **options):\n"
        "        parts = super().partition(items, n, scheme, seed, **options)\n"
        "        return [parts[0], *parts[:-1]]\n",
        {"every item has one owner": "an item has no owner, or several"},
    ),
    "names no role": (
        "    def stages(self):\n"
        "        return [Stage('train', self.loss, roles=(('head.*', 'shared'),), lr=0.5)]\n",
        {"every tensor has a role": "InputError"},
    ),
}


@pytest.mark.parametrize("way", TASKS)
def test_a_broken_promise_of_a_task_is_found(way: str, tmp_path: Path) -> None:
    body, expected = TASKS[way]
    file = tmp_path / "mine.py"
    file.write_text(f"{TASK}\nclass Broken(Mine):\n{body}")
    lines = conformance.check(f"{file}:Broken")
    broken = {line.name: line.detail for line in lines if not line.ok}
    for name, words in expected.items():
        assert words in broken.pop(name)
    assert all(line.ok for line in conformance.check(f"{file}:Mine"))


def test_names_that_lead_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(TASK + "\nnumber = 3\n")
    for name, words in (
        ("fedavgg", "nearest: fedavg"),
        (f"{file}:Mne", "nearest: M"),
        (f"{tmp_path / 'no.py'}:Mine", "path.py:name of an existing file"),
        (f"{file}:number", "a Method, a Task, or a function that returns a Task"),
    ):
        assert cli.main(["check", name]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and words in said.err


def test_a_broken_promise_is_shown_and_is_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{TASK}\nclass Broken(Mine):\n{TASKS['averages'][0]}")
    assert cli.main(["check", f"{file}:Broken"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("BROKEN")] != []
    assert said[-1].endswith("8 of 9 promises kept")


def test_a_function_that_returns_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mine():\n    return 3\n")
    with pytest.raises(InputError, match="a function that returns one"):
        conformance.check(f"{file}:mine")
