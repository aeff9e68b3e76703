"""The online layer beside batch statistics, autograd, and what may not change."""

from __future__ import annotations

import pytest
import torch

from isthmus.errors import InputError
from isthmus.learn.online import EPS, Online
from isthmus.models.bind import tensors_of
from isthmus.models.nets import mlp


def stream(n: int, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return 3.0 * torch.randn(n, width, generator=g) + 40.0, torch.randint(0, 3, (n,), generator=g)


def test_welford_equals_the_statistics_of_the_batch() -> None:
    x, _ = stream(300)
    layer = Online(lambda x: x, 5, 3)
    for row in x:
        layer.observe(row)
    exact = x.double()
    torch.testing.assert_close(layer.mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        layer.variance.double(), exact.var(0, correction=0), rtol=1e-5, atol=0
    )
    assert layer.seen == 0 and not layer.weight.any()  # no labels: nothing to score or learn


def test_each_step_equals_autograd() -> None:
    x, y = stream(20)
    layer = Online(lambda x: x, 5, 3, lr=0.3)
    right = 0
    for i, (row, label) in enumerate(zip(x, y.tolist(), strict=True)):
        past = x[: i + 1].double()
        spread = past.var(0, correction=0) if i else torch.ones(5).double()
        s = (row - past.mean(0)) / (spread + EPS).sqrt()
        w = layer.weight.double().clone().requires_grad_()
        b = layer.bias.double().clone().requires_grad_()
        logits = w @ s + b
        torch.nn.functional.cross_entropy(logits[None], torch.tensor([label])).backward()
        assert w.grad is not None and b.grad is not None
        said = layer.observe(row, label)
        assert said == int(logits.argmax())
        right += said == label
        torch.testing.assert_close(layer.weight.double(), (w - 0.3 * w.grad).detach(),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
        torch.testing.assert_close(layer.bias.double(), (b - 0.3 * b.grad).detach(),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
    assert (layer.seen, layer.correct) == (20, right) and layer.accuracy == right / 20


def test_memory_is_constant_and_the_backbone_untouched() -> None:
    net = mlp([5, 8, 3], seed=1)
    before = {name: x.clone() for name, x in tensors_of(net).items()}
    layer = Online(net.features, 8, 3)
    x, y = stream(60)
    size = layer.nbytes
    assert size == 4 * (3 * 8 + 3 + 2 * 8)
    for row, label in zip(x, y.tolist(), strict=True):
        layer.observe(row, label)
        assert layer.nbytes == size
    assert all(torch.equal(x, before[name]) for name, x in tensors_of(net).items())
    assert layer.weight.any()


def test_a_new_class_gets_a_row_and_the_others_keep_theirs() -> None:
    x, y = stream(30)
    layer = Online(lambda x: x, 5, 3, lr=0.3)
    for row, label in zip(x, y.tolist(), strict=True):
        layer.observe(row, label)
    logits = layer.predict(x)
    with pytest.raises(InputError, match="0 to 2"):
        layer.observe(x[0], 3)
    assert layer.count == 30 and layer.add_class() == 3
    assert torch.equal(layer.predict(x), torch.cat([logits, torch.zeros(30, 1)], 1))
    for _ in range(40):
        layer.observe(x[0], 3)
    assert layer.observe(x[0]) == 3
