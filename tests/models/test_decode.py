"""The sampling laws against closed forms and Hugging Face's, the loop against `generate`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.models import decode
from isthmus.models.decode import Law, draw, generate, stream


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A random model in float64, so that padding cannot tip a token over a rounding error."""
    config = LlamaConfig(
        vocab_size=23, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=5,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("p", [0.2, 0.8, 1.0])
def test_law_equals_the_warpers_of_generate(temperature: float, k: int, p: float) -> None:
    logits = seeds.normal(7, (6, 11), torch.float64) * 2
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if k:
        expected = TopKLogitsWarper(k)(None, expected)
    if p < 1:
        expected = TopPLogitsWarper(p)(None, expected)
    torch.testing.assert_close(Law(temperature, k, p)(logits), expected.softmax(-1))


def test_law_by_hand() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    half = Law(temperature=0.5)(logits)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025], dtype=torch.float64)
    torch.testing.assert_close(half, squares / squares.sum())
    torch.testing.assert_close(
        Law(top_p=0.79)(logits), torch.tensor([5 / 8, 3 / 8, 0, 0], dtype=torch.float64)
    )
    three = torch.tensor([10, 6, 3, 0], dtype=torch.float64) / 19
    torch.testing.assert_close(Law(top_p=0.81)(logits), three)
    torch.testing.assert_close(Law(top_k=3)(logits), three)
    assert Law(0.0)(logits).tolist() == [1, 0, 0, 0]
    assert Law(top_p=1e-9)(logits.flip(0)).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "knobs", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_law_refuses(knobs: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(knobs))):
        Law(**knobs)  # type: ignore[arg-type]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    st.floats(0, 1, exclude_max=True),
)
def test_draw_inverts_the_cumulative_sum(weights: list[int], u: float) -> None:
    token = int(draw(torch.tensor(weights, dtype=torch.float64), torch.tensor(u).double()))
    assert weights[token] > 0
    below = sum(weights[:token])
    assert below <= u * sum(weights) * (1 + 1e-12)
    assert u * sum(weights) < (below + weights[token]) * (1 + 1e-12)


def test_draw_has_the_law_it_was_given() -> None:
    p = torch.tensor([0.1, 0.0, 0.45, 0.25, 0.2], dtype=torch.float64)
    n = 20_000
    tokens = draw(p.expand(n, 5), seeds.uniform(11, (n,), torch.float64))
    seen = torch.bincount(tokens, minlength=5).double()
    assert seen[1] == 0
    expected = n * p[p > 0]
    statistic = float(((seen[p > 0] - expected) ** 2 / expected).sum())
    assert statistic < 16.3  # chi-square, 3 degrees of freedom, probability 1e-3


def test_draw_never_leaves_the_support_when_rounding_lifts_the_height() -> None:
    row = torch.tensor([0.7, 0.3, 0.0])
    assert int(draw(row, torch.tensor(1.0))) == 1


PROMPTS = [[1, 7, 2, 9], [1, 3], [1, 4, 4, 8, 11, 6, 20]]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_greedy_equals_generate(model: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    batch, real = decode.pad(prompts)
    expected = model.generate(
        input_ids=batch, attention_mask=real.long(), max_new_tokens=30, do_sample=False
    )
    assert torch.equal(generate(model, prompts, 30, Law(0.0)), expected)
    assert len(set(expected[0, batch.shape[1] :].tolist())) > 2


def test_a_sequence_does_not_depend_on_its_neighbours(model: LlamaForCausalLM) -> None:
    keys = [101, 202, 303]
    law = Law(1.3, top_k=15, top_p=0.97)
    together = generate(model, PROMPTS, 25, law, keys, stop=())
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], 25, law, keys[i : i + 1], stop=())
        assert torch.equal(together[i, -25:], alone[0, -25:])
    other = generate(model, PROMPTS, 25, law, [1, 2, 3], stop=())
    assert not torch.equal(other[:, -25:], together[:, -25:])


def test_an_interrupted_text_continues_as_if_it_had_not_been(model: LlamaForCausalLM) -> None:
    whole = generate(model, PROMPTS[:1], 20, Law(), 9, stop=())
    first = generate(model, PROMPTS[:1], 8, Law(), 9, stop=())
    assert torch.equal(generate(model, first, 12, Law(), 9, stop=()), whole)


def test_sampled_tokens_follow_the_model(model: LlamaForCausalLM) -> None:
    """The joint law of the first two tokens, by chi-square with pooled cells."""
    n, law = 4000, Law(1.5, top_k=4)
    prompt = torch.tensor([1, 7])
    ids = generate(model, prompt.expand(n, 2), 2, law, 77, stop=())[:, 2:]
    with torch.no_grad():
        first = law(model(prompt[None]).logits[0, -1])
        second = {
            int(a): law(model(torch.cat([prompt, a[None]])[None]).logits[0, -1])
            for a in first.nonzero()[:, 0]
        }
    pairs = list(itertools.product(range(23), repeat=2))
    expected = n * np.array(
        [float(first[a] * second[a][b]) if a in second else 0 for a, b in pairs]
    )
    seen = np.bincount((ids[:, 0] * 23 + ids[:, 1]).numpy(), minlength=23 * 23)
    assert seen[expected == 0].sum() == 0
    big = expected >= 5
    cells = [*zip(seen[big], expected[big], strict=True), (seen[~big].sum(), expected[~big].sum())]
    cells = [(s, e) for s, e in cells if e > 0]
    statistic = sum((s - e) ** 2 / e for s, e in cells)
    assert len(cells) > 8
    assert statistic < len(cells) + 4 * (2 * len(cells)) ** 0.5


def test_stops_and_streams(model: LlamaForCausalLM) -> None:
    free = generate(model, PROMPTS, 12, Law(), 4, stop=())[:, 7:]
    stop = int(free[1, 3])
    steps = list(stream(model, PROMPTS, 12, Law(), 4, stop=[stop]))
    tokens = torch.stack([step.tokens for step in steps], dim=1)
    for row, whole in zip(tokens.tolist(), free.tolist(), strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row[:end] == whole[:end][: len(row)]
        assert set(row[end:]) <= {0}
    assert steps[-1].done[1] and not steps[0].done[1]
    assert (
        len(list(stream(model, PROMPTS[1:2], 12, Law(), [seeds.keys(4, [1])[0]], stop=[stop]))) <= 4
    )


def test_the_logits_of_a_step_are_those_its_token_was_drawn_from(model: LlamaForCausalLM) -> None:
    steps = list(stream(model, PROMPTS[:1], 6, Law(0.0), stop=()))
    ids = torch.tensor([PROMPTS[0] + [int(step.tokens) for step in steps]])
    with torch.no_grad():
        full = model(ids).logits[0]
    torch.testing.assert_close(torch.cat([step.logits for step in steps]), full[3:9])


def test_refuses_what_does_not_fit(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match="max_new_tokens: 61"):
        generate(model, [[1, 2, 3, 4]], 61)
    with pytest.raises(InputError, match="prompt"):
        generate(model, [[1], []], 3)
    with pytest.raises(InputError, match="key: 1 keys"):
        generate(model, PROMPTS, 3, key=[1])
    assert generate(model, [[1, 2]], 0).tolist() == [[1, 2]]
