"""Masks from keys: equal however they are computed, and distributed as dropout's."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.models.bind import bind, tensors_of
from isthmus.models.dropout import KeyedDropout, keyed


def two(p: float = 0.25) -> nn.Module:
    return keyed(nn.Sequential(nn.Dropout(p), nn.Identity(), nn.Dropout(p)))


def mask(module: nn.Module, key: int, layer: int, shape: tuple[int, ...] = (40, 50)) -> Tensor:
    bound = bind(module, {}, key=torch.tensor(key))
    return bound[layer](torch.ones(shape))  # type: ignore[index]


def test_masks_are_a_function_of_the_key() -> None:
    module, x = two(), seeds.normal(1, (6, 7, 8))
    keys = torch.tensor([3, -9, 2**40])
    many = torch.vmap(lambda k, x: bind(module, {}, key=k)(x), in_dims=(0, None))(keys, x)
    each = [bind(module, {}, key=k)(x) for k in keys]
    assert all(torch.equal(m, e) for m, e in zip(many, each, strict=True))
    assert torch.equal(bind(two(), {}, key=keys[0])(x), each[0])  # another object, later
    before = torch.get_rng_state()
    bind(module, {}, key=keys[1])(x)
    assert torch.equal(before, torch.get_rng_state())


def test_masks_differ_between_layers_steps_and_clients() -> None:
    module = two()
    visit = seeds.fold(seeds.key(0, "visit", 1), 5)
    drawn = [
        mask(module, int(seeds.fold(visit, 0)), 0),
        mask(module, int(seeds.fold(visit, 0)), 2),
        mask(module, int(seeds.fold(visit, 1)), 0),
        mask(module, int(seeds.fold(seeds.fold(seeds.key(0, "visit", 1), 6), 0)), 0),
        mask(module, int(seeds.fold(seeds.fold(seeds.key(0, "visit", 2), 5), 0)), 0),
    ]
    flat = torch.stack([(m == 0).double().flatten() for m in drawn]).numpy()
    corr = np.corrcoef(flat)[np.triu_indices(len(drawn), 1)]
    assert np.abs(corr).max() < 4 / flat.shape[1] ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_expectation_and_rate(p: float) -> None:
    n = 200 * 200
    got = mask(two(p), 12, 0, (200, 200))
    assert set(got.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1.0 - p))}
    dropped = float((got == 0).double().mean())
    assert abs(dropped - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert abs(float(got.double().mean()) - 1.0) < 4 * (p / (1 - p) / n) ** 0.5


def test_gradient_is_the_mask() -> None:
    module = two()
    x = seeds.normal(2, (5, 9)).requires_grad_()
    (bind(module, {}, key=torch.tensor(4))(x) * 2.0).sum().backward()
    kept = bind(module, {}, key=torch.tensor(4))(torch.ones(5, 9))
    assert x.grad is not None and torch.equal(x.grad, 2.0 * kept)


def test_off_without_a_key_in_eval_and_on_the_unbound_module() -> None:
    module, x = two(), seeds.normal(3, (5, 5))
    assert torch.equal(module(x), x) and torch.equal(bind(module, {})(x), x)
    bind(module, {}, key=torch.tensor(1))(x)
    assert torch.equal(module(x), x) and module[0].draw is None  # type: ignore[index]
    assert torch.equal(bind(module, {}, key=torch.tensor(1)).eval()(x), x)
    everything = bind(keyed(nn.Sequential(nn.Dropout(1.0))), {}, key=torch.tensor(1))
    assert torch.equal(everything(x), torch.zeros_like(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Dropout1d, (9, 40, 6)), (nn.Dropout2d, (9, 40, 3, 4)), (nn.Dropout3d, (9, 40, 2, 2, 2))],
)
def test_whole_channels(layer: Any, shape: tuple[int, ...]) -> None:
    got = bind(keyed(nn.Sequential(layer(0.4))), {}, key=torch.tensor(2))(torch.ones(shape))
    flat = got.flatten(2)
    assert torch.equal(flat, flat[..., :1].expand_as(flat))
    assert abs(float((flat[..., 0] == 0).double().mean()) - 0.4) < 4 * (0.24 / 360) ** 0.5


def test_every_dropout_of_a_model_is_replaced() -> None:
    shared = nn.Dropout(0.5)
    inner = nn.Sequential(OrderedDict(a=nn.Dropout(0.2), b=nn.Dropout(0.0), c=shared, d=shared))
    module = nn.Module()
    module.block, module.twice, module.lin = inner, shared, nn.Linear(3, 3)
    module.block.a.eval()
    keyed(module)
    found = {n: m for n, m in module.named_modules() if isinstance(m, KeyedDropout)}
    assert set(found) == {"block.a", "block.c", "block.d", "twice"}
    assert len({m.number for m in found.values()}) == 4
    assert not found["block.a"].training and found["twice"].training
    left = [n for n, m in module.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert left == [] and list(tensors_of(module)) == ["lin.weight", "lin.bias"]


def test_the_dropout_of_adapters_is_replaced() -> None:
    import peft

    base = nn.Sequential(OrderedDict(lin=nn.Linear(6, 5)))
    with torch.random.fork_rng(devices=[]):
        config = peft.LoraConfig(r=2, target_modules=["lin"], lora_dropout=0.5)
        model = keyed(peft.get_peft_model(base, config)).train()
    for name, p in model.named_parameters():
        p.data = torch.linspace(-1, 1, p.numel()).view(p.shape) + (0.1 if "lora_B" in name else 0)
    x = seeds.normal(4, (4, 6))
    drawn = [bind(model, {}, key=torch.tensor(k))(x) for k in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], model(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.AlphaDropout(0.2),
        nn.RReLU(),
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.LSTM(3, 3, num_layers=2, dropout=0.1),
    ],
)
def test_a_layer_that_draws_by_itself_is_refused_while_it_trains(layer: nn.Module) -> None:
    with pytest.raises(InputError, match=f"layer inner.0: {type(layer).__name__} given"):
        keyed(nn.Sequential(OrderedDict(inner=nn.Sequential(layer))))
    keyed(nn.Sequential(OrderedDict(inner=nn.Sequential(layer))).eval())
