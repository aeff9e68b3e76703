"""Behind Hugging Face's `generate`: the same text, and one clear line for what is not honoured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.inference import tiny
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.inference.generation import custom_generate
from isthmus.inference.together import decode
from isthmus.models import decode as plain
from isthmus.models.decode import Law
from isthmus.models.language import Language, load
from isthmus.wire.ledger import Ledger

EDGED = ["full-row", "tk-slt", "dssd", "cloud-only"]


@pytest.fixture(scope="module")
def pair() -> tuple[Language, Language]:
    return load("embedded"), load("embedded:draft")


def padded(rows: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """Rows of ids, left-padded, with their mask."""
    batch, real = plain.pad(rows, pad)
    return {"input_ids": batch, "attention_mask": real.long()}


@pytest.mark.parametrize("method", EDGED)
def test_greedy_is_plain_generate_for_the_embedded_pair(
    pair: tuple[Language, Language], method: str
) -> None:
    target, draft = pair
    given = target.tokenizer(
        ["The list of", "Return True if the object is", "A"], return_tensors="pt", padding=True
    )
    assert bool((given["attention_mask"] == 0).any())
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    expected = target.model.generate(**given, **options)
    assert bool((expected[:, -1] == target.tokenizer.pad_token_id).any())  # one has stopped
    for model in (draft, draft.model):
        found = target.model.generate(
            **given, **options, custom_generate=custom_generate(model, method)
        )
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("kind", sorted(tiny.KINDS))
@pytest.mark.parametrize("method", EDGED)
def test_greedy_is_plain_generate_for_fresh_pairs(kind: str, method: str) -> None:
    target = tiny.fresh(kind)
    drafts = [tiny.near(target)]
    if kind == "llama":  # a draft of another architecture, which nearly never hits
        drafts.append(tiny.fresh("gpt2", seed=9, layers=1))
    rows = tiny.prompts(3)
    options: dict[str, Any] = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    plainly = [target.generate(torch.tensor([row]), **options) for row in rows]
    for draft in drafts:
        call = custom_generate(draft, method)
        lone = target.generate(torch.tensor([rows[1]]), **options, custom_generate=call)
        assert torch.equal(lone, plainly[1])
        found = target.generate(**padded(rows), **options, custom_generate=call)
        for text, (alone,) in zip(found, plainly, strict=True):
            assert torch.equal(text[-len(alone) :], alone)
            assert not text[: len(text) - len(alone)].any()


def test_sampling_has_the_settings_the_prompts_and_the_seed_of_the_call() -> None:
    target = tiny.fresh()
    draft, rows = tiny.near(target), tiny.prompts(4)
    call = custom_generate(draft, "dssd", {"gamma": 3}, seed=6)
    found = target.generate(
        **padded(rows), do_sample=True, temperature=0.7, top_k=9, top_p=0.8, max_length=30,
        eos_token_id=[17, 4], pad_token_id=0, custom_generate=call,
    )  # fmt: skip
    width = max(map(len, rows))
    replies = decode(
        tiny.language(target), tiny.language(draft), rows, settings={"gamma": 3}, seed=6,
        law=Law(0.7, 9, 0.8), max_new_tokens=30 - width, stop=[17, 4],
    )  # fmt: skip
    assert {reply.finished for reply in replies} == {"stop", "length"}
    longest = max(len(reply.ids) for reply in replies)
    for row, reply in zip(found, replies, strict=True):
        assert row[width:].tolist() == reply.ids + [0] * (longest - len(reply.ids))
    assert torch.equal(found[:, :width], padded(rows)["input_ids"])


def test_the_target_alone_samples_what_plain_decoding_does() -> None:
    target, rows = tiny.fresh(), tiny.prompts(3)
    call = custom_generate(None, "cloud-only", seed=2)
    found = target.generate(
        **padded(rows), do_sample=True, top_k=0, max_new_tokens=12, pad_token_id=0,
        custom_generate=call,
    )  # fmt: skip
    keys = seeds.keys(seeds.key(2), range(3)).tolist()
    for row, text, key in zip(rows, found, keys, strict=True):
        alone = plain.generate(target, [row], 12, Law(), [key])
        assert text[-12:].tolist() == alone[0, -12:].tolist()


def test_several_texts_of_one_prompt_differ() -> None:
    target = tiny.fresh()
    found = target.generate(
        torch.tensor(tiny.prompts(1)), do_sample=True, top_k=0, num_return_sequences=5,
        max_new_tokens=8, pad_token_id=0, custom_generate=custom_generate(tiny.near(target)),
    )  # fmt: skip
    assert len({tuple(row) for row in found.tolist()}) == 5


def test_the_settings_of_the_model_count_as_well() -> None:
    target, row = tiny.fresh(), torch.tensor(tiny.prompts(1))
    whole = target.generate(row, max_new_tokens=20, do_sample=False, pad_token_id=0)
    end = int(whole[0, row.shape[1] + 6])
    target.generation_config = GenerationConfig(max_new_tokens=20, eos_token_id=end, pad_token_id=0)
    expected = target.generate(row)
    found = target.generate(row, custom_generate=custom_generate(tiny.near(target), "tk-slt"))
    assert torch.equal(found, expected) and found.shape[1] < whole.shape[1]


def test_every_crossing_is_counted() -> None:
    target, ledger = tiny.fresh(), Ledger()
    call = custom_generate(tiny.near(target), "dssd", ledger=ledger, link="lte")
    target.generate(torch.tensor(tiny.prompts(1)), max_new_tokens=9, custom_generate=call)
    assert set(ledger.sums("bytes", "kind", what="crossing")) == {
        "open", "opened", "offer", "verdict", "close",
    }  # fmt: skip
    assert max(row["t"] for row in ledger.rows()) > 0.12  # two round trips and more


class Never(StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.zeros(len(input_ids), dtype=torch.bool)


def warpers(*each: Any) -> LogitsProcessorList:
    return LogitsProcessorList(each)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"repetition_penalty": 1.2}, "logits processor: RepetitionPenalty"),
        ({"min_new_tokens": 3, "eos_token_id": 5}, "logits processor: MinLength"),
        ({"do_sample": True, "min_p": 0.1}, "logits processor: MinP"),
        ({"do_sample": True, "typical_p": 0.5}, "logits processor: Typical"),
        ({"logits_processor": warpers(TopKLogitsWarper(3))}, "logits processor: TopK"),
        (
            {"do_sample": True, "logits_processor": warpers(
                TopPLogitsWarper(0.5), TemperatureLogitsWarper(0.5))},
            "logits processor: Temperature",
        ),
        (
            {"do_sample": True, "top_k": 0,
             "logits_processor": warpers(TopKLogitsWarper(3, filter_value=-5.0))},
            "filter_value",
        ),
        ({"stopping_criteria": StoppingCriteriaList([Never()])}, "stopping criterion: Never"),
        ({"max_time": 3.0}, "stopping criterion: MaxTime"),
        ({"num_beams": 2}, "generation mode: beam_search"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"max_new_tokens": tiny.CONTEXT}, "max_length"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "attention_mask"),
        ({"output_hidden_states": True}, "generate argument: output_hidden_states"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(given: dict[str, Any], field: str) -> None:
    target = tiny.fresh()
    options: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0} | given
    call = custom_generate(tiny.near(target))
    with pytest.raises(InputError) as error:
        target.generate(torch.tensor([[3, 4, 5, 6]]), **options, custom_generate=call)
    assert str(error.value).startswith(field) and "\n" not in str(error.value)


def test_a_cache_that_holds_tokens_is_refused() -> None:
    target, ids = tiny.fresh(), torch.tensor([[3, 4, 5, 6]])
    cache = DynamicCache(config=target.config)
    target(ids[:, :2], past_key_values=cache)
    with pytest.raises(InputError, match="past_key_values"):
        target.generate(
            ids, past_key_values=cache, max_new_tokens=2,
            custom_generate=custom_generate(tiny.near(target)),
        )  # fmt: skip


def test_a_method_that_asks_no_target_is_refused() -> None:
    target = tiny.fresh()
    with pytest.raises(InputError, match="method: device-only"):
        target.generate(
            torch.tensor([[3, 4]]), max_new_tokens=2,
            custom_generate=custom_generate(tiny.near(target), "device-only"),
        )  # fmt: skip
