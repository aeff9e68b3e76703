"""tpSGD: local gradients against autograd of each layer's own loss, and what no layer may see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import local
from torch import Tensor, nn

from isthmus.errors import InputError
from isthmus.federated.methods.tpsgd import TpSGD
from isthmus.learn import forward
from isthmus.models import layerwise
from isthmus.models.nets import Net, cnn, mlp
from isthmus.models.recurrent import Recurrent, rnn
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree


def dense(activation: str) -> Callable[[int], Any]:
    return lambda seed: mlp([6, 5, 8, 7, 4], activation, seed)


def pictures(seed: int) -> nn.Module:
    return cnn([4, 6], 4, seed, inputs=2, activation="tanh")


def sequences(seed: int) -> nn.Module:
    return rnn([3, 5, 6, 4], seed)


NETS: list[tuple[Callable[[int], nn.Module], tuple[int, ...]]] = [
    *[(dense(name), (6,)) for name in ("tanh", "relu", "gelu", "silu")],
    (pictures, (2, 9, 7)),
    (sequences, (5, 3)),
]


def built(**settings: Any) -> TpSGD:
    made = local.method("tpsgd", **settings)
    assert isinstance(made, TpSGD)
    return made


def targets(method: TpSGD, module: Any, y: Tensor) -> list[Tensor]:
    """t_k of every hidden layer `[b, units]`."""
    chain = layerwise.layers(module)[:-1]
    client = torch.tensor(3)
    return [method.projection(k, layer, 4, client)[y].double() for k, layer in enumerate(chain)]


def by_autograd(module: Any, given: Batch, t: list[Tensor], absolute: bool, broad: bool) -> Tree:
    """Every layer's own loss by autograd, its input detached; the layers read off the modules."""
    h, k, grads = given.x, 0, {}
    open_: dict[str, nn.Module] = {}

    def learn(o: Tensor, each: Callable[[Tensor], Tensor]) -> None:
        nonlocal k
        miss = t[k] - o.mean((2, 3)) if o.ndim == 4 and not broad else each(t[k]) - o
        own = miss.abs() if absolute else 0.5 * miss.square()
        if own.ndim == 4:
            own = own.sum(1).mean((1, 2))
        elif own.ndim == 3:
            own = own.sum(-1).mean(1) if broad else own[:, -1].sum(-1)
        else:
            own = own.sum(1)
        names = {f"{a}.{b}": p for a, m in open_.items() for b, p in m.named_parameters()}
        got = torch.autograd.grad(local.mean(own, given), list(names.values()))
        grads.update(dict(zip(names, got, strict=True)))
        open_.clear()
        k += 1

    for name, layer in module.features.named_children():
        if isinstance(layer, Recurrent):
            open_ = {f"features.{name}": layer}
            driven, out = layer.inputs(h), [torch.zeros(len(h), layer.width, dtype=h.dtype)]
            for step in range(h.shape[1]):
                out.append(torch.tanh(driven[:, step] + layer.state(out[-1].detach())))
            h = torch.stack(out[1:], dim=1)
            learn(h, lambda t: t[:, None, :])
            h = h.detach()
            continue
        h = layer(h)
        if any(True for _ in layer.parameters()):
            open_[f"features.{name}"] = layer
        elif open_:
            learn(h, (lambda t: t[:, :, None, None]) if h.ndim == 4 else (lambda t: t))
            h = h.detach()
    each = nn.functional.cross_entropy(module.head(h), given.y, reduction="none")
    got = torch.autograd.grad(local.mean(each, given), list(module.head.parameters()))
    return {**grads, "head.weight": got[0], "head.bias": got[1]}


@pytest.mark.parametrize(("make", "shape"), NETS)
@pytest.mark.parametrize("loss", ["squared", "absolute"])
def test_each_layer_descends_its_own_loss(
    make: Callable[[int], nn.Module], shape: tuple[int, ...], loss: str
) -> None:
    module, given = make(1).double(), local.batch(*shape)
    for broad in (False, True):
        where = {"times": "all", "channels": "each"} if broad else {}
        method = built(local_loss=loss, **where)
        t = targets(method, module, given.y)
        expected = by_autograd(module, given, t, loss == "absolute", broad)
        got = local.grads(method, module, given)
        assert got.keys() == expected.keys() == dict(module.named_parameters()).keys()
        for name, g in expected.items():  # a bias before a norm of its own has gradient 0
            torch.testing.assert_close(got[name], g, rtol=1e-11, atol=1e-13)


def test_targets_lie_in_the_range_of_the_activation() -> None:
    method = built()
    for activation, values in (("tanh", [-1, 1]), ("relu", [0, 1]), ("silu", [0, 1])):
        t = targets(method, dense(activation)(0), torch.arange(4))
        assert all(torch.unique(p).tolist() == values for p in t)
        assert not torch.equal(t[0][:, :5], t[1][:, :5])  # layers have projections of their own


def test_no_graph_leads_through_the_net() -> None:
    module, given = dense("tanh")(1).double(), local.batch(6)
    through = {"AddmmBackward", "MmBackward", "TanhBackward", "TBackward"}
    plain = local.graph(local.value(local.method("fedavg"), module, given)[0])
    assert {"AddmmBackward", "TanhBackward"} <= plain
    total, _ = local.value(built(), module, given)
    names = local.graph(total)
    assert "AccumulateGrad" in names and not names & through
    assert "MulBackward" in names and not any("Softmax" in name for name in names)


@pytest.mark.parametrize("name", ["tpsgd", "fedavg"])
def test_memory_does_not_grow_with_depth(name: str) -> None:
    """Two activations and what a layer's step needs of them, however many layers there are."""
    peaks = []
    for depth in (3, 9):
        module = mlp([6, *[11] * depth, 4], "tanh", 1).double()
        given = local.batch(6, n=23)
        method = local.method(name)
        with local.Alive(23 * 11 * 8) as alive:
            local.value(method, module, given)
        peaks.append(alive.peak)
    assert peaks[0] <= 7
    assert peaks[1] == peaks[0] if name == "tpsgd" else peaks[1] >= peaks[0] + 6


def test_what_comes_after_a_layer_does_not_reach_it() -> None:
    method, given = built(), local.batch(6)
    module, other = dense("tanh")(1).double(), dense("tanh")(1).double()
    with torch.no_grad():
        other.features.linear1.weight.mul_(-3.0)
    a, b = (local.grads(method, m, given) for m in (module, other))
    same = {n for n in a if torch.equal(a[n], b[n])}
    assert {n for n in a if "linear0" in n} <= same
    assert not same & {"features.linear2.weight", "head.weight", "features.linear1.weight"}
    plain = local.method("fedavg")
    c, d = (local.grads(plain, m, given) for m in (module, other))
    assert not torch.equal(c["features.linear0.weight"], d["features.linear0.weight"])


def test_without_its_output_the_error_is_that_of_drtp() -> None:
    """tpSGD under P less tpSGD under P' is what direct projection by P' - P would do."""
    module, given = dense("tanh")(1).double(), local.batch(6)
    one, two = built(projection_seed=1), built(projection_seed=2)
    p, q = targets(one, module, given.y), targets(two, module, given.y)
    a, b = local.grads(one, module, given), local.grads(two, module, given)
    direct = built()
    direct.loss = lambda model, batch, carry: forward.descend(  # type: ignore[method-assign]
        direct.stage.loss, model, batch, lambda k, seen: q[k] - p[k]
    )
    expected = local.grads(direct, module, given)
    hidden = [n for n in a if n.startswith("features")]
    assert tiny.apart(
        {n: expected[n] for n in hidden}, {n: a[n] - b[n] for n in hidden}
    ) < 1e-12  # fmt: skip
    assert all(float(expected[n].abs().max()) > 1e-3 for n in hidden)


def test_padding_counts_nothing() -> None:
    method, module = built(), pictures(1).double()
    some = local.batch(2, 5, 5, n=4)
    more = local.batch(2, 5, 5, n=6, seed=8)
    x = torch.cat([some.x, more.x[4:]])
    y = torch.cat([some.y, more.y[4:]])
    padded = Batch({"x": x, "y": y}, torch.cat([some.weight, torch.zeros(2)]), some.key)
    a, b = local.grads(method, module, some), local.grads(method, module, padded)
    assert tiny.apart(a, b) < 1e-12
    nothing = Batch(padded.columns, torch.zeros(6, dtype=local.F64), some.key)
    assert all(not g.any() for g in local.grads(method, module, nothing).values())


def test_one_seed_for_all_clients_makes_a_federated_step_a_central_one() -> None:
    keys = {"batch": 0, "epochs": 1, "lr": 0.3}
    whole = tiny.task((sum(tiny.RAGGED),))
    central = tiny.play("tpsgd", whole, 1, **keys)
    together = tiny.play("tpsgd", tiny.task(), 1, **keys)
    assert tiny.apart(tiny.state(central), tiny.state(together)) < 1e-13
    apart = tiny.play("tpsgd", tiny.task(), 1, settings={"alone": True}, **keys)
    assert tiny.apart(tiny.state(central), tiny.state(apart)) > 1e-3
    other = tiny.play("tpsgd", whole, 1, settings={"projection_seed": 1}, **keys)
    assert tiny.apart(tiny.state(central), tiny.state(other)) > 1e-3


def test_projections_are_neither_kept_nor_sent() -> None:
    fed, plain = (tiny.play(name, tiny.task(), 2) for name in ("tpsgd", "fedavg"))
    assert fed.ledger.total("bytes") == plain.ledger.total("bytes")
    assert tiny.state(fed).keys() == tiny.state(plain).keys() and not tiny.kept(fed)


def test_a_layer_costs_two_products_instead_of_three() -> None:
    def net(seed: int) -> nn.Module:
        return mlp([6, 50, 30, 4], "tanh", seed).double()

    cost = tiny.federation("tpsgd", tiny.task(module=net)).ground.cost["train"]
    first, rest = 6 * 50, 50 * 30 + 30 * 4
    assert cost == pytest.approx(2 * (first + rest) / (2 * first + 3 * rest), rel=1e-12)


@pytest.mark.parametrize(("make", "shape"), NETS[4:])
def test_pictures_and_sequences_vectorised(
    make: Callable[[int], nn.Module], shape: tuple[int, ...]
) -> None:
    sizes = (3, 11, 1)
    given = local.batch(*shape, n=sum(sizes))
    task = tiny.task(sizes, module=lambda seed: make(seed).double(), data=(given.x, given.y))
    a, b = (tiny.play("tpsgd", task, 2, executor=how) for how in ("sequential", "vectorised"))
    assert tiny.apart(tiny.state(a), tiny.state(b)) < 1e-11


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (nn.Sequential(nn.Linear(6, 5)), "no activation after it"),
        (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Tanh()), "features.1: Linear"),
        (nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh()), "LayerNorm"),
        (nn.Sequential(nn.Linear(6, 5), nn.GELU("tanh")), "GELU"),
        (nn.Sequential(nn.Conv2d(1, 5, 3, padding="same"), nn.Tanh()), "padding"),
        (nn.Tanh(), "a chain `features` and a linear `head`"),
    ],
)
def test_other_nets_are_refused_in_one_line(features: nn.Module, said: str) -> None:
    net = Net(features, nn.Linear(5, 4))
    with pytest.raises(InputError, match=said):
        layerwise.layers(net)


def test_labels_that_are_no_classes_are_refused() -> None:
    given = local.batch(6)
    number = Batch({"x": given.x, "y": given.x[:, 0]}, given.weight, given.key)
    with pytest.raises(InputError, match="one class per item"):
        forward.labels(number)
    with pytest.raises(InputError, match="column y: x given"):
        forward.labels(Batch({"x": given.x}, given.weight))
