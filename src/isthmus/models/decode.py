"""Sampling laws and one plain batched decode loop.

A *law* is a pure function from logits `[..., V]` to probabilities `[..., V]`, so a draft and
its verifier can be given the same one. A token is drawn from its row by inverting the
cumulative sum at one uniform number, and that number is a function of (key of the sequence,
position): what a sequence says does not depend on its neighbours in the batch, and generating
on from a prefix continues as if it had not been interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus import seeds
from isthmus.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


def top_k(logits: Tensor, k: int) -> Tensor:
    """Logits `[..., V]` with all but the k largest at -inf (ties with the k-th stay)."""
    if k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Logits `[..., V]` reduced to the fewest largest whose probability reaches p.

    Nucleus sampling (Holtzman et al., "The curious case of neural text degeneration", ICLR 2020,
    section 3.1). The largest always stays.
    """
    ascending, order = logits.sort(dim=-1, stable=True)
    below = ascending.softmax(-1).cumsum(-1) <= 1.0 - p
    below[..., -1] = False
    return logits.masked_fill(torch.zeros_like(below).scatter(-1, order, below), -torch.inf)


@dataclass(frozen=True)
class Law:
    """Temperature, then top-k, then top-p; calling it turns logits into probabilities.

    `temperature` 0 is greedy: all mass on the first largest logit. `top_k` 0 and `top_p` 1
    switch these two off. Raises `InputError` for values outside their range.

    >>> Law(temperature=0.0)(torch.tensor([0.5, 2.0, 1.0])).tolist()
    [0.0, 1.0, 0.0]
    >>> Law(top_k=2)(torch.tensor([0.0, 0.0, -1.0])).tolist()
    [0.5, 0.5, 0.0]
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError("temperature", self.temperature, "0 (greedy) or more")
        if self.top_k < 0:
            raise InputError("top_k", self.top_k, "0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p", self.top_p, "above 0, at most 1 (off)")

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0

    def __call__(self, logits: Tensor) -> Tensor:
        """Probabilities `[..., V]`, in float32 or the finer type of `logits`."""
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self.greedy:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        logits = logits / self.temperature
        if self.top_k:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        return logits.softmax(-1)


def draw(probabilities: Tensor, u: Tensor) -> Tensor:
    """The token of each row (int64 `[...]`): the inverse of the cumulative sum at u in [0, 1).

    `probabilities` `[..., V]` need not sum to 1; a token of probability 0 is never drawn.

    >>> draw(torch.tensor([[0.25, 0.0, 0.75], [0.25, 0.0, 0.75]]), torch.tensor([0.2, 0.25]))
    tensor([0, 2])
    """
    total = probabilities.double().cumsum(-1)
    whole = total[..., -1:].contiguous()
    height = u.double().unsqueeze(-1) * whole
    # Rounding may lift u * total to total itself; the token that completes it takes it.
    last = torch.searchsorted(total, whole)
    return torch.minimum(torch.searchsorted(total, height, right=True), last).squeeze(-1)


class Step(NamedTuple):
    """What one step of the loop gave: `tokens` (int64 `[b]`, the pad after a stop), the `logits`
    `[b, V]` they were drawn from, and which sequences are `done` after it (bool `[b]`)."""

    tokens: Tensor
    logits: Tensor
    done: Tensor


def stop_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a text, as the model's generation settings name them."""
    given = model.generation_config.eos_token_id if model.generation_config else None
    if given is None:
        return ()
    return tuple(given) if isinstance(given, (list, tuple)) else (int(given),)


def pad(ids: Ids, token: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences as one left-padded batch (int64 `[b, L]`) and the mask of real tokens (bool)."""
    rows = [torch.as_tensor(row, dtype=torch.int64) for row in ids]
    if not rows or any(row.ndim != 1 or len(row) == 0 for row in rows):
        raise InputError("prompt", "an empty sequence or batch", "one token or more in each")
    width = max(len(row) for row in rows)
    batch = torch.stack([F.pad(row, (width - len(row), 0), value=token) for row in rows])
    real = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    return batch, real


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    ids: Ids,
    max_new_tokens: int,
    law: Callable[[Tensor], Tensor] = Law(),
    key: int | Sequence[int] = 0,
    *,
    stop: Sequence[int] | None = None,
    pad_token: int | None = None,
) -> Iterator[Step]:
    """Decode `ids` (`[b, L]`, or sequences of unequal lengths), one `Step` per position.

    `key` seeds sequence i with `seeds.keys(key, [i])`; a row of keys gives each its own. `stop`
    ends a sequence (by default the model's own stop tokens); the loop ends when all have ended
    or after `max_new_tokens`. Raises `InputError` for a prompt that leaves no room in the context.
    """
    stop = stop_tokens(model) if stop is None else tuple(stop)
    if pad_token is None:
        pad_token = model.config.pad_token_id
    filler = pad_token if pad_token is not None else (stop[0] if stop else 0)
    batch, real = pad(ids, filler)
    batch, real = batch.to(model.device), real.to(model.device)
    size, width = batch.shape
    context = getattr(model.config, "max_position_embeddings", None)
    if max_new_tokens < 0 or (context and width + max_new_tokens > context):
        room = f"0 to {context - width}" if context else "0 or more"
        raise InputError("max_new_tokens", max_new_tokens, f"{room} after {width} prompt tokens")
    uniforms = _uniforms(key, real.sum(1), max_new_tokens)
    padded = not bool(real.all())
    positions = (real.cumsum(1) - 1).clamp_min(0)
    done = torch.zeros(size, dtype=torch.bool, device=batch.device)
    ends = torch.tensor(stop, dtype=torch.int64, device=batch.device)
    cache, current = None, batch
    for step in range(max_new_tokens):
        out = model(
            input_ids=current,
            attention_mask=real.long() if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = out.past_key_values, out.logits[:, -1]
        if isinstance(law, Law) and law.greedy:
            tokens = logits.argmax(-1)
        else:
            tokens = draw(law(logits), uniforms[:, step].to(logits.device))
        tokens = torch.where(done, filler, tokens)
        done = done | torch.isin(tokens, ends)
        yield Step(tokens, logits, done)
        if bool(done.all()):
            return
        current, positions = tokens[:, None], positions[:, -1:] + 1
        if padded:
            real = F.pad(real, (0, 1), value=True)


def generate(
    model: PreTrainedModel,
    ids: Ids,
    max_new_tokens: int,
    law: Callable[[Tensor], Tensor] = Law(),
    key: int | Sequence[int] = 0,
    *,
    stop: Sequence[int] | None = None,
    pad_token: int | None = None,
) -> Tensor:
    """The prompts, left-padded, and what follows them (int64 `[b, L + n]`); see `stream`."""
    steps = stream(model, ids, max_new_tokens, law, key, stop=stop, pad_token=pad_token)
    tokens = [step.tokens for step in steps]
    if pad_token is None:
        pad_token = model.config.pad_token_id
    if pad_token is None:
        pad_token = next(iter(stop_tokens(model) if stop is None else stop), 0)
    batch, _ = pad(ids, pad_token)
    return torch.cat([batch.to(model.device), *(row[:, None] for row in tokens)], dim=1)


def _uniforms(key: int | Sequence[int], lengths: Tensor, count: int) -> Tensor:
    """Float64 `[b, count]`: the number of sequence i at its positions lengths[i] onwards."""
    if isinstance(key, (int, np.integer)):
        each = seeds.keys(int(key), np.arange(len(lengths))).tolist()
    else:
        each = [int(k) for k in key]
        if len(each) != len(lengths):
            raise InputError(
                "key", f"{len(each)} keys", f"one, or {len(lengths)} for the sequences"
            )
    rows = [
        seeds.uniform(k, (n + count,), torch.float64)[n:]
        for k, n in zip(each, lengths.tolist(), strict=True)
    ]
    return torch.stack(rows)
