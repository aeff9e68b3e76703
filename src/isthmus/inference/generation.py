"""Split inference behind Hugging Face's own `generate`.

    decode = custom_generate(draft, method="dssd")
    ids = model.generate(**tokenizer(text, return_tensors="pt"), custom_generate=decode)

`model` is the edge's target, the draft the device's. `generate` prepares settings, prompts and
processors as ever; what the loop cannot honour exactly is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isthmus.errors import InputError
from isthmus.inference.method import Method, method_of
from isthmus.inference.together import decode
from isthmus.models.decode import Law
from isthmus.models.kv import context_of
from isthmus.models.language import Language
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

HONOURED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def custom_generate(
    draft: PreTrainedModel | Language | None,
    method: Method | type[Method] | str = "full-row",
    settings: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    link: Link | str | None = None,
    device: str = "phone",
    edge: str = "edge-server",
    ledger: Ledger | None = None,
) -> Callable[..., Tensor]:
    """What `model.generate(..., custom_generate=...)` calls: `[b, L + n]` ids, padded after a stop.

    Honours max_new_tokens and max_length, stop tokens, do_sample, temperature, top_k, top_p and a
    left-padded batch; `seed` stands in for the global random state (row i has the key of sequence
    i, as in `isthmus.models.decode`). The other arguments are those of `together.decode`. The
    callable raises `InputError` for any other setting that would change the text.
    """
    language = draft if draft is None or isinstance(draft, Language) else _bare(draft)

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        served = method_of(method, model.config.get_text_config(decoder=True).vocab_size, settings)
        if not served.edge:
            raise InputError("method", served.catalogue_name, "one that asks the target")
        _check(generation_config, model_kwargs)
        longest, stop = _ends(stopping_criteria)
        room = min(context_of(each) for each in (model, language and language.model) if each)
        if longest > room:
            raise InputError("max_length", longest, f"at most {room}, the smaller context")
        replies = decode(
            _bare(model, language.tokenizer if language else None), language,
            _prompts(input_ids, model_kwargs.get("attention_mask")), method=served,
            law=_law(generation_config, logits_processor),
            max_new_tokens=longest - input_ids.shape[1], seed=seed, link=link, device=device,
            edge=edge, stop=stop, ledger=ledger,
        )  # fmt: skip
        for reply in replies:
            if reply.finished == "error":
                raise RuntimeError(reply.problem)
        width = max(len(reply.tokens) for reply in replies)
        new = torch.full((len(replies), width), _pad(generation_config, stop))
        for row, reply in zip(new, replies, strict=True):
            row[: len(reply.tokens)] = torch.tensor(reply.ids)
        return torch.cat([input_ids, new.to(input_ids)], dim=1)

    return generate


def _bare(model: PreTrainedModel, tokenizer: Any = None) -> Language:
    return Language(model, tokenizer, "")


def _check(config: GenerationConfig, given: Mapping[str, Any]) -> None:
    """Refuse ways of decoding other than greedy and sampling, and inputs beside the ids."""
    from transformers.generation.configuration_utils import GenerationMode

    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError("generation mode", mode.value, "greedy search, sample")
    if config.return_dict_in_generate:
        raise InputError("return_dict_in_generate", True, "False: the ids alone are returned")
    for name, value in given.items():
        if name not in HONOURED and value is not None:
            raise InputError("generate argument", name, ", ".join(sorted(HONOURED)))
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise InputError("past_key_values", f"{cache.get_seq_length()} tokens", "an empty cache")


def _law(config: GenerationConfig, processors: Any) -> Law:
    """The law that the processors make, which come in the order of `Law`."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    order = {TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k",
             TopPLogitsWarper: "top_p"}  # fmt: skip
    found: dict[str, float] = {} if config.do_sample else {"temperature": 0.0}
    place = -1
    for each in processors:
        name = order.get(type(each))
        allowed = "temperature, top-k and top-p, once each in this order, with do_sample"
        if name is None or list(order).index(type(each)) <= place or not config.do_sample:
            raise InputError("logits processor", type(each).__name__, allowed)
        if getattr(each, "filter_value", -torch.inf) != -torch.inf:
            raise InputError("filter_value", each.filter_value, "-inf")
        place = list(order).index(type(each))
        found[name] = getattr(each, name)
    return Law(**found)  # type: ignore[arg-type]


def _ends(criteria: Any) -> tuple[int, list[int]]:
    """The longest text (the prompt included) and the tokens that end one."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    lengths: list[int] = []
    stop: list[int] = []
    for each in criteria:
        if type(each) is MaxLengthCriteria:
            lengths.append(each.max_length)
        elif type(each) is EosTokenCriteria:
            stop += each.eos_token_id.view(-1).tolist()
        else:
            allowed = "max_length, max_new_tokens and eos_token_id"
            raise InputError("stopping criterion", type(each).__name__, allowed)
    if not lengths:
        raise InputError("max_length", "none", "max_length or max_new_tokens")
    return min(lengths), stop


def _prompts(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The rows without their padding, which stands at the left."""
    if mask is None:
        return list(ids)
    real = mask.bool()
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise InputError("attention_mask", "padding inside or at the right", "padding at the left")
    return [row[keep] for row, keep in zip(ids, real, strict=True)]


def _pad(config: GenerationConfig, stop: list[int]) -> int:
    if config.pad_token_id is not None:
        return config.pad_token_id
    return stop[0] if stop else 0
