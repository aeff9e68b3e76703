"""MoE customisation: what stays untouched, who answers, what LE and GN are taught, the cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import local
from torch import Tensor, nn

from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.methods import moe_customisation as moe
from isthmus.federated.methods.moe_customisation import Customised, Settings
from isthmus.federated.score import models_of
from isthmus.models.bind import tensors_of
from isthmus.models.nets import Net, cnn, mlp
from isthmus.tasks.contract import Batch, Items
from isthmus.tree import Tree

QUICK = Settings(rank=3, epochs=4, batch=8)
CUSTOM, REPLAY, TEST = slice(0, 20), slice(20, 45), slice(45, 69)


def net(seed: int = 1) -> Any:
    return mlp([6, 9, 7, 4], seed=seed).double()


def part(rows: slice) -> Items:
    x, y = tiny.data(tiny.RAGGED, local.F64)
    return Items({"x": x[rows], "y": y[rows]})


def made(knobs: Settings = QUICK, replay: bool = True, ge: Any = None) -> Customised:
    ge = net() if ge is None else ge
    return moe.customise(
        tiny.task(module=net), ge, part(CUSTOM), part(REPLAY) if replay else None, knobs, key=3
    )


def set_gate(custom: Customised, value: float) -> None:
    model: Any = custom.model
    with torch.no_grad():
        model.gate.weight.zero_()
        model.gate.bias.fill_(value)


def test_the_network_stays_as_it_is() -> None:
    ge = net()
    before = {n: x.clone() for n, x in tensors_of(ge).items()}
    custom = made(ge=ge)
    assert tree.equal(before, tensors_of(ge)) and list(dict(ge.named_children())) == [
        "features",
        "head",
    ]
    shared = tensors_of(custom.model)
    assert all(shared[n].data_ptr() == x.data_ptr() for n, x in tensors_of(ge).items())
    fresh = tensors_of(moe.with_expert(net(), QUICK, 3))
    moved = {n for n in fresh if not torch.equal(fresh[n], shared[n])}
    assert moved == {n for n in fresh if n.startswith(moe.OWN)} and len(moved) == 5


def test_the_gate_decides_who_answers() -> None:
    ge, custom, x = net(), made(), part(TEST).columns["x"]
    with torch.no_grad():
        set_gate(custom, -1.0)
        assert torch.equal(custom(x), ge(x))
        set_gate(custom, 1.0)
        model: Any = custom.model
        le = model.local_expert(torch.relu(ge.features.linear0(x)))
        assert torch.equal(custom(x), le) and not torch.equal(le, ge(x))


def test_switches_are_a_choice_and_a_mixture() -> None:
    x, y = part(TEST).columns["x"], part(TEST).columns["y"]
    with torch.no_grad():
        hard, soft = made(), made(QUICK.model_copy(update={"switch": "soft"}))
        ge, le, gate = hard.answers(x)
        assert 0 < int((gate > 0).sum()) < len(x)
        rows = [le[i] if gate[i] > 0 else ge[i] for i in range(len(x))]
        assert torch.equal(hard(x), torch.stack(rows))
        g = torch.sigmoid(gate)
        mixed = g * le.softmax(1) + (1 - g) * ge.softmax(1)
        assert tiny.apart({"p": mixed}, {"p": soft(x).exp()}) < 1e-12
        either = (ge.argmax(1) == y) | (le.argmax(1) == y)
        assert int((hard(x).argmax(1) == y).sum()) <= int(either.sum())


@pytest.mark.parametrize("learn_from", ["all", "wrong"])
@pytest.mark.parametrize("replay", [True, False])
def test_what_expert_and_gate_are_taught(learn_from: Any, replay: bool) -> None:
    """Cross-entropy of LE on custom items, logistic loss of GN on all, by hand."""
    knobs = QUICK.model_copy(update={"learn_from": learn_from})
    model: Any = moe.with_expert(net(), knobs, 3)
    given = local.batch(6, n=11)
    generic = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1], dtype=local.F64)
    if replay:
        given = Batch({**given.columns, "generic": generic}, given.weight, given.key)
    x, y, w = given.x, given.y, given.weight
    with torch.no_grad():
        f = torch.relu(model.features.linear0(x))
        wrong = (model.head(model.features(x)).argmax(1) != y).double()
        assert 0 < int(wrong.sum()) < 11
        custom = 1 - generic if replay else torch.ones(11, dtype=local.F64)
        target = custom if replay else wrong
        who = custom * wrong if learn_from == "wrong" else custom
        le, gate = model.local_expert(f), model.gate(f)[:, 0]
        nll = -le.log_softmax(1)[torch.arange(11), y]
        p = torch.sigmoid(gate)
        bce = -(target * p.log() + (1 - target) * (1 - p).log())
        expected = (who * w * nll).sum() / (who * w).sum() + (w * bce).sum() / w.sum()
    stage = tiny.task(module=net).stages()[0]
    value, _ = moe.objective(stage.loss, model, given, knobs)
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-12)


def test_overhead_is_counted() -> None:
    custom, x = made(), part(TEST).columns["x"][:1]
    ge = 6 * 9 + 9 * 7 + 7 * 4
    own = 9 * 3 + 3 * 4 + 9
    counted = moe.overhead(custom, x)
    assert counted.parameters == pytest.approx((own + 4 + 1) / (ge + 9 + 7 + 4))
    assert counted.macs == pytest.approx(own / ge)  # the feature is GE's own


def test_federated_nothing_of_a_client_is_sent_and_the_global_model_is_fedavgs() -> None:
    keys = {"settings": {"epochs": 3, "rank": 3, "batch": 8}}
    task = tiny.task(module=net)
    fed, plain = tiny.play("moe-customisation", task, 3, **keys), tiny.play("fedavg", task, 3)
    assert tree.equal(fed.state["shared"], plain.state["shared"])
    assert fed.ledger.total("bytes") == plain.ledger.total("bytes")
    assert set(tiny.kept(fed)) == {
        *("local_expert.down.weight", "local_expert.up.weight", "local_expert.up.bias"),
        *("gate.weight", "gate.bias"),
    }
    everyone = np.arange(5)
    models = list(models_of(fed, everyone, fed.store.get(everyone)))
    for model in models:
        assert all(torch.equal(model[n], x) for n, x in fed.state["shared"].items())
    assert tiny.apart(models[0], models[1]) > 1e-2  # each client's expert is its own


def test_the_score_phase_is_the_same_one_at_a_time_and_all_at_once() -> None:
    task = tiny.task((3, 17, 1), module=net)
    keys = {"settings": {"epochs": 3, "rank": 3, "batch": 8}}
    everyone = np.arange(3)

    def models(executor: str) -> list[Tree]:
        fed = tiny.play("moe-customisation", task, 1, executor=executor, **keys)
        return list(models_of(fed, everyone, fed.store.get(everyone)))

    for a, b in zip(models("sequential"), models("vectorised"), strict=True):
        assert tiny.apart(a, b) < 1e-10


def test_the_score_phase_is_adam_at_its_own_rate() -> None:
    """One client, all items at once: two steps by torch's Adam from the attached start."""
    task = tiny.task((23,), module=net)
    settings = {"epochs": 2, "rank": 3, "batch": 0, "lr": 0.03}
    fed = tiny.play("moe-customisation", task, 1, lr=0.5, settings=settings)
    (got,) = models_of(fed, np.arange(1), fed.store.get(np.arange(1)))
    model: Any = moe.with_expert(net(0), Settings(rank=3), 0)
    model.load_state_dict({**model.state_dict(), **fed.state["shared"]})
    own = {n: p for n, p in model.named_parameters() if n.startswith(moe.OWN)}
    rule = torch.optim.Adam(own.values(), lr=0.03)
    columns = fed.ground.columns
    for _ in range(2):
        rule.zero_grad()
        given = Batch(dict(columns), torch.ones(23, dtype=local.F64))
        moe.objective(task.stages()[0].loss, model, given, Settings())[0].backward()
        rule.step()
    expected = {n: p.detach() for n, p in own.items()}
    assert tiny.apart(expected, {n: got[n] for n in own}) < 1e-10


def test_features_by_name_and_those_of_pictures() -> None:
    module: Any = cnn([4, 6], 3, inputs=2).double()
    x = local.batch(2, 8, 8).x
    for feature, channels, at in (("", 4, 4), ("pool0", 4, 4), ("relu1", 6, 7)):
        model: Any = moe.with_expert(
            cnn([4, 6], 3, inputs=2).double(), Settings(feature=feature), 0
        )
        assert model.gate.in_features == channels
        f: Tensor = module.features[:at](x).mean((2, 3))
        with torch.no_grad():
            ge, _, gate = moe.answers(model, x, feature)
            assert torch.allclose(gate, model.gate(f)) and torch.equal(ge, module(x))


def test_bad_input_is_one_line() -> None:
    with pytest.raises(InputError, match="relu0"):
        moe.with_expert(net(), Settings(feature="relu9"), 0)
    with pytest.raises(InputError, match="after a linear"):
        moe.with_expert(net(), Settings(feature="flatten"), 0)
    with pytest.raises(InputError, match="a chain `features` and a linear `head`"):
        moe.with_expert(Net(nn.Tanh(), nn.Linear(3, 4)), QUICK, 0)
