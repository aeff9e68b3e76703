"""Rounds seen through the logits of whole models, and peft's own merges as oracles."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from tests.federated.adapters.rounds import TOLERANCE, mean_product, rel
from torch import Tensor, nn

from isthmus.federated.adapters import fedex_lora, fedmomentum, flexlora, flora
from isthmus.federated.adapters.product import Global, recompress
from isthmus.models import factors as pure
from isthmus.models.adapter import Handle, attach
from isthmus.models.factors import Factors

WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=48,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


MODELS = {"llama": llama, "gpt2": gpt2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "alpha-pattern": {"alpha_pattern": {"0.self_attn.q_proj|0.mlp.c_fc": 11}},
    "rank-pattern": {"rank_pattern": {"v_proj|attn.c_proj": 2}, "rslora": True},
}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return MODELS[name]().to(dtype).eval()


def logits(model: nn.Module) -> Tensor:
    tokens = torch.arange(24).reshape(2, 12) * 7 % 48
    with torch.no_grad():
        return model(tokens).logits


def clients(handle: Handle, layer: str, seed: int, scales: tuple[float, ...]) -> list[Factors]:
    """Random factors large enough that a wrong scale moves the logits."""
    at = handle.places[layer]
    g = torch.Generator().manual_seed(seed)
    dtype = handle.factors(layer).B.dtype
    return [
        Factors(
            torch.randn(at.shape[0], at.rank, generator=g, dtype=dtype) * 0.3,
            torch.randn(at.rank, at.shape[1], generator=g, dtype=dtype) * 0.3,
            at.scale * factor,
        )
        for factor in scales
    ]


def add_dense(model: nn.Module, layer: str, delta: Tensor, transposed: bool) -> None:
    weight = model.get_submodule(layer).get_parameter("weight")
    weight.data += (delta.mT if transposed else delta).to(weight.dtype)


def aggregated(method: str, uploads: list[Factors], down: Factors) -> Global:
    if method == "fedmomentum":
        knobs = fedmomentum.Knobs(tau=1.0)
        return fedmomentum.aggregate(uploads, WEIGHTS, down, knobs)
    if method == "flora":
        return flora.aggregate(uploads, WEIGHTS, down, key=3)
    return fedex_lora.aggregate(uploads, WEIGHTS, down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_round_is_exact_in_the_logits(name: str, variant: str, dtype: torch.dtype) -> None:
    plain = build(name, dtype)
    start = logits(plain)
    for method in ("fedmomentum", "flora", "fedex"):
        truth, model = deepcopy(plain), attach(deepcopy(plain), 4, 6, **VARIANTS[variant])
        handle = Handle(model)
        wrong = deepcopy(model)
        tree = {n: p.detach() for n, p in model.named_parameters()}
        results: dict[str, Global] = {}
        for i, layer in enumerate(handle.layers):
            uploads = clients(handle, layer, i, (1.0, 0.6, 1.5))
            results[layer] = aggregated(method, uploads, handle.factors(layer))
            dense = mean_product(uploads, WEIGHTS)
            add_dense(truth, layer, dense, handle.places[layer].transposed)
        expected = logits(truth)
        assert rel(expected, start) > 0.3

        deltas = {layer: result.base_delta for layer, result in results.items()}
        named = tree | pure.merged(tree, handle.places, deltas)
        named |= pure.write({n: r.factors for n, r in results.items()}, handle.places)
        tokens = torch.arange(24).reshape(2, 12) * 7 % 48
        with torch.no_grad():
            out = torch.func.functional_call(model, named, (tokens,)).logits
        assert rel(out, expected) < TOLERANCE[dtype]
        assert torch.equal(logits(model), start)  # the model itself was left alone

        careless = Handle(wrong)
        for layer, result in results.items():
            handle.set_factors(layer, result.factors)
            careless.set_factors(layer, result.factors)
            for left, right in result.base_delta:
                handle.merge(layer, left, right)
                careless.merge(layer, left / handle.places[layer].scale, right)
        assert rel(logits(model), expected) < TOLERANCE[dtype]
        assert torch.equal(logits(model), out)
        assert rel(logits(wrong), expected) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_held_residual_serves_like_a_merged_one(name: str) -> None:
    """Two rounds over a backbone that is never written, as a quantised one needs."""
    plain = build(name, torch.float64)
    held, truth = attach(deepcopy(plain), 2, 6), deepcopy(plain)
    handle = Handle(held)
    base = {n: p.clone() for n, p in held.named_parameters() if "lora" not in n}
    kept: dict[str, list[Any]] = {layer: [] for layer in handle.layers}
    for t in range(2):
        for i, layer in enumerate(handle.layers):
            at, down = handle.places[layer], handle.factors(layer)
            uploads = clients(handle, layer, 10 * t + i, (1.0, 0.7, 1.3))
            before = down.delta()
            result = aggregated("fedmomentum", uploads, down)
            add_dense(truth, layer, mean_product(uploads, WEIGHTS) - before, at.transposed)
            handle.set_factors(layer, result.factors)
            kept[layer] = [recompress([*kept[layer], *result.base_delta])]
        handle.hold({layer: pairs[0] for layer, pairs in kept.items()})
        assert rel(logits(held), logits(truth)) < 1e-11
    assert all(torch.equal(x, held.get_parameter(n)) for n, x in base.items())
    moving = [n for n, p in held.named_parameters() if p.requires_grad]
    assert len(moving) == 2 * len(handle.layers) and not any("residual" in n for n in moving)
    again = Handle(held)
    assert again.places == handle.places and not any("residual" in n for n in again.state())
    handle.hold({})
    assert not any("residual" in n for n, _ in held.named_parameters())


def net() -> nn.Module:
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(14, 22), nn.ReLU(), nn.Linear(22, 9))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    return model


def three_adapters() -> tuple[peft.PeftModel, Mapping[str, list[Factors]]]:
    model = attach(net(), 3, 6, ["0", "2"])
    handle = Handle(model)
    sent = {layer: clients(handle, layer, i, (1.0,) * 3) for i, layer in enumerate(handle.layers)}
    for i in range(3):
        model.add_adapter(f"c{i}", peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]))
        each = Handle(model, f"c{i}")
        for layer in each.layers:
            each.set_factors(layer, sent[layer][i])
    return model, sent


def merged_by_peft(model: peft.PeftModel, kind: str, weights: list[float], **more: Any) -> Handle:
    model.base_model.add_weighted_adapter(["c0", "c1", "c2"], weights, kind, kind, **more)
    return Handle(model, kind)


def test_peft_cat_and_svd_agree_for_plain_lora() -> None:
    model, sent = three_adapters()
    cat = merged_by_peft(model, "cat", WEIGHTS.tolist())
    svd = merged_by_peft(model, "svd", WEIGHTS.tolist(), svd_rank=3)
    down = Handle(model)
    for layer in down.layers:
        case = (sent[layer], WEIGHTS, down.factors(layer))
        left, right = flora.aggregate(*case).base_delta[0]
        assert rel(left @ right, cat.delta(layer)) < 1e-6
        momentum = fedmomentum.aggregate(*case, fedmomentum.Knobs(tau=1.0))
        rest = sum((a @ b for a, b in momentum.base_delta), torch.zeros(()))
        assert rel(momentum.factors.delta() + rest, cat.delta(layer)) < 1e-6
        assert rel(momentum.factors.delta(), svd.delta(layer)) < 1e-6
        flex = flexlora.aggregate(*case).factors
        assert rel(flex.delta(), svd.delta(layer)) < 1e-6
        A = svd.factors(layer).A
        assert rel((A @ flex.A.mT).abs(), torch.eye(3, dtype=torch.float64)) < 1e-5


def test_peft_linear_is_n_times_too_large_for_a_federated_mean() -> None:
    """The mistake this package must not make: identical clients, equal weights, ratio n."""
    model, sent = three_adapters()
    for i in range(3):
        for layer in Handle(model).layers:
            Handle(model, f"c{i}").set_factors(layer, sent[layer][0])
    linear = merged_by_peft(model, "linear", [1 / 3] * 3)
    handle = Handle(model)
    for layer in handle.layers:
        one = sent[layer][0]
        ours = fedmomentum.aggregate([one] * 3, torch.full((3,), 1 / 3), handle.factors(layer))
        assert rel(ours.factors.delta(), one.delta()) < 1e-6
        assert rel(linear.delta(layer), 3 * one.delta()) < 1e-6
