"""Keys and values of several texts at once, in buffers that all of them share.

`Slots` keeps one buffer per layer, `[slots, heads, positions, d]`. Texts of different lengths go
through one forward: each token brings its position, and a 4-D mask shows it its own past only.
Forgetting sets a length and moves nothing. `memory_of` picks what a model can be served by.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from isthmus.models.memory import Memory, arguments, context_of, fits, held, within
from isthmus.models.snapshots import Snapshots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64  # positions by which the buffers grow at least


def memory_of(model: PreTrainedModel) -> Memory:
    """`Slots` where every layer attends to keys and values by position, `Snapshots` elsewhere."""
    return Slots(model) if _by_position(model) else Snapshots(model)


class Slots(Memory):
    """Keys and values of many texts in shared buffers; `model` must attend by position.

    The buffers grow (slots and positions at least doubling) and are reused; a closed slot is
    wiped. Neighbouring slots are read in place, others are gathered for the forward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.context = context_of(model)
        self._buffers = _Buffers()
        self._lengths: dict[int, int] = {}
        self._free: list[int] = []
        self._windows = _windows(model)
        self._hidden = torch.tensor(
            torch.finfo(model.dtype).min, dtype=model.dtype, device=model.device
        )
        self._seen = torch.zeros_like(self._hidden)
        self._keys = torch.arange(BLOCK, device=model.device)

    def open(self) -> int:
        slot = heapq.heappop(self._free) if self._free else len(self._lengths)
        self._lengths[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        held(self._lengths, slot)
        del self._lengths[slot]
        heapq.heappush(self._free, slot)
        self._buffers.wipe(slot)

    def length(self, slot: int) -> int:
        return held(self._lengths, slot)

    def crop(self, slot: int, length: int) -> None:
        within(length, held(self._lengths, slot))
        self._lengths[slot] = length

    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self._buffers.pairs.values() for tensor in pair)

    @torch.inference_mode()
    def extend(self, slots: Sequence[int], ids: Tensor, counts: Sequence[int], last: int) -> Tensor:
        starts = [held(self._lengths, slot) for slot in slots]
        ends = [start + n for start, n in zip(starts, counts, strict=True)]
        stop = fits(max(ends), self.context)
        buffers, width, device = self._buffers, ids.shape[1], self._hidden.device
        buffers.reserve(len(self._lengths) + len(self._free), stop, self.context)
        if stop > len(self._keys):
            self._keys = torch.arange(buffers.room, device=device)
        first = slots[0]
        neighbours = list(slots) == list(range(first, first + len(slots)))
        buffers.stop = stop
        if neighbours and len(set(starts)) == 1 and set(counts) == {width}:
            positions = self._keys[None, starts[0] : stop]
            buffers.rows, buffers.at = slice(first, first + len(slots)), slice(starts[0], stop)
        else:
            rows = torch.tensor(slots, device=device)
            begin = torch.tensor(starts, device=device)[:, None]
            lead = torch.tensor([width - n for n in counts], device=device)[:, None]
            column = self._keys[:width] - lead
            # What pads a row repeats its first token, position and all: its answer is finite, and
            # neither that nor its keys are ever used.
            positions = begin + column.clamp_min(0)
            buffers.rows = slice(first, first + len(slots)) if neighbours else rows
            if set(counts) == {width}:
                buffers.at = (rows[:, None], positions)
            else:
                i, j = (column >= 0).nonzero(as_tuple=True)
                buffers.at = (rows[i], positions[i, j], i, j)
        logits = self.model(
            input_ids=ids.to(device),
            attention_mask=self._mask(positions, stop),
            position_ids=positions,
            past_key_values=buffers,
            use_cache=True,
            logits_to_keep=last,
        ).logits
        self._lengths.update(zip(slots, ends, strict=True))
        return logits

    def _mask(self, positions: Tensor, stop: int) -> Any:
        """What is added to the scores, `[b or 1, 1, n, stop]`; by kind of layer if these differ."""
        at, keys = positions[:, None, :, None], self._keys[:stop]
        past = keys <= at
        masks = {}
        for kind, window in self._windows.items():
            seen = past if window is None or window >= stop else past & (keys > at - window)
            masks[kind] = torch.where(seen, self._seen, self._hidden)
        return masks if len(masks) > 1 else next(iter(masks.values()))


class _Buffers(Cache):
    """The buffers as a model sees them: it hands over new keys and values and is shown all.

    Before a forward are set: `rows`, the slots it is about (a slice, or int64 `[b]`); `stop`, the
    length of the longest text after it; `at`, where the new tokens go: the positions (a slice)
    that all rows share, or slots `[b, 1]` and positions `[b, n]`, or, of a padded batch, slot,
    position, row and column of each token (int64 `[t]`).
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots = self.room = self.stop = 0
        self.rows: slice | Tensor = slice(0, 0)
        self.at: slice | tuple[Tensor, ...] = slice(0, 0)

    def reserve(self, slots: int, stop: int, context: int) -> None:
        """Make room for so many slots and positions, keeping what is there."""
        if slots <= self.slots and stop <= self.room:
            return
        if slots > self.slots:
            self.slots = max(slots, 2 * self.slots)
        if stop > self.room:
            blocks = -(-stop // BLOCK) * BLOCK
            self.room = min(max(blocks, 2 * self.room), max(blocks, context))
        for layer, (keys, values) in self.pairs.items():
            self.pairs[layer] = self._grown(keys), self._grown(values)

    def wipe(self, slot: int) -> None:
        """Zero a slot: a masked value counts for nothing, unless it is not a number."""
        with torch.inference_mode():
            for pair in self.pairs.values():
                for tensor in pair:
                    if slot < len(tensor):
                        tensor[slot] = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write `[b, heads, n, d]`, get `[b, heads, stop, d]`."""
        if layer_idx not in self.pairs:
            self.pairs[layer_idx] = self._empty(key_states), self._empty(value_states)
        keys, values = self.pairs[layer_idx]
        return self._written(keys, key_states), self._written(values, value_states)

    def _written(self, buffer: Tensor, new: Tensor) -> Tensor:
        if isinstance(self.at, slice):
            buffer[self.rows, :, self.at] = new
        else:
            slots, positions, *real = self.at
            new = new.transpose(1, 2)
            buffer.transpose(1, 2)[slots, positions] = new[tuple(real)] if real else new
        if isinstance(self.rows, slice):
            return buffer[self.rows, :, : self.stop]
        return buffer[:, :, : self.stop].index_select(0, self.rows)

    def _grown(self, old: Tensor) -> Tensor:
        new = self._empty(old)
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.slots, like.shape[1], self.room, like.shape[3])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The length of the longest text."""
        return self.stop


def _by_position(model: PreTrainedModel) -> bool:
    """Whether all that a model remembers is keys and values that a 4-D mask can hide."""
    return (
        {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"} <= arguments(model)
        and not model._is_stateful
        and model.config._attn_implementation in ("eager", "sdpa")
        and not getattr(model.config, "alibi", False)  # positions from a 2-D mask
        and set(_windows(model)) <= {"full_attention", "sliding_attention"}
    )


def _windows(model: PreTrainedModel) -> dict[str, int | None]:
    """How far back each kind of layer sees: its window in tokens, the token itself included."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        chunk = getattr(config, "attention_chunk_size", None)
        kinds = ["chunked_attention" if chunk else _sliding(window)]
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _sliding(window: int | None) -> str:
    return "full_attention" if window is None else "sliding_attention"
