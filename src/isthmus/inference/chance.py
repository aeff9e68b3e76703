"""The shared uniform numbers of a session: a function of (key, role, position in the text).

Both ends hold the session's key, so either can compute any of them, no number ever crosses, a
round that is repeated meets the same numbers, and methods that only place the same mathematics
differently produce the same tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from isthmus import seeds

Role = Literal["draft", "void", "accept", "correct"]


def chances(key: int, role: Role, start: int, count: int) -> Tensor:
    """Float64 `[count]` in [0, 1): the numbers of one role at positions `start` onwards.

    `correct` draws what the target says where no draft is accepted. Its numbers are those of
    plain decoding under the same key, so a text without drafts is that of
    `isthmus.models.decode.generate`, token for token.
    """
    if role != "correct":
        key = seeds.fold(key, seeds.key("chance", role))
    return seeds.uniform(key, (start + count,), torch.float64)[start:]
