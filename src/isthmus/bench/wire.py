"""What the wire costs: one large tensor against a plain copy, and a cohort's uploads.

Run as `python -m isthmus.bench.wire`. One thread, checks for NaN included.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from isthmus import seeds
from isthmus.bench.figure import Figure, at_most, best_of
from isthmus.tree import Tree
from isthmus.wire.codecs import Codec, parse
from isthmus.wire.ledger import Ledger
from isthmus.wire.message import Field, Layout, Message, Schema, decode_many, encode, encode_many

LARGE = 1 << 24
"""float32 entries of the large tensor: 64 MiB."""

LARGE_GOALS = (("dense:fp32", 3.0), ("int8", 5.0), ("int8:stochastic", 8.0))
"""Encoding to bytes may take so many times what `torch.clone` takes."""

COHORT = 100
MLP = {"0.weight": (128, 64), "0.bias": (128,), "2.weight": (10, 128), "2.bias": (10,)}
COHORT_GOAL = 20.0
"""Microseconds a message for encoding, decoding, the finite guard and a row of the ledger."""


def figures(repeats: int = 7) -> list[Figure]:
    """All figures of the wire, each the best of `repeats`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_large(repeats), *_cohort(20 * repeats)]
    finally:
        torch.set_num_threads(threads)


def _large(repeats: int) -> list[Figure]:
    tree = {"w": seeds.normal(seeds.key("bench", "wire"), (LARGE,))}
    codecs = [parse(text) for text, _ in LARGE_GOALS]
    schemas = [Schema.of_tree("model", 1, {}, codec.declare(tree)) for codec in codecs]

    def to_bytes(codec: Codec, schema: Schema) -> bytes:
        payload = codec.encode(tree, 1, declared=True)
        return encode(Message("model", {}, payload.tensors), schema)

    clone, *times = best_of(
        repeats,
        [
            tree["w"].clone,
            *(partial(to_bytes, *pair) for pair in zip(codecs, schemas, strict=True)),
        ],
    )
    rows = [Figure("torch.clone of 64 MiB", clone * 1e3, "ms", None, None)]
    for (text, limit), taken in zip(LARGE_GOALS, times, strict=True):
        rows.append(at_most(f"{text}: 64 MiB to bytes", taken / clone, limit, "x clone"))
    return rows


def _cohort(repeats: int) -> list[Figure]:
    tree: Tree = {name: torch.zeros(shape) for name, shape in MLP.items()}
    fields = {name: Field("u32") for name in ("client", "round", "version", "n_examples")}
    schema = Schema.of_tree("update", 2, fields | {"loss": Field("f32", low=0.0)}, tree)
    stacked = {
        name: seeds.normal(seeds.key("bench", name), (COHORT, *x.shape)) for name, x in tree.items()
    }
    rng = seeds.rng("bench", "fields")
    columns = {
        "client": np.arange(COHORT),
        "round": np.full(COHORT, 3),
        "version": np.full(COHORT, 2),
        "n_examples": rng.integers(20, 500, COHORT),
        "loss": rng.random(COHORT, np.float32),
    }
    senders = [f"client/{i}" for i in range(COHORT)]
    values = sum(x.numel() * x.element_size() for x in tree.values())

    def cross(layout: Layout, ledger: Ledger) -> None:
        sequence = np.arange(COHORT)
        parcel = encode_many(schema, columns, stacked, layout, session=1, sequence=sequence)
        ledger.cross_many(
            sender=senders,
            receiver="server",
            kind="update",
            bytes=parcel.sizes,
            values=values,
            round=3,
            session=1,
            sequence=sequence,
        )
        decode_many(parcel, schema)

    layouts: tuple[Layout, ...] = ("described", "compact")
    times = best_of(repeats, [partial(cross, layout, Ledger()) for layout in layouts])
    return [
        at_most(f"{layout}: a cohort's upload of 38 kB", t / COHORT * 1e6, COHORT_GOAL, "us")
        for layout, t in zip(layouts, times, strict=True)
    ]


if __name__ == "__main__":
    for name, value, unit, goal, holds, *_ in figures():
        print(f"{name:42} {value:8.2f} {unit:8} {goal or '':22} {'' if holds is None else holds}")
