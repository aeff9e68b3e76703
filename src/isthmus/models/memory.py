"""The memory that decoding needs: several texts under one model, each in a slot of its own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from isthmus.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class Memory(Protocol):
    """Several texts under one model; each lives in a slot from `open` to `close`."""

    context: int
    """The most tokens that one text may have."""

    def open(self) -> int:
        """An empty slot, the lowest that is free."""
        ...

    def close(self, slot: int) -> None:
        """Forget a text and give its slot back."""
        ...

    def length(self, slot: int) -> int:
        """How many tokens of its text a slot holds."""
        ...

    def crop(self, slot: int, length: int) -> None:
        """Forget what stands at position `length` and after. Raises `InputError` beyond the end."""
        ...

    def extend(self, slots: Sequence[int], ids: Tensor, counts: Sequence[int], last: int) -> Tensor:
        """Continue texts: logits `[b, last, V]`, those of row i's last tokens at the right.

        `ids` (int64 `[b, n]`) holds row i's `counts[i]` tokens at the right; at their left stand
        any valid ids. Raises `InputError`, and does nothing, where a text would outgrow the
        context.
        """
        ...

    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        ...

    def feed(self, work: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Continue texts by ids (int64 `[n]` each): logits `[n, V]` by slot, `extend` for all."""
        slots = sorted(work)
        ids, counts = left_padded([work[slot].tolist() for slot in slots])
        logits = self.extend(slots, ids, counts, ids.shape[1])
        return {slot: row[-n:] for slot, row, n in zip(slots, logits, counts, strict=True)}


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Ids as int64 `[b, n]`, each row at the right after repeats of its first; their lengths."""
    counts = [len(row) for row in rows]
    if not counts or not all(counts):
        raise InputError("ids", "none", "one token or more for each text")
    width = max(counts)
    filled = [[row[0]] * (width - n) + list(row) for row, n in zip(rows, counts, strict=True)]
    return torch.tensor(filled, dtype=torch.int64), counts


def context_of(model: PreTrainedModel) -> int:
    """The most tokens of a text; without bound (`sys.maxsize`) where the model names none."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def arguments(model: PreTrainedModel) -> set[str]:
    """The arguments of a model's forward, or of the one that peft has wrapped."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    return set(inspect.signature(inner.forward).parameters)


def held(slots: Mapping[int, T], slot: int) -> T:
    """What a slot holds; raises `InputError` for one that is not open."""
    if slot not in slots:
        raise InputError("slot", slot, "an open one")
    return slots[slot]


def within(length: int, held: int) -> None:
    """Raise `InputError` for a length that a text of `held` tokens cannot be cropped to."""
    if not 0 <= length <= held:
        raise InputError("length", length, f"0 to {held}, the tokens held")


def fits(stop: int, context: int) -> int:
    """The length that a text comes to; raises `InputError` beyond the context."""
    if stop > context:
        raise InputError("text", f"{stop} tokens", f"at most {context}, the model's context")
    return stop
