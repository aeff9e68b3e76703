"""Codecs: what every one keeps, and what each one promises."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import catalogue, seeds
from isthmus import tree as trees
from isthmus.errors import InputError
from isthmus.wire.codecs import (
    Codec,
    Dense,
    ErrorFeedback,
    Int4,
    Int8,
    Payload,
    RandomK,
    Sign,
    TopK,
    parse,
)
from isthmus.wire.codecs.base import CHUNK
from isthmus.wire.codecs.draws import Lanes, hashes
from isthmus.wire.codecs.integer import pack_nibbles, unpack_nibbles
from isthmus.wire.codecs.randomk import places
from isthmus.wire.message import Message, Schema, WireError, decode, encode

TEXTS = [
    "dense",
    "dense:fp32",
    "dense:bf16",
    "dense:fp16",
    "int8",
    "int8:per_row",
    "int8:stochastic",
    "int8:stochastic,per_row",
    "int4",
    "int4:per_row",
    "int4:stochastic",
    "int4:stochastic,per_row",
    "sign",
    "topk:0.3",
    "randomk:0.3",
    "randomk:0.3,unbiased",
    "topk:0.3|int8",
    "topk:0.3|int4:stochastic",
    "topk:0.3|dense:fp16",
    "topk:0.3|dense:bf16|int8:stochastic",
    "topk:0.5|randomk:0.5|int4",
    "randomk:0.5,unbiased|int8:stochastic",
    "randomk:0.3|sign",
    "dense:bf16|topk:0.4",
]
every = pytest.mark.parametrize("codec", [parse(text) for text in TEXTS], ids=TEXTS)


def sample(*shape: int, key: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal draws with a few large ones, no two equal."""
    x = seeds.normal(key, shape, torch.float64)
    return (x * (1 + 3 * seeds.uniform(key + 1, shape, torch.float64))).to(dtype)


def odd_tree(*lead: int, dtype: torch.dtype = torch.float32) -> trees.Tree:
    """Shapes at which packing goes wrong: odd, empty, without axes; and two that only pass."""
    return {
        "w": sample(*lead, 5, 7, dtype=dtype),
        "b": sample(*lead, 3, key=2, dtype=dtype),
        "scalar": sample(*lead, key=3, dtype=dtype),
        "nothing": torch.empty(*lead, 0, 4, dtype=dtype),
        "zero": torch.zeros(*lead, 9, dtype=dtype),
        "count": torch.full(lead, 12, dtype=torch.int64),
        "mask": torch.ones(*lead, 2, dtype=torch.bool),
    }


# What every codec keeps


@every
def test_text_names_the_codec(codec: Codec) -> None:
    assert parse(str(codec)) == codec


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decode_gives_names_types_and_shapes_back(codec: Codec, dtype: torch.dtype) -> None:
    tree = odd_tree(dtype=dtype)
    told, known = codec.encode(tree, 5), codec.encode(tree, 5, declared=True)
    for back in (codec.decode(told), codec.decode(known, tree)):
        assert {n: (x.dtype, x.shape) for n, x in back.items()} == {
            n: (x.dtype, x.shape) for n, x in tree.items()
        }
        assert all(x.isfinite().all() for x in back.values())
        assert torch.equal(back["count"], tree["count"]) and torch.equal(back["mask"], tree["mask"])
        assert not back["zero"].any() or isinstance(codec, Sign) or "sign" in str(codec)
    assert trees.equal(codec.decode(told), codec.decode(known, tree))


@every
def test_what_is_declared_is_what_is_sent(codec: Codec) -> None:
    tree = odd_tree()
    payload = codec.encode(tree, 5, declared=True)
    schema = Schema.of_tree("update", 1, {}, codec.declare(tree))
    message = Message("update", {}, payload.tensors)
    data = encode(message, schema, "compact")
    assert payload.nbytes == len(data) - 12
    back = Payload(dict(decode(data, schema).tensors))
    assert trees.equal(codec.decode(back, tree), codec.decode(payload, tree))
    told = codec.encode(tree, 5)
    assert told.nbytes - payload.nbytes == sum(len(k) + len(v) for k, v in told.meta.items())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_cohort_equals_the_loop(codec: Codec, dtype: torch.dtype) -> None:
    stacked = odd_tree(4, dtype=dtype)
    keys = seeds.keys(3, range(4))
    many = codec.encode_many(stacked, keys)
    decoded = codec.decode_many(many)
    total = 0
    for i, key in enumerate(keys.tolist()):
        single = codec.encode(trees.row(stacked, i), key)
        assert trees.equal(single.tensors, trees.row(many.tensors, i))
        assert trees.equal(codec.decode(single), trees.row(decoded, i))
        total += single.nbytes
    assert many.nbytes == total


@every
def test_an_empty_cohort(codec: Codec) -> None:
    stacked = odd_tree(0)
    payload = codec.encode_many(stacked, [])
    assert payload.nbytes == 0
    assert trees.equal(codec.decode_many(payload), stacked)


@every
def test_the_key_decides(codec: Codec) -> None:
    tree = {"w": sample(20, 30)}
    first, again, other = (codec.encode(tree, key).tensors for key in (7, 7, 8))
    assert trees.equal(first, again)
    random_text = any(word in str(codec) for word in ("stochastic", "randomk"))
    assert trees.equal(first, other) != random_text


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(codec: Codec, bad: float) -> None:
    tree = {"good": sample(4, 3), "bad": sample(4, 3)}
    tree["bad"][2, 1] = bad
    with pytest.raises(WireError) as caught:
        codec.encode(tree, 1)
    assert caught.value.field == "bad"


@every
def test_the_input_is_left_alone(codec: Codec) -> None:
    tree = odd_tree()
    before = trees.clone(tree)
    codec.encode(tree, 1)
    assert trees.equal(tree, before)


@every
def test_hostile_payloads_raise_wire_errors_only(codec: Codec) -> None:
    tree = {"w": sample(6, 5, dtype=torch.float32), "n": torch.tensor(3)}
    good = codec.encode(tree, 1)
    rng = random.Random(str(codec))
    refused = 0
    for _ in range(300):
        tensors, meta = trees.clone(good.tensors), dict(good.meta)
        name = rng.choice(list(tensors))
        match rng.randrange(6):
            case 0:
                raw = tensors[name].reshape(-1).view(torch.uint8)
                if raw.numel():
                    raw[rng.randrange(raw.numel())] = rng.randrange(256)
            case 1:
                del tensors[name]
            case 2:
                tensors[name] = tensors[name].repeat(2, *[1] * max(tensors[name].ndim - 1, 0))
            case 3:
                tensors[name] = tensors[name].to(rng.choice([torch.int16, torch.float64]))
            case 4:
                tensors[rng.choice(["x", "w:index", ":key"])] = torch.zeros(3)
            case _:
                sizes = rng.choice(
                    ["6,6", "-1", "9" * 15 + ",9", "9" * 15 + "," + "9" * 15, "0", ""]
                )
                dtype = rng.choice(["float32", "float64", "int8", "float", "load", ""])
                meta[rng.choice(["w", "n", "w:scale", ":key"])] = f"{dtype}[{sizes}]"
        try:
            back = codec.decode(Payload(tensors, meta))
        except WireError as error:
            assert error.field
            refused += 1
        else:
            assert sum(x.nbytes for x in back.values()) < 10**5
    assert refused > 100


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TEXTS),
    st.integers(0, 3),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape_round_trips_alone_and_in_a_cohort(text, n, shape, key, dtype) -> None:
    codec = parse(text)
    stacked = {"x": sample(n, *shape, dtype=dtype)}
    keys = [seeds.fold(key, i) for i in range(n)]
    decoded = codec.decode_many(codec.encode_many(stacked, keys))
    assert decoded["x"].shape == stacked["x"].shape and decoded["x"].dtype == dtype
    for i, k in enumerate(keys):
        alone = codec.decode(codec.encode(trees.row(stacked, i), k))
        assert torch.equal(alone["x"], decoded["x"][i])


@pytest.mark.parametrize(
    "text", ["int8:stochastic", "int4", "int4:stochastic", "sign", "dense:fp16"]
)
def test_cutting_into_pieces_changes_nothing(text: str) -> None:
    d = CHUNK + 1001
    x = sample(d, dtype=torch.float32)
    x[-1] = 40.0  # the largest, so that both see one scale
    codec = parse(text)
    whole = codec.decode(codec.encode({"x": x}, 3))["x"]
    two = torch.stack([x, x])
    both = codec.decode_many(codec.encode_many({"x": two}, [3, 3]))["x"]
    assert torch.equal(both[0], whole) and torch.equal(both[1], whole)
    if text != "sign":
        head = torch.cat([x[:1000], x[-1:]])
        same = codec.decode(codec.encode({"x": head}, 3))["x"][:1000]
        assert torch.equal(same, whole[:1000])


# Sizes, counted by hand


@pytest.mark.parametrize(
    ("text", "bytes_of_35"),
    [
        ("dense", 4 * 35),
        ("dense:bf16", 2 * 35),
        ("dense:fp16", 2 * 35),
        ("int8", 35 + 4),
        ("int8:per_row", 35 + 5 * 4),
        ("int4", 18 + 4),
        ("int4:stochastic,per_row", 18 + 5 * 4),
        ("sign", 5 + 4),
        ("topk:0.2", 7 * (4 + 1)),
        ("topk:0.2|int8", 7 * (1 + 1) + 4),
        ("topk:0.2|int4", 4 + 4 + 7),
        ("randomk:0.2", 8 + 7 * 4),
        ("randomk:0.2|int8", 8 + 7 + 4),
        ("randomk:0.2|sign", 8 + 1 + 4),
    ],
)
def test_bytes_sent(text: str, bytes_of_35: int) -> None:
    tree = {"w": sample(5, 7, dtype=torch.float32)}
    assert parse(text).encode(tree, 1, declared=True).nbytes == bytes_of_35


@pytest.mark.parametrize(("d", "width"), [(2**8, 1), (2**8 + 1, 2), (2**16, 2), (2**16 + 1, 4)])
def test_places_take_the_narrowest_type(d: int, width: int) -> None:
    x = torch.zeros(d)
    x[d - 1] = 2.0
    codec = TopK(1 / d)
    payload = codec.encode({"x": x}, 1, declared=True)
    assert payload.nbytes == 4 + width
    assert torch.equal(codec.decode(payload, {"x": x})["x"], x)


# Dense


def test_dense_keeps_every_bit_and_its_formats_round_to_nearest() -> None:
    x = sample(1000, dtype=torch.float32)
    x[0] = -0.0
    assert torch.equal(
        Dense().decode(Dense().encode({"x": x}, 0))["x"].view(torch.int32), x.view(torch.int32)
    )
    for text, unit in (("bf16", 2.0**-8), ("fp16", 2.0**-11)):
        codec = Dense(text)
        error = (codec.decode(codec.encode({"x": x}, 0))["x"] - x).abs()
        assert (error <= unit * x.abs()).all() and error.max() > 0


def test_dense_says_what_does_not_fit() -> None:
    with pytest.raises(WireError, match=r"^w: .*too large for fp16"):
        Dense("fp16").encode({"w": torch.tensor([1.0, 70000.0])}, 0)
    Dense("bf16").encode({"w": torch.tensor([1.0, 70000.0])}, 0)


# Integers


@pytest.mark.parametrize("levels", [127, 7])
@pytest.mark.parametrize("per_row", [False, True])
def test_nearest_against_the_formula(levels: int, per_row: bool) -> None:
    x = sample(6, 11)
    codec = (Int8 if levels == 127 else Int4)("nearest", per_row)
    step = (x.abs().amax(1, keepdim=True) if per_row else x.abs().max()) / levels
    decoded = codec.decode(codec.encode({"x": x}, 0))["x"]
    assert torch.allclose(decoded, torch.round(x / step) * step, rtol=1e-14, atol=0)
    assert ((decoded - x).abs() <= step / 2 * (1 + 1e-12)).all()
    assert (decoded - x).abs().max() > step.max() / 4
    peak = decoded.abs().amax(1) if per_row else decoded.abs().max()
    assert torch.allclose(peak, x.abs().amax(1) if per_row else x.abs().max(), rtol=1e-14)


@pytest.mark.parametrize(
    "codec", [Int8("stochastic"), Int4("stochastic"), Int8("stochastic", True)]
)
def test_stochastic_rounding_is_unbiased(codec: Codec) -> None:
    n = 40_000
    x = sample(3, 5)
    stacked = {"x": x.expand(n, 3, 5)}
    decoded = codec.decode_many(codec.encode_many(stacked, seeds.keys(9, range(n))))["x"]
    levels = 127 if isinstance(codec, Int8) else 7
    step = (x.abs().amax(1, keepdim=True) if codec.per_row else x.abs().max()) / levels
    part = x / step - torch.floor(x / step)
    assert ((decoded - x).abs() < step * (1 + 1e-9)).all()
    # The mean of n two-point draws: within 5 standard errors, plus the declared 2^-17 of a step.
    error = (decoded.mean(0) - x).abs()
    assert (error <= step * (5 * torch.sqrt(part * (1 - part) / n) + 2.0**-17)).all()
    variance = decoded.var(0) / step**2
    assert torch.allclose(variance, part * (1 - part) + torch.zeros_like(x), atol=0.01)


def test_the_chance_of_going_up_is_exact() -> None:
    # One entry at r/65536 above a step, under all 65536 draws: exactly r of them go up.
    for r in (0, 1, 20000, 65535):
        t = np.full(65536, 3 * 65536 + r, np.int32)
        assert ((t + np.arange(65536)) >> 16 == 4).sum() == r
        assert ((t - 7 * 65536 + np.arange(65536)) >> 16 == -3).sum() == r


@pytest.mark.parametrize("codec", [Int8("stochastic"), Int4("stochastic"), Int8(), Int4()])
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1.1754944e-38, 3.3e-5, 1.0, 3.3e38])
def test_extreme_scales_never_wrap_around(codec: Codec, scale: float) -> None:
    x = torch.tensor([1.0, -1.0, 0.999999, 0.5, 0.0]) * scale
    n = 500
    many = codec.encode_many({"x": x.expand(n, 5)}, seeds.keys(1, range(n)))
    decoded = codec.decode_many(many)["x"]
    levels = 127 if isinstance(codec, Int8) else 7
    assert decoded.isfinite().all()
    assert ((decoded - x).abs() <= max(scale / levels, 2.0**-100) * 1.001).all()


@pytest.mark.parametrize("codec", [Int8("stochastic"), Int4("stochastic")])
def test_the_largest_entry_stays_on_the_largest_code(codec: Codec) -> None:
    # Rounding errors depend on the digits of the largest entry; one unit too many, and a draw in
    # 65536 would wrap around to the lowest code.
    tops = 1 + torch.arange(0, 2**23, 41).float() * 2.0**-23
    step = codec.encode_many({"x": tops[:, None]}, torch.arange(len(tops))).tensors["x:scale"]
    units = torch.round(tops * (65536 / step))
    assert (units == codec.levels * 65536).all()


def test_a_code_that_is_never_sent_is_refused() -> None:
    for codec, code in (
        (Int8(), torch.tensor([-128, 3], dtype=torch.int8)),
        (Int4(), torch.tensor([0x80], dtype=torch.uint8)),
    ):
        payload = codec.encode({"x": torch.tensor([1.0, 2.0])}, 0)
        payload.tensors["x"] = code
        with pytest.raises(WireError, match=r"^x: a code below"):
            codec.decode(payload)


def test_half_of_the_draws_of_a_half_go_up_whatever_the_place() -> None:
    x = torch.full((1, 4001), 0.5)
    x[0, 0] = 127.0
    got = Int8("stochastic").encode_many({"x": x.expand(200, 4001)}, seeds.keys(2, range(200)))
    up = (got.tensors["x"][:, 1:] == 1).double()
    assert abs(up.mean() - 0.5) < 5 * 0.5 / math.sqrt(up.numel()) + 1e-5
    assert (up.mean(0) - 0.5).abs().max() < 6 * 0.5 / math.sqrt(200)
    # Neighbouring places share a hash but not its bits.
    centred = 2 * up - 1
    for lag in (1, 2, 3, 4):
        assert abs((centred[:, lag:] * centred[:, :-lag]).mean()) < 5 / math.sqrt(up.numel())


@given(st.integers(1, 4), st.integers(0, 40), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_nibbles_are_two_to_a_byte(n: int, d: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-8, 8, (n, d)).astype(np.int8)
    packed = pack_nibbles(values)
    assert packed.shape == (n, (d + 1) // 2)
    assert np.array_equal(unpack_nibbles(packed, d), values)


def test_draws_are_those_of_seeds() -> None:
    keys = torch.tensor([seeds.key("a"), -5, 2**63 - 1])
    want = torch.stack([seeds.bits(int(key), (10,)) for key in keys])
    assert np.array_equal(hashes(keys, 10).view(np.int64), want.numpy())
    lanes = Lanes(keys, 2, 18).block(slice(0, 6), slice(0, 18))
    for i in range(3):
        words = seeds.bits(int(keys[i]), (2, 5)).numpy().view(np.uint16).reshape(2, 20)
        assert np.array_equal(lanes[2 * i : 2 * i + 2], words[:, :18])
    part = Lanes(keys, 2, 18).block(slice(3, 5), slice(4, 15))
    assert np.array_equal(part, lanes[3:5, 4:15])


# Sign


def test_sign_against_the_formula() -> None:
    x = sample(3, 7)
    x[0, 0] = 0.0
    decoded = Sign().decode(Sign().encode({"x": x}, 0))["x"]
    sign = torch.where(x >= 0, 1.0, -1.0).double()
    assert torch.allclose(decoded, sign * x.abs().mean(), rtol=1e-12)
    big = sample(2 * CHUNK + 5)
    assert torch.isclose(
        Sign().encode({"x": big}, 0).tensors["x:scale"], big.abs().mean(), rtol=1e-12
    )
    # ||C(x) - x||^2 = ||x||^2 - ||x||_1^2 / d: a contraction.
    left = (decoded - x).square().sum()
    assert torch.isclose(left, x.square().sum() - x.abs().sum() ** 2 / x.numel())


# Sparse


def test_topk_keeps_the_largest_magnitudes() -> None:
    x = torch.tensor([[0.5, -9.0, 1.0], [3.0, -0.1, 2.0]])
    assert TopK(0.5).decode(TopK(0.5).encode({"x": x}, 0))["x"].tolist() == [
        [0.0, -9.0, 0.0],
        [3.0, 0.0, 2.0],
    ]
    big = sample(999)
    decoded = TopK(0.1).decode(TopK(0.1).encode({"x": big}, 0))["x"]
    assert int((decoded != 0).sum()) == 100
    bound = big.abs().sort(descending=True).values[99]
    assert torch.equal(decoded, torch.where(big.abs() >= bound, big, 0.0))
    assert torch.equal(TopK(1.0).decode(TopK(1.0).encode({"x": big}, 0))["x"], big)


@pytest.mark.parametrize("index", [[-1, 5], [5, 5], [6, 5], [5, 70_000]])
def test_places_out_of_order_or_range_are_refused(index: list[int]) -> None:
    payload = TopK(2 / 70_000).encode({"x": torch.arange(70_000.0)}, 0)
    payload.tensors["x:index"] = torch.tensor(index, dtype=torch.int32)
    with pytest.raises(WireError, match="x:index"):
        TopK(2 / 70_000).decode(payload)


def test_topk_then_integers_quantises_the_kept_values() -> None:
    x = sample(40)
    sparse = TopK(0.25).decode(TopK(0.25).encode({"x": x}, 0))["x"]
    kept = sparse != 0
    codec = TopK(0.25) | Int8()
    decoded = codec.decode(codec.encode({"x": x}, 0))["x"]
    want = Int8().decode(Int8().encode({"x": sparse[kept]}, 0))["x"]
    assert torch.equal(decoded[kept], want) and not decoded[~kept].any()


def test_random_k_sends_entries_that_the_key_chooses() -> None:
    x = sample(30, 4)
    codec = RandomK(0.25)
    payload = codec.encode({"a": x, "b": x}, 11)
    decoded = codec.decode(payload)
    for name in ("a", "b"):
        kept = decoded[name] != 0
        assert int(kept.sum()) == 30 and torch.equal(decoded[name][kept], x[kept])
    assert not torch.equal(decoded["a"], decoded["b"])


@pytest.mark.parametrize(("d", "k"), [(7, 1), (7, 3), (7, 4), (7, 6), (7, 7), (1, 1), (5, 0)])
def test_few_random_places_are_uniform_without_replacement(d: int, k: int) -> None:
    n = 6000
    drawn = places(torch.from_numpy(seeds.keys(5, range(n))), d, k)
    assert drawn.shape == (n, k)
    assert (drawn[:, 1:] > drawn[:, :-1]).all() and (k == 0 or drawn.max() < d)
    inside = torch.zeros(n, d).scatter_(1, drawn, 1.0)
    p = k / d
    assert (inside.mean(0) - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / n)
    pairs = inside.T @ inside / n
    p2 = p * (k - 1) / max(d - 1, 1)
    apart = ~torch.eye(d, dtype=torch.bool)
    assert (
        (pairs[apart] - p2).abs().max() <= 5 * math.sqrt(max(p2 * (1 - p2), 0) / n) + 1e-6
        if d > 1
        else True
    )


@pytest.mark.parametrize("k", [1, 60, 2600, 4999, 5000])
def test_many_random_places_are_uniform_without_replacement(k: int) -> None:
    n, d = 60, 5000
    drawn = places(torch.from_numpy(seeds.keys(6, range(n))), d, k)
    assert drawn.shape == (n, k) and (drawn[:, 1:] > drawn[:, :-1]).all()
    assert drawn.min() >= 0 and drawn.max() < d
    # Of n k draws, each tenth of the places has a tenth: a hypergeometric count.
    p = k / d
    tenths = torch.bincount(drawn.reshape(-1) // 500, minlength=10).double()
    sigma = math.sqrt(n * 500 * p * (1 - p) * d / (d - 1)) + 1e-9
    assert (tenths - n * 500 * p).abs().max() <= 5 * sigma
    assert len({tuple(row) for row in drawn.tolist()}) == n or k in (1, 4999, 5000)


@pytest.mark.parametrize("text", ["randomk:0.2,unbiased", "randomk:0.2,unbiased|int8:stochastic"])
def test_scaled_random_k_is_unbiased(text: str) -> None:
    n, x, codec = 40_000, sample(10), parse(text)
    decoded = codec.decode_many(codec.encode_many({"x": x.expand(n, 10)}, seeds.keys(4, range(n))))[
        "x"
    ]
    assert ((decoded.mean(0) - x).abs() <= 5 * decoded.std(0) / math.sqrt(n) + 1e-4).all()
    shrunk = RandomK(0.2).decode_many(
        RandomK(0.2).encode_many({"x": x.expand(n, 10)}, seeds.keys(4, range(n)))
    )
    assert torch.allclose(shrunk["x"].mean(0), 0.2 * x, atol=0.05)


# Error feedback


@pytest.mark.parametrize("text", [t for t in TEXTS if "unbiased" not in t])
def test_nothing_is_lost_by_error_feedback(text: str) -> None:
    sender, memory = ErrorFeedback(parse(text)), None
    put, got = torch.zeros(6, 5).double(), torch.zeros(6, 5).double()
    for t in range(12):
        x = {"w": sample(6, 5, key=100 + 2 * t), "n": torch.tensor(t)}
        payload, memory = sender.step(x, seeds.key(t), memory)
        put += x["w"]
        back = sender.codec.decode(payload)
        got += back["w"]
        assert back["n"] == t and memory.keys() == {"w"}
    assert torch.allclose(got + memory["w"], put, rtol=0, atol=1e-12)
    assert text == "dense" or memory["w"].abs().max() > 1e-9


def test_error_feedback_sends_what_topk_alone_never_does() -> None:
    x = {"x": torch.tensor([1.0, 0.4])}
    sender, memory, total = ErrorFeedback(TopK(0.5)), None, torch.zeros(2)
    for t in range(4):
        payload, memory = sender.step(x, t, memory)
        total += sender.codec.decode(payload)["x"]
    # Step by step: 1, 1, then the accumulated 1.2 of the small entry, then 1 + 1.
    assert torch.allclose(total, torch.tensor([4.0, 1.2])) and torch.allclose(
        memory["x"], torch.tensor([0.0, 0.4])
    )


@pytest.mark.parametrize("text", ["topk:0.3|int4", "int8:stochastic", "randomk:0.3", "sign"])
def test_feedback_of_a_cohort_equals_the_loop(text: str) -> None:
    sender, n = ErrorFeedback(parse(text)), 3
    many, singles = None, [None] * n
    for t in range(3):
        stacked = {"w": sample(n, 4, 5, key=7 + 2 * t), "nothing": torch.empty(n, 0)}
        keys = seeds.keys(t, range(n))
        payload, many = sender.step_many(stacked, keys, many)
        for i in range(n):
            alone, singles[i] = sender.step(trees.row(stacked, i), int(keys[i]), singles[i])
            assert trees.equal(alone.tensors, trees.row(payload.tensors, i))
            assert trees.equal(singles[i], trees.row(many, i))
    _, empty = sender.step_many(odd_tree(0), [])
    assert empty["w"].shape == (0, 5, 7)


def test_error_feedback_needs_a_contraction() -> None:
    for text in ("randomk:0.1,unbiased", "randomk:0.1,unbiased|int8"):
        with pytest.raises(InputError, match="without unbiased"):
            ErrorFeedback(parse(text))


# Text, composition, catalogue


def test_discrete_codecs_say_so() -> None:
    smooth = {"dense", "dense:fp32", "randomk:0.3", "randomk:0.3,unbiased"}
    assert {text for text in TEXTS if not parse(text).discrete} == smooth


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("int9", "int8"),
        ("", "dense"),
        ("int8:up", "stochastic"),
        ("dense:fp8", "bf16"),
        ("dense:fp16,bf16", "one format"),
        ("topk:0", "fraction"),
        ("topk:1.5", "fraction"),
        ("topk:many", "fraction"),
        ("topk:nan", "fraction"),
        ("topk:0.1,0.2", "one fraction"),
        ("randomk:0.1,0.2", "unbiased"),
        ("sign:1", "no options"),
        ("int8|int4", "nothing after int8"),
        ("sign|int8", "nothing after sign"),
        ("topk:0.1|topk:0.1", "one codec with :index"),
        ("topk:0.1|", "dense"),
    ],
)
def test_bad_text_lists_what_is_allowed(text: str, allowed: str) -> None:
    with pytest.raises(InputError, match=allowed):
        parse(text)


def test_composition_is_associative_and_equals_its_text() -> None:
    assert str(TopK(0.01) | Int8()) == "topk:0.01|int8"
    left = (TopK(0.5) | Dense("bf16")) | Int8()
    right = TopK(0.5) | (Dense("bf16") | Int8())
    x = {"x": sample(50)}
    assert torch.equal(left.decode(left.encode(x, 1))["x"], right.decode(right.encode(x, 1))["x"])


def test_the_catalogue_finds_every_codec() -> None:
    assert {"dense", "int4", "int8", "random-k", "sign", "top-k"} <= set(catalogue.names("codec"))
    assert catalogue.find("codec", "top_k") is TopK


def test_parts_and_tensors_may_not_share_a_name() -> None:
    with pytest.raises(InputError, match="w:scale"):
        Int8().encode({"w": torch.ones(2), "w:scale": torch.ones(())}, 1)
    with pytest.raises(InputError, match="2 stacked"):
        Int8().encode_many({"w": torch.ones(3, 2)}, [1, 2])
