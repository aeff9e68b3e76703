"""Memories of many texts against plain forwards of each text alone, over architectures."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.errors import InputError
from isthmus.models import adapter, language
from isthmus.models.kv import BLOCK, Slots, memory_of
from isthmus.models.memory import Memory, left_padded
from isthmus.models.snapshots import Snapshots

V, CONTEXT = 41, 200
LLAMA = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3, "head_dim": 10,
}  # fmt: skip
MAMBA = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "qwen2": ("Qwen2", LLAMA | {"head_dim": 6}),
    # One layer sees all, two see five tokens: two masks in one forward.
    "qwen2-mixed": ("Qwen2", LLAMA | {"head_dim": 6, "use_sliding_window": True,
                                      "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", LLAMA),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 7}),
    "gpt2": ("GPT2LMHead", {"vocab_size": V, "n_embd": 24, "n_layer": 3, "n_head": 4,
                      "n_positions": CONTEXT, "initializer_range": 0.3}),
    "mamba": ("Mamba", MAMBA | {"state_size": 4}),
    "mamba2": ("Mamba2", MAMBA | {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2,
                                  "chunk_size": 8}),
    "bloom": ("Bloom", {"vocab_size": V, "hidden_size": 24, "n_layer": 2, "n_head": 4,
                        "initializer_range": 0.3}),
}  # fmt: skip
BY_POSITION = ["llama", "qwen2", "qwen2-mixed", "qwen3", "mistral", "gpt2"]
RECURRENT = ["mamba", "mamba2"]


def build(name: str, attention: str = "eager") -> Any:
    """A random float64 model; its weights are large enough for every token to count."""
    family, settings = MODELS[name]
    kind = getattr(transformers, f"{family}Model" if "Head" in family else f"{family}ForCausalLM")
    config = kind.config_class(**settings, attn_implementation=attention)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = kind(config)
    return language.without_dropout(model.double().eval())


built_once = functools.cache(build)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention takes its softmax in float32 whatever the model's type: not here."""
    plain = torch.nn.functional.softmax

    def softmax(x: Tensor, dim: int = -1, dtype: Any = None, **_: Any) -> Tensor:
        return plain(x, dim=dim, dtype=torch.promote_types(x.dtype, dtype or x.dtype))

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


@pytest.fixture(params=BY_POSITION)
def model(request: pytest.FixtureRequest, exact: None) -> Any:
    return build(request.param)


class Twin:
    """A memory, and beside it the ids it should hold: every feed is checked on the spot."""

    def __init__(self, model: Any, memory: Memory, tolerance: float = 1e-10) -> None:
        self.model, self.memory, self.tolerance = model, memory, tolerance
        self.texts: dict[int, list[int]] = {}
        self.draws = random.Random(7)

    def open(self) -> int:
        slot = self.memory.open()
        assert slot not in self.texts
        self.texts[slot] = []
        return slot

    def close(self, slot: int) -> None:
        self.memory.close(slot)
        del self.texts[slot]

    def crop(self, slot: int, length: int) -> None:
        self.memory.crop(slot, length)
        del self.texts[slot][length:]

    def feed(self, counts: dict[int, int]) -> None:
        if not counts:
            return
        new = {s: [self.draws.randrange(V) for _ in range(n)] for s, n in counts.items()}
        found = self.memory.feed({s: torch.tensor(ids) for s, ids in new.items()})
        assert found.keys() == new.keys()
        for slot, ids in new.items():
            self.texts[slot] += ids
            expected = plain(self.model, self.texts[slot])[-len(ids) :]
            assert expected.std() > 0.1  # logits that say something
            torch.testing.assert_close(found[slot], expected, rtol=0, atol=self.tolerance)
            assert self.memory.length(slot) == len(self.texts[slot])


@torch.no_grad()
def plain(model: Any, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]


def test_ragged_texts_equal_each_alone(model: Any) -> None:
    """Different lengths and different numbers of tokens in one forward, beyond every window."""
    memory = memory_of(model)
    assert isinstance(memory, Slots)
    twin = Twin(model, memory)
    a, b, c = twin.open(), twin.open(), twin.open()
    twin.feed({a: 9, b: 4, c: 11})
    twin.feed({a: 5, b: 5, c: 5})  # nothing is padded, all start elsewhere
    twin.feed({c: 1, a: 3})  # slots with a gap, in any order
    twin.feed({b: 1})
    twin.feed({a: 2, b: 2})
    twin.crop(a, 8)
    twin.crop(b, 8)
    twin.feed({a: 3, b: 3})  # equal lengths: written as one block
    assert [memory.length(slot) for slot in (a, b, c)] == [11, 11, 17]


def test_one_forward_for_all(model: Any) -> None:
    memory, calls = memory_of(model), []
    model.register_forward_hook(lambda *_: calls.append(1))
    slots = [memory.open() for _ in range(4)]
    memory.feed({slot: torch.arange(3 + slot) for slot in slots})
    memory.feed({slot: torch.arange(5 - slot) for slot in slots})
    assert len(calls) == 2


def test_crop_then_continue_equals_never_having_fed(model: Any) -> None:
    twin = Twin(model, memory_of(model))
    a, b = twin.open(), twin.open()
    twin.feed({a: 12, b: 7})
    for length, n in ((10, 4), (3, 9), (3, 1), (0, 5)):
        twin.feed({a: 6})
        twin.crop(a, length)
        twin.feed({a: n, b: 1})
    twin.crop(b, 0)
    twin.crop(a, len(twin.texts[a]))  # nothing to forget
    twin.feed({a: 1, b: 8})


def test_growth_keeps_what_is_there(model: Any) -> None:
    memory = memory_of(model)
    twin = Twin(model, memory)
    a = twin.open()
    twin.feed({a: BLOCK - 2})
    before = memory.nbytes()
    twin.feed({a: 2})
    assert memory.nbytes() == before  # the block is full
    twin.feed({a: 1})
    assert memory.nbytes() == 2 * before
    slots = [twin.open() for _ in range(4)]
    twin.feed({a: 1, **{slot: 3 + slot for slot in slots}})
    assert memory.nbytes() == 10 * before
    twin.feed({a: CONTEXT - BLOCK - 2})
    assert memory.length(a) == CONTEXT
    # Positions stop at the blocks that hold the context.
    assert memory.nbytes() == 5 * before * -(-CONTEXT // BLOCK)


def test_a_reused_slot_knows_nothing(model: Any) -> None:
    memory = memory_of(model)
    twin = Twin(model, memory)
    a, b = twin.open(), twin.open()
    twin.feed({a: 20, b: 3})
    with torch.no_grad():  # a broken text must not reach the next one either
        kept = next(iter(model.parameters())).clone()
        next(iter(model.parameters())).fill_(torch.nan)
        memory.crop(a, 0)
        memory.feed({a: torch.arange(4)})
        next(iter(model.parameters())).copy_(kept)
    held = memory.nbytes()
    twin.close(a)
    assert twin.open() == a and memory.length(a) == 0
    twin.feed({a: 2, b: 4})
    twin.feed({a: 1})
    assert memory.nbytes() == held


OPERATION = st.tuples(
    st.sampled_from(["feed", "feed", "crop", "open", "close"]),
    st.lists(st.integers(0, 30), min_size=3, max_size=3),
)


@pytest.mark.parametrize("kind", [Slots, Snapshots])
@settings(max_examples=15)
@given(operations=st.lists(OPERATION, min_size=4, max_size=14))
def test_any_history_equals_each_text_alone(
    kind: Callable[[Any], Memory], operations: list[tuple[str, list[int]]]
) -> None:
    model = built_once("qwen2-mixed", "sdpa")
    twin = Twin(model, kind(model))
    for slot in (twin.open(), twin.open()):
        twin.feed({slot: 3})
    for what, numbers in operations:
        held = sorted(twin.texts)
        if what == "feed" and held:
            twin.feed({slot: 1 + n % 9 for slot, n in zip(held, numbers, strict=False) if n % 3})
        elif what == "open" and len(held) < 3:
            twin.open()
        elif what == "crop" and held:
            slot = held[numbers[0] % len(held)]
            twin.crop(slot, numbers[1] % (len(twin.texts[slot]) + 1))
        elif what == "close" and held:
            twin.close(held[numbers[0] % len(held)])


@pytest.mark.parametrize("name", BY_POSITION)
def test_sdpa_is_served_alike(name: str) -> None:
    twin = Twin(model := build(name, "sdpa"), memory_of(model))
    a, b, c = twin.open(), twin.open(), twin.open()
    twin.feed({a: 9, b: 1, c: 12})
    twin.crop(c, 9)
    twin.feed({a: 1, b: 1, c: 1})
    twin.feed({a: 4, c: 3})


def test_the_window_is_respected_and_not_more(exact: None) -> None:
    """In one layer a token beyond the window changes nothing, the last one inside it does."""
    config = transformers.MistralConfig(
        **LLAMA | {"num_hidden_layers": 1}, sliding_window=7, attn_implementation="eager"
    )
    torch.manual_seed(5)
    model = transformers.MistralForCausalLM(config).double().eval()
    memory = memory_of(model)
    logits = {}
    for changed in (None, 3, 4):
        ids = torch.arange(11) % V
        if changed is not None:
            ids[changed] = 30
        slot = memory.open()
        memory.feed({slot: ids[:6]})
        logits[changed] = memory.feed({slot: ids[6:]})[slot][-1]  # position 10 sees 4 to 10
    assert torch.equal(logits[None], logits[3])
    assert (logits[None] - logits[4]).abs().max() > 1e-3


def test_neighbouring_slots_are_read_in_place(exact: None) -> None:
    class Gathers(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.index_select.default and args[0].ndim == 4
            return func(*args, **(kwargs or {}))

    model = build("llama")
    memory = memory_of(model)
    a, b, c = (memory.open() for _ in range(3))
    memory.feed({a: torch.arange(4), b: torch.arange(6), c: torch.arange(2)})
    gathers = []
    for slots in ([b], [a, b], [b, c], [a, b, c], [a, c]):
        with Gathers() as mode:
            memory.feed({slot: torch.arange(3) for slot in slots})
        gathers.append(mode.count)
    assert gathers == [0, 0, 0, 0, 2 * LLAMA["num_hidden_layers"]]


def test_nbytes_are_those_of_the_keys_and_values() -> None:
    model = build("qwen3", "sdpa").to(torch.bfloat16)
    memory = memory_of(model)
    assert memory.nbytes() == 0
    slots = [memory.open() for _ in range(3)]
    memory.feed({slots[1]: torch.arange(9)})
    per_token = 2 * 3 * 2 * 10 * 2  # keys and values, layers, heads, numbers, bytes
    assert memory.nbytes() == 3 * BLOCK * per_token
    memory.crop(slots[1], 0)
    assert memory.nbytes() == 3 * BLOCK * per_token


@pytest.mark.parametrize("name", ["embedded", "embedded:draft"])
def test_embedded_models(name: str) -> None:
    """float32 and eager, as they are served."""
    loaded = language.load(name)
    model = loaded.model
    memory = memory_of(model)
    assert isinstance(memory, Slots) and memory.context == loaded.context
    text = loaded.encode("Return the number of items that are in both of the given lists.")
    slots = [memory.open() for _ in range(3)]
    memory.feed({slot: text[: 4 + 3 * i] for i, slot in enumerate(slots)})
    for i, slot in enumerate(slots):
        memory.crop(slot, 3 + 2 * i)
    found = memory.feed({slot: text[3 + 2 * i :] for i, slot in enumerate(slots)})
    with torch.no_grad():
        expected = model(input_ids=text[None]).logits[0]
    for i, slot in enumerate(slots):
        torch.testing.assert_close(found[slot], expected[3 + 2 * i :], rtol=1e-4, atol=1e-4)


def test_adapters_are_served_by_position(exact: None) -> None:
    model = build("llama")
    before = plain(model, [3, 4, 5, 6])
    wrapped = adapter.attach(model, rank=2, alpha=8, seed=3)
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if "lora_B" in name:
                tensor.copy_(torch.linspace(-1, 1, tensor.numel()).view_as(tensor))
    wrapped = wrapped.double().eval()
    memory = memory_of(wrapped)  # type: ignore[arg-type]
    assert isinstance(memory, Slots)
    twin = Twin(wrapped, memory)
    a, b = twin.open(), twin.open()
    twin.feed({a: 5, b: 2})
    twin.feed({a: 1, b: 3})
    assert (plain(wrapped, [3, 4, 5, 6]) - before).abs().max() > 0.1


# ------------------------------------------------------------------------- without positions


@pytest.mark.parametrize("name", [*RECURRENT, "bloom", "llama"])
def test_snapshots_equal_each_text_alone(name: str, exact: None) -> None:
    """Recurrent scans run in float32 inside; the others are exact."""
    model = build(name)
    memory = Snapshots(model)
    twin = Twin(model, memory, 1e-5 if name in RECURRENT else 1e-10)
    a, b = twin.open(), twin.open()
    twin.feed({a: 9, b: 4})
    twin.feed({a: 5, b: 1})
    for n in (2, 3, 1):  # the same copy thrice
        twin.crop(a, 12)  # inside the last feed
        twin.feed({a: n})
    for _ in range(6):
        twin.feed({b: 1})
    twin.crop(b, 8)
    twin.crop(b, 7)  # twice, before anything is fed
    twin.feed({b: 4, a: 1})
    twin.crop(a, 0)
    twin.crop(b, 2)
    twin.feed({a: 3, b: 1})
    twin.close(a)
    assert twin.open() == a
    twin.feed({a: 2, b: 2})


def test_the_kind_of_memory_follows_the_model(exact: None) -> None:
    assert all(isinstance(memory_of(build(name)), Slots) for name in BY_POSITION)
    assert all(isinstance(memory_of(build(name)), Snapshots) for name in [*RECURRENT, "bloom"])
    chunked = build("llama")
    chunked.config.attention_chunk_size = 4
    assert isinstance(memory_of(chunked), Snapshots)


def test_scans_that_lose_their_state_are_fed_token_by_token() -> None:
    calls: dict[str, list[int]] = {}
    for name in RECURRENT:
        model, calls[name] = build(name), []
        memory = memory_of(model)
        slot = memory.open()
        memory.feed({slot: torch.arange(6)})
        model.register_forward_hook(
            lambda _, args, kwargs, out, name=name: calls[name].append(
                kwargs["input_ids"].shape[1]
            ),
            with_kwargs=True,
        )
        memory.feed({slot: torch.arange(4)})
    assert calls == {"mamba": [1, 1, 1, 1], "mamba2": [4]}


def test_snapshots_feed_again_no_more_than_a_few_times_what_was_forgotten() -> None:
    model = build("bloom")
    memory = memory_of(model)
    fed: list[int] = []
    model.register_forward_hook(
        lambda _, args, kwargs, out: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for back in (1, 2, 3, 5, 9, 17, 40):
        slot = memory.open()
        for i in range(100):
            memory.feed({slot: torch.tensor([i % V])})
        copies = len(memory._texts[slot].kept)  # type: ignore[attr-defined]
        assert copies <= 9
        memory.crop(slot, 100 - back)
        fed.clear()
        memory.feed({slot: torch.tensor([3])})
        assert len(fed) == 1 and fed[0] <= 3 * back + 1
        memory.close(slot)


def test_snapshots_count_and_free_their_bytes() -> None:
    memory = memory_of(build("mamba"))
    assert memory.nbytes() == 0
    slot = memory.open()
    memory.feed({slot: torch.arange(5)})
    one = memory.nbytes()
    # Two layers: a float64 convolution state of 32 channels and 4 taps, a scan state of 32 by 4.
    assert one >= 2 * 32 * (4 + 4) * 4
    memory.feed({slot: torch.arange(1)})
    assert memory.nbytes() == 2 * one
    memory.close(slot)
    assert memory.nbytes() == 0


# ------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_refusals_say_what_and_change_nothing(name: str, exact: None) -> None:
    model = build(name)
    twin = Twin(model, memory_of(model))
    memory = twin.memory
    a, b = twin.open(), twin.open()
    twin.feed({a: 6, b: 3})
    if name != "bloom":
        with pytest.raises(InputError, match=f"text: {CONTEXT + 1} tokens .* at most {CONTEXT}"):
            memory.feed({a: torch.zeros(CONTEXT - 5, dtype=torch.int64), b: torch.arange(2)})
    with pytest.raises(InputError, match="ids: none"):
        memory.feed({a: torch.arange(2), b: torch.arange(0)})
    with pytest.raises(InputError, match="length: 7 given, allowed: 0 to 6"):
        memory.crop(a, 7)
    with pytest.raises(InputError, match="length: -1"):
        memory.crop(a, -1)
    for call in _on_closed(memory, b + 1):
        with pytest.raises(InputError, match=f"slot: {b + 1} given, allowed: an open one"):
            call()
    twin.feed({a: 1, b: 2})
    twin.close(b)
    for call in _on_closed(memory, b):
        with pytest.raises(InputError, match=f"slot: {b}"):
            call()


def _on_closed(memory: Memory, slot: int) -> Iterator[Callable[[], object]]:
    yield lambda: memory.length(slot)
    yield lambda: memory.crop(slot, 0)
    yield lambda: memory.close(slot)
    yield lambda: memory.feed({slot: torch.arange(2)})


def test_padding_stands_at_the_left() -> None:
    ids, counts = left_padded([[4, 5, 6], [7], [8, 9]])
    assert ids.tolist() == [[4, 5, 6], [7, 7, 7], [8, 8, 9]] and counts == [3, 1, 2]
