from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.models.nets import cnn, initialise, mlp
from isthmus.tree import equal


@pytest.mark.parametrize("make", [lambda s: mlp([6, 5, 4], seed=s), lambda s: cnn([8, 6], 3, s)])
def test_equal_seeds_equal_bits_and_the_global_generator_rests(make) -> None:
    before = torch.random.get_rng_state()
    torch.manual_seed(11)
    first = make(4).state_dict()
    torch.manual_seed(99)
    again, other = make(4).state_dict(), make(5).state_dict()
    torch.manual_seed(11)
    inner = torch.random.get_rng_state()
    make(4)
    assert torch.equal(inner, torch.random.get_rng_state())
    torch.random.set_rng_state(before)
    assert equal(first, again)
    assert all(torch.isfinite(x).all() for x in first.values())
    for name in first:
        drawn = "norm" not in name
        assert torch.equal(first[name], other[name]) is not drawn


def test_mlp_is_the_formula() -> None:
    net = mlp([3, 4, 2], "tanh", seed=1)
    state, x = net.state_dict(), torch.randn(5, 3, generator=seeds.generator(0))
    hidden = torch.tanh(x @ state["features.linear0.weight"].T + state["features.linear0.bias"])
    expected = hidden @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net(x.view(5, 1, 3, 1)), expected)
    torch.testing.assert_close(net.head(net.features(x)), expected)


def test_the_head_of_an_mlp_without_hidden_layers_is_all_of_it() -> None:
    assert sorted(mlp([3, 2]).state_dict()) == ["head.bias", "head.weight"]


def test_cnn_pools_to_a_vector_and_treats_items_apart() -> None:
    net = cnn([8, 6], 3, seed=2, inputs=2)
    x = torch.randn(4, 2, 9, 7, generator=seeds.generator(0))
    assert net.features(x).shape == (4, 6) and net(x).shape == (4, 3)
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]))
    assert not [name for name, _ in net.named_buffers()]
    flat = sum(p.numel() for p in net.parameters())
    assert flat == (8 * 2 * 9 + 8) + 16 + (6 * 8 * 9 + 6) + 12 + (6 * 3 + 3)


def test_weights_are_uniform_with_torchs_bound() -> None:
    weight = mlp([100, 400, 2], seed=3).features.linear0.weight
    bound = 1 / math.sqrt(100)
    assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    bias = mlp([100, 400, 2], seed=3).features.linear0.bias
    assert 0.9 * bound < bias.abs().max() <= bound


def test_a_layers_bits_depend_on_its_name_not_on_its_neighbours() -> None:
    small, large = mlp([6, 5, 4], seed=7), mlp([6, 5, 9, 4], seed=7)
    assert torch.equal(small.features.linear0.weight, large.features.linear0.weight)
    assert not torch.equal(
        mlp([5, 5, 5], seed=7).features.linear0.weight, mlp([5, 5, 5], seed=7).head.weight
    )


def test_a_generator_is_drawn_in_order() -> None:
    nets = [initialise(nn.Sequential(nn.Linear(2, 3)), seeds.generator(1)) for _ in range(2)]
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)
    draw = seeds.generator(1)
    first, second = (initialise(nn.Sequential(nn.Linear(2, 3)), draw)[0].weight for _ in range(2))
    assert not torch.equal(first, second)


def test_bad_input_is_one_line() -> None:
    with pytest.raises(InputError, match="nearest: relu"):
        mlp([2, 2], "rely")
    with pytest.raises(InputError, match="two or more widths"):
        mlp([2])
    with pytest.raises(InputError, match="one or more widths"):
        cnn([], 2)
    with pytest.raises(InputError, match="layer 0: Embedding given"):
        initialise(nn.Sequential(nn.Embedding(2, 2)), 0)
