"""Costs against counted FLOPs and the bytes of real tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from isthmus.inference.cost import Cost, Shape, forward, shape_of
from isthmus.models import adapter, language
from isthmus.models.kv import BLOCK, memory_of
from isthmus.wire.device import count_flops

LLAMA: dict[str, Any] = {
    "vocab_size": 41, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
    "attn_implementation": "eager",
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**LLAMA, sliding_window=5)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=41, n_embd=24, n_layer=3, n_head=4, attn_implementation="eager"
        )
    ),
    "embedded": lambda: language.load("embedded").model,
    "embedded:draft": lambda: language.load("embedded:draft").model,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().eval()


def test_flops_are_those_counted(model: Any) -> None:
    memory, shape = memory_of(model), shape_of(model)
    for context, n, rows in ((0, 7, 7), (13, 1, 1), (13, 5, 3)):
        slot = memory.open()
        if context:
            memory.feed({slot: torch.arange(context)})
        flops = count_flops(memory.extend, [slot], torch.arange(n)[None], [n], rows)
        assert forward(shape, [(n, context)], rows).flops == flops
    slots = [memory.open(), memory.open()]
    flops = count_flops(memory.extend, slots, torch.arange(8).view(2, 4), [4, 4], 4)
    assert forward(shape, [(4, 0), (4, 0)]).flops == flops


def test_plain_forwards_are_counted_alike(model: Any) -> None:
    flops = count_flops(model, input_ids=torch.arange(9)[None], use_cache=False)
    assert forward(shape_of(model), [(9, 0)]).flops == flops


def test_keys_and_values_are_those_that_memory_holds(model: Any) -> None:
    memory = memory_of(model)
    slot = memory.open()
    memory.feed({slot: torch.arange(3)})
    assert memory.nbytes() == BLOCK * shape_of(model).kv


def test_weights_are_read_but_not_tables() -> None:
    plain, tied = MODELS["llama"](), MODELS["tied"]()
    everything = sum(p.numel() for p in plain.parameters())
    table = 41 * 24
    assert shape_of(plain).weights == 4 * (everything - table)
    assert shape_of(tied).weights == 4 * sum(p.numel() for p in tied.parameters())
    assert shape_of(tied).weights == shape_of(plain).weights
    half = MODELS["llama"]().half()
    assert shape_of(half).weights * 2 == shape_of(plain).weights
    assert shape_of(half).kv * 2 == shape_of(plain).kv and shape_of(half).dtype == "float16"
    gpt2 = MODELS["gpt2"]()
    positions = gpt2.transformer.wpe.weight.numel()
    everything = sum(p.numel() for p in gpt2.parameters())
    assert shape_of(gpt2).weights == 4 * (everything - positions)


def test_adapters_cost_what_they_add() -> None:
    before = shape_of(MODELS["llama"]())
    wrapped = adapter.attach(MODELS["llama"](), rank=3, alpha=6, seed=1).eval()
    added = sum(p.numel() for n, p in wrapped.named_parameters() if "lora" in n)
    shape = shape_of(wrapped)  # type: ignore[arg-type]
    assert shape._replace(body=0, weights=0) == before._replace(body=0, weights=0)
    assert shape.body - before.body == 2 * added
    assert shape.weights - before.weights == 4 * added
    flops = count_flops(wrapped, input_ids=torch.arange(6)[None], use_cache=False)
    assert forward(shape, [(6, 0)]).flops == flops


def test_recurrent_models_keep_no_keys() -> None:
    config = transformers.MambaConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    model = transformers.MambaForCausalLM(config)
    shape = shape_of(model)
    assert shape.kv == shape.attention == 0
    assert forward(shape, [(3, 0)]) == forward(shape, [(3, 500)])
    assert forward(shape, [(3, 0)]).flops <= count_flops(model, input_ids=torch.arange(3)[None])


TEXTS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 300)), min_size=1, max_size=6)
SHAPE = Shape(body=101, head=17, attention=3, weights=5003, kv=29, dtype="float32")


@given(TEXTS, TEXTS)
def test_a_batch_reads_its_weights_once(
    some: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    together, a, b = (forward(SHAPE, each) for each in (some + others, some, others))
    assert together == Cost(a.flops + b.flops, a.bytes + b.bytes - SHAPE.weights)


@given(st.integers(1, 30), st.integers(0, 200), st.integers(1, 30))
def test_feeding_in_parts_moves_more_and_attends_less(n: int, context: int, more: int) -> None:
    whole = forward(SHAPE, [(n + more, context)])
    parts = forward(SHAPE, [(n, context)]), forward(SHAPE, [(more, context + n)])
    assert whole.flops - sum(part.flops for part in parts) == SHAPE.attention * n * more
    assert sum(part.bytes for part in parts) > whole.bytes
    for rows in range(1, 4):
        fewer = forward(SHAPE, [(n, context)], rows)
        assert parts[0].flops - fewer.flops == SHAPE.head * max(n - rows, 0)
        assert fewer.bytes == parts[0].bytes
