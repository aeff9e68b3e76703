"""The memory of models that cannot be cut back: copies of their state, and ids fed again.

A recurrent state is what a text has come to; nothing in it can be forgotten but all. So copies are
kept along the way, behind the same calls as keys and values (`isthmus.models.kv`). Any model that
continues from a cache of its own can be served so, one forward for each text.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isthmus.models.memory import Memory, arguments, context_of, fits, held, within

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Text:
    """A text under `Snapshots`: its ids, the state after the first `fed` of them (None: not made
    yet, the same as that of the last snapshot), and snapshots as (length, state), the shortest
    first."""

    ids: list[int] = field(default_factory=list)
    state: Any = None
    fed: int = 0
    kept: list[tuple[int, Any]] = field(default_factory=list)


class Snapshots(Memory):
    """The states of many texts, one forward each, for any model that continues from a cache.

    Before a text grows, its state is copied. Of the copies one is kept for each power of two of
    the distance from the end, so their number grows with the logarithm of the length. `crop`
    goes back to the last copy that is short enough; what it lacks is fed with the next tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.context = context_of(model)
        self._texts: dict[int, _Text] = {}
        self._free: list[int] = []
        # The models name their cache differently, `cache_params` where it holds no keys and values.
        named = arguments(model)
        self._name = "past_key_values" if "past_key_values" in named else "cache_params"
        self._keeps = "logits_to_keep" in named
        self._chunks = self._continues()

    def open(self) -> int:
        slot = heapq.heappop(self._free) if self._free else len(self._texts)
        self._texts[slot] = _Text()
        return slot

    def close(self, slot: int) -> None:
        held(self._texts, slot)
        del self._texts[slot]
        heapq.heappush(self._free, slot)

    def length(self, slot: int) -> int:
        return len(held(self._texts, slot).ids)

    def crop(self, slot: int, length: int) -> None:
        text = held(self._texts, slot)
        within(length, len(text.ids))
        del text.ids[length:]
        if text.fed > length:
            text.kept = [(n, state) for n, state in text.kept if n <= length]
            text.state, text.fed = None, text.kept[-1][0] if text.kept else 0

    def nbytes(self) -> int:
        states = [(text.state, [state for _, state in text.kept]) for text in self._texts.values()]
        return sum(tensor.nbytes for tensor in {id(t): t for t in _tensors(states)}.values())

    @torch.inference_mode()
    def extend(self, slots: Sequence[int], ids: Tensor, counts: Sequence[int], last: int) -> Tensor:
        texts = [held(self._texts, slot) for slot in slots]
        fits(max(len(t.ids) + n for t, n in zip(texts, counts, strict=True)), self.context)
        rows = [
            self._grow(text, row[-n:], min(n, last))
            for text, row, n in zip(texts, ids.tolist(), counts, strict=True)
        ]
        return torch.stack([torch.cat([row[:1].expand(last - len(row), -1), row]) for row in rows])

    def _grow(self, text: _Text, ids: list[int], last: int) -> Tensor:
        """Feed what a text lacks and `ids`; logits `[last, V]`."""
        if text.state is None and text.kept:
            text.state = deepcopy(text.kept[-1][1])
        elif text.state is not None:
            text.kept = _thinned([*text.kept, (text.fed, deepcopy(text.state))], text.fed)
        fresh = text.ids[text.fed :] + ids
        state, text.state = text.state, None  # a forward that fails leaves the last copy
        single = state is not None and not self._chunks
        parts = [[token] for token in fresh] if single else [fresh]
        logits = []
        for part in parts:
            state, row = self._forward(part, state, min(last, len(part)))
            logits.append(row)
        text.ids += ids
        text.state, text.fed = state, len(text.ids)
        return torch.cat(logits)[-last:]

    def _forward(self, ids: list[int], state: Any, last: int) -> tuple[Any, Tensor]:
        """The state after `ids` and the logits `[last, V]`; writes into the state it is given."""
        wanted = {"logits_to_keep": last} if self._keeps else {}
        given = torch.tensor([ids], device=self.model.device)
        out = self.model(input_ids=given, use_cache=True, **{self._name: state}, **wanted)
        return out[self._name], out.logits[0, -last:]

    @torch.inference_mode()
    def _continues(self) -> bool:
        """Whether several tokens at once continue from a state as they would one by one.

        Some scans start from nothing whenever they see more than one token (Mamba's in
        transformers 5.23), without a word. So it is tried out, on a dozen tokens.
        """
        ids = (torch.arange(12) * 7919 % self.model.config.get_text_config().vocab_size).tolist()
        _, whole = self._forward(ids, None, 4)
        state, _ = self._forward(ids[:8], None, 1)
        _, after = self._forward(ids[8:], state, 4)
        return float((after - whole).abs().max()) <= 1e-4 * float(whole.abs().max())


def _thinned(kept: list[tuple[int, Any]], now: int) -> list[tuple[int, Any]]:
    """The oldest for each power of two of the distance from `now`."""
    oldest: dict[int, tuple[int, Any]] = {}
    for each in kept:
        oldest.setdefault((now - each[0]).bit_length(), each)
    return list(oldest.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors inside lists, tuples, dictionaries and the attributes of other objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(list(vars(value).values()))
