"""Messages to bytes and back, by the declared schema of their kind.

One schema has two layouts. *Described*: exactly a safetensors file whose metadata holds the
fields; for model state, files and first contact. *Compact*: 12 bytes of framing, then the fields
and tensors packed; for peers that agreed on schemas when their session began.

>>> import torch
>>> schema = Schema("vote", 7, {"round": Field("u16")}, {"w": TensorSpec(torch.float32, (None,))})
>>> vote = Message("vote", {"round": 3}, {"w": torch.tensor([1.5, -2.0])})
>>> data = encode(vote, schema, layout="compact", session=1, sequence=9)
>>> len(data)  # framing 12, round 2, size of w 1, values 8
23
>>> decode(data, schema).tensors["w"]
tensor([ 1.5000, -2.0000])
"""

from __future__ import annotations

from isthmus.wire.errors import WireError
from isthmus.wire.fields import Field, FieldType, Value
from isthmus.wire.layouts import Envelope, Layout, check_finite, decode, encode, peek
from isthmus.wire.parcel import Parcel, decode_many, encode_many
from isthmus.wire.schema import Message, Schema, TensorSpec

__all__ = [
    "Envelope",
    "Field",
    "FieldType",
    "Layout",
    "Message",
    "Parcel",
    "Schema",
    "TensorSpec",
    "Value",
    "WireError",
    "check_finite",
    "decode",
    "decode_many",
    "encode",
    "encode_many",
    "peek",
]
