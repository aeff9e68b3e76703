"""What opens and closes a session: four schemas, and the mark of a tokenizer.

`open` goes up and is answered by `opened` or `refused`; these three are described messages, as
the parties have agreed on nothing yet. Offers and verdicts follow in the compact layout, by the
schemas of the session's method, then `close`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import InputError
from isthmus.inference.method import Method
from isthmus.wire.errors import WireError
from isthmus.wire.message import Field, Message, Schema, TensorSpec, peek

PROMPT = 1 << 15
"""The most tokens of a prompt."""

STOPS = 64
"""The most tokens that end a text."""

TEXT = 1 << 17
"""The most tokens that a session may ask for."""

_INTS = TensorSpec(torch.int32, (None,))

OPEN = Schema(
    "open",
    1,
    {
        "method": Field("str", limit=64),
        "settings": Field("str", limit=1024),
        "temperature": Field("f64", low=0.0),
        "top_k": Field("u32"),
        "top_p": Field("f64", low=0.0, high=1.0),
        "key": Field("i64"),
        "max_new_tokens": Field("u32", high=TEXT),
        "fingerprint": Field("str", limit=64),
    },
    {"prompt": _INTS, "stop": _INTS},
    max_bytes=(1 << 14) + 4 * (PROMPT + STOPS),
)
"""Up: how the text is to be decoded (settings as JSON), and the prompt."""

OPENED = Schema(
    "opened",
    2,
    {"verify_seconds": Field("f64", low=0.0), "context": Field("u32", low=1)},
    max_bytes=1 << 12,
)
"""Down: what one judging forward takes at the edge, and the most tokens of a text there."""

REFUSED = Schema("refused", 3, {"problem": Field("str", limit=512)}, max_bytes=1 << 13)
"""Down: why the edge does not go on, in one line."""

CLOSE = Schema("close", 4, max_bytes=64)
"""Up: the text has ended."""


def refusal(problem: str) -> Message:
    """A `refused` with as much of the problem as fits, on one line."""
    line = " ".join(problem.split()).encode()[:512].decode(errors="ignore")
    return Message("refused", {"problem": line}, {})


def addressed(data: bytes) -> tuple[int, int] | None:
    """The session and sequence that bytes claim to belong to; None when they are no message."""
    try:
        return peek(data)[1:]
    except WireError:
        return None


def same(one: Message, other: Message) -> bool:
    """Whether two messages of one kind have the same contents."""
    return one.fields == other.fields and all(
        one.tensors[name].equal(other.tensors[name]) for name in one.tensors
    )


def kinds(methods: Iterable[type[Method]], vocab: int) -> dict[int, str]:
    """The kinds of all compact messages of these methods, by schema number."""
    found = {CLOSE.number: CLOSE.kind}
    for kind in methods:
        if kind.edge:
            method = kind(vocab)
            found |= {method.up.number: method.up.kind, method.down.number: method.down.kind}
    return found


def fingerprint(tokenizer: Any, vocab: int) -> str:
    """What two parties compare to know that their ids mean the same text: 16 hex digits of the
    tokenizer's words and ids and the size of the models' vocabulary, which alone counts where
    there is no tokenizer."""
    if tokenizer is None:
        return f"vocabulary of {vocab}"
    return _digest(tokenizer, len(tokenizer), vocab)


@lru_cache(maxsize=8)
def _digest(tokenizer: Any, size: int, vocab: int) -> str:
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps([vocab, size, words]).encode()).hexdigest()[:16]


def checked_prompt(prompt: Tensor | Iterable[int], vocab: int) -> list[int]:
    """A prompt as plain integers; raises `InputError` for an empty, long or foreign one."""
    ids = prompt.tolist() if isinstance(prompt, Tensor) else [int(i) for i in prompt]
    if not 0 < len(ids) <= PROMPT:
        raise InputError("prompt", f"{len(ids)} tokens", f"1 to {PROMPT}")
    if min(ids) < 0 or max(ids) >= vocab:
        raise InputError("prompt", f"ids {min(ids)} to {max(ids)}", f"0 to {vocab - 1}")
    return ids
