"""Error feedback: what one message leaves out is added to the next.

p_t = x_t + e_t, send C(p_t), e_{t+1} = p_t - C(p_t) (Seide et al., Interspeech 2014; Karimireddy
et al., ICML 2019, algorithm 2; Stich et al., NeurIPS 2018, algorithm 1). All that is decoded plus
what is still in memory is all that was put in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from isthmus.errors import InputError
from isthmus.tree import Tree
from isthmus.wire.codecs.base import Chain, Codec, Payload
from isthmus.wire.codecs.randomk import RandomK


@dataclass(frozen=True)
class ErrorFeedback:
    """A codec with a memory, which is the sender's to keep: floats in the type of the tensors.

    The codec must be a contraction, so random-k with `unbiased` is refused (its error would
    grow); `InputError`. The receiver decodes with `codec`.
    """

    codec: Codec

    def __post_init__(self) -> None:
        if _scaled(self.codec):
            raise InputError("error feedback", self.codec, "random-k without unbiased")

    def step(
        self,
        tensors: Mapping[str, Tensor],
        key: int,
        memory: Mapping[str, Tensor] | None = None,
        declared: bool = False,
    ) -> tuple[Payload, Tree]:
        """One message and the memory after it; `None` or an absent name is an empty memory."""
        corrected = _corrected(tensors, memory)
        payload = self.codec.encode(corrected, key, declared)
        return payload, _left(corrected, self.codec.decode(payload, corrected))

    def step_many(
        self,
        stacked: Mapping[str, Tensor],
        keys: Sequence[int] | Tensor,
        memory: Mapping[str, Tensor] | None = None,
        declared: bool = False,
    ) -> tuple[Payload, Tree]:
        """The same for n senders: tensors and memory `[n, *shape]`, n keys."""
        corrected = _corrected(stacked, memory)
        payload = self.codec.encode_many(corrected, keys, declared)
        template = {name: x[0] for name, x in corrected.items()} if payload.rows else None
        return payload, _left(corrected, self.codec.decode_many(payload, template))


def _corrected(tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor] | None) -> Tree:
    kept = memory or {}
    return {
        name: x.detach() + kept[name] if name in kept else x.detach() for name, x in tensors.items()
    }


def _left(corrected: Tree, decoded: Tree) -> Tree:
    return {
        name: x - decoded[name].to(x.device)
        for name, x in corrected.items()
        if x.is_floating_point()
    }


def _scaled(codec: Codec) -> bool:
    if isinstance(codec, Chain):
        return _scaled(codec.first) or _scaled(codec.then)
    return isinstance(codec, RandomK) and codec.unbiased
