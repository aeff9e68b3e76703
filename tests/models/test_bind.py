"""A module as a function of named tensors: like plain PyTorch, and nothing is changed."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from isthmus import seeds, tree
from isthmus.models.bind import aliases, bind, tensors_of, trainable, write
from isthmus.models.nets import cnn, mlp


class Shared(nn.Module):
    """A tied weight, a module used twice, a buffer, a plain attribute and a nested list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.last.weight = self.first.weight
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Tanh()])
        self.again = self.blocks[0]
        self.register_buffer("shift", torch.linspace(-1, 1, 5))
        self.register_buffer("nothing", None)
        self.factor = 3.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.again(self.blocks[0](self.first(x))))
        return self.factor * self.last(x) + self.shift


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        made = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=23,
                hidden_size=16,
                intermediate_size=20,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=16,
                tie_word_embeddings=True,
                attn_implementation="eager",
            )
        )
    return made.eval()


def moved(module: nn.Module, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        n: x + 0.1 * torch.randn(x.shape, generator=g) if x.is_floating_point() else x.clone()
        for n, x in tensors_of(module).items()
    }


CASES = {
    "mlp": (lambda: mlp([6, 5, 3], seed=1), seeds.normal(1, (4, 6))),
    "cnn": (lambda: cnn([4], 3, seed=1), seeds.normal(2, (2, 1, 6, 6))),
    "shared": (Shared, seeds.normal(3, (4, 5))),
    "llama": (llama, torch.arange(12).reshape(2, 6) % 23),
}


def out(module: nn.Module, x: Tensor) -> Tensor:
    got = module(x)
    return got if isinstance(got, Tensor) else got.logits


@pytest.mark.parametrize("name", CASES)
def test_bound_equals_written_and_nothing_is_mutated(name: str) -> None:
    make, x = CASES[name]
    module, other = make(), make()
    own = tree.clone(tensors_of(module))
    ids = [id(p) for p in module.parameters()]
    new = moved(module, 4)
    bound = bind(module, new)
    got = out(bound, x)
    assert torch.allclose(got, out(write(other, new), x), atol=1e-6)
    assert not torch.allclose(got, out(module, x), atol=1e-3)
    assert tree.equal(tensors_of(module), own)
    assert ids == [id(p) for p in module.parameters()] and type(bound) is type(module)
    bound.eval() if module.training else bound.train()
    assert bound.training is not module.training
    part = dict(list(new.items())[:1])  # the rest stays the module's own
    mixed = write(make(), {**own, **part})
    assert torch.allclose(out(bind(module, part), x), out(mixed, x), atol=1e-6)


def test_halves_and_attributes_work() -> None:
    net = mlp([6, 5, 3], seed=1)
    new = moved(net, 1)
    bound, x = bind(net, new), seeds.normal(4, (4, 6))
    features = torch.relu(x @ new["features.linear0.weight"].T + new["features.linear0.bias"])
    assert torch.allclose(bound.features(x), features, atol=1e-6)
    expected = features @ new["head.weight"].T + new["head.bias"]
    assert torch.allclose(bound.head(bound.features(x)), expected, atol=1e-6)
    assert torch.equal(bound(x), bound.head(bound.features(x)))
    assert bind(Shared(), {}).factor == 3.0
    assert [n for n, _ in bound.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert dict(bound.named_parameters())["head.bias"] is new["head.bias"]


def test_tied_tensors_are_named_once_and_bound_everywhere() -> None:
    assert aliases(Shared()) == {
        "last.weight": "first.weight",
        "again.weight": "blocks.0.weight",
        "again.bias": "blocks.0.bias",
    }
    assert "last.weight" not in tensors_of(Shared())
    model = llama()
    assert aliases(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    x = CASES["llama"][1]
    new = {"model.embed_tokens.weight": torch.zeros(23, 16)}
    assert not out(bind(model, new), x).any() and out(model, x).any()


def test_gradients_reach_every_use_of_a_tied_tensor() -> None:
    module, x = Shared(), seeds.normal(5, (4, 5))
    leaves = {n: t.clone().requires_grad_() for n, t in tensors_of(module).items()}
    bind(module, leaves)(x).square().sum().backward()
    module(x).square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None and torch.allclose(leaves[name].grad, p.grad, atol=1e-5)
    assert leaves["shift"].grad is not None and bool(leaves["shift"].grad.any())


@pytest.mark.parametrize("name", CASES)
def test_vmap_and_recording_agree_with_a_loop(name: str) -> None:
    make, x = CASES[name]
    module = make()
    several = [moved(module, i) for i in range(3)]
    floats = [n for n, t in several[0].items() if t.is_floating_point()]

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return out(bind(module, params), x).square().mean()

    grads = torch.func.grad(loss)
    stacked = tree.stack([{n: s[n] for n in floats} for s in several])
    many = torch.vmap(grads, in_dims=(0, None))(stacked, x)
    for i, one in enumerate(several):
        each = grads({n: one[n] for n in floats}, x)
        assert all(torch.allclose(many[n][i], g, atol=1e-5) for n, g in each.items())
    if name != "llama":
        graph = make_fx(torch.vmap(grads, in_dims=(0, None)))(stacked, x)
        other = {n: s.flip(0) for n, s in stacked.items()}
        again = torch.vmap(grads, in_dims=(0, None))(other, 2 * x)
        assert tree.equal(graph(other, 2 * x), again)


def test_trainable_and_write() -> None:
    net = mlp([6, 5, 3], seed=1)
    net.head.weight.requires_grad_(False)
    assert trainable(net) == ["features.linear0.weight", "features.linear0.bias", "head.bias"]
    storage = net.head.bias.data_ptr()
    new = moved(net, 3)
    assert write(net, new) is net and tree.equal(tensors_of(net), new)
    assert net.head.bias.data_ptr() == storage != new["head.bias"].data_ptr()
    with pytest.raises(KeyError):
        write(net, {"head.wieght": torch.zeros(3, 5)})


def test_a_bound_batch_norm_writes_into_what_it_was_given() -> None:
    """In train mode torch moves running statistics in place: those given, never the module's."""
    net = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(3)))
    given = tree.clone(tensors_of(net))
    bind(net, given)(seeds.normal(6, (8, 3)) + 5.0)
    assert float(given["norm.running_mean"].min()) > 0.2
    assert not net.norm.running_mean.any() and int(net.norm.num_batches_tracked) == 0
