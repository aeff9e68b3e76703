"""Codecs: tensors to fewer bytes and back; composed by `|`, read from text by `parse`.

>>> import torch
>>> codec = parse("topk:0.5|int8")
>>> payload = codec.encode({"w": torch.tensor([1.0, -4.0, 0.5, 2.0])}, key=0, declared=True)
>>> payload.nbytes  # 2 values, 2 places and a scale
8
>>> codec.decode(payload, {"w": torch.empty(4)})["w"]
tensor([ 0.0000, -4.0000,  0.0000,  2.0157])
"""

from __future__ import annotations

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.wire.codecs.base import Chain, Codec, Payload
from isthmus.wire.codecs.dense import Dense
from isthmus.wire.codecs.feedback import ErrorFeedback
from isthmus.wire.codecs.integer import Int4, Int8
from isthmus.wire.codecs.randomk import RandomK
from isthmus.wire.codecs.sign import Sign
from isthmus.wire.codecs.topk import TopK

__all__ = [
    "Chain",
    "Codec",
    "Dense",
    "ErrorFeedback",
    "Int4",
    "Int8",
    "Payload",
    "RandomK",
    "Sign",
    "TopK",
    "parse",
]


def parse(text: str) -> Codec:
    """The codec that `text` names: `name[:option,...]`, stages joined by `|`.

    >>> parse("int8:stochastic,per_row"), str(parse("topk:0.01 | int4"))
    (Int8(rounding='stochastic', per_row=True), 'topk:0.01|int4')

    Raises `InputError` listing what is allowed.
    """
    first, *rest = (_stage(part.strip()) for part in text.split("|"))
    for then in rest:
        first = first | then
    return first


def _stage(text: str) -> Codec:
    name, colon, rest = text.partition(":")
    options = [word.strip() for word in rest.split(",")] if colon else []
    made = catalogue.find("codec", name.strip())
    if not (isinstance(made, type) and issubclass(made, Codec)):
        raise InputError("codec", text, "a registered codec")
    return made.read(options)
