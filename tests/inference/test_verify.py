"""The theorem on sub-measures, and the grids: exactly, and for every s."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isthmus.errors import InputError
from isthmus.inference.verify import (
    Grid,
    acceptance,
    accepted,
    chosen,
    correction,
    judge,
    residual,
    unit,
)
from isthmus.models.decode import Law
from isthmus.wire.message import Message, Schema, WireError, decode, encode

GRIDS = ["exact", "fp32", "fp16", "1", "2", "3", "6", "10", "17", "32"]


def rows(seed: int, shape: tuple[int, ...], spread: float = 2.0) -> Tensor:
    """Laws of very unequal entries, some of them 0."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(0, spread, shape))
    holes = torch.tensor(rng.random(shape) < 0.2)
    holes[..., 0] = False
    return logits.masked_fill(holes, -torch.inf).softmax(-1)


def step_law(p: Tensor, q: Tensor, s: Tensor) -> Tensor:
    """The law of one step as the theorem's proof sums it."""
    stands = torch.where(q > 0, q * (s / q) * torch.minimum(torch.ones_like(p), p / s), 0.0)
    stands = torch.where(s > 0, stands, 0.0)
    return stands + (1 - stands.sum(-1, keepdim=True)) * residual(p, s)


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0.3, 2.0, 8.0]))
def test_one_step_follows_p_whatever_the_sub_measure(seed: int, vocab: int, spread: float) -> None:
    p, q = rows(seed, (4, vocab), spread), rows(seed + 1, (4, vocab), spread)
    cut = torch.tensor(np.random.default_rng(seed).random((4, vocab)).round(1))
    for s in (q, torch.zeros_like(q), q * cut, *(Grid(name).down(q) for name in GRIDS)):
        torch.testing.assert_close(step_law(p, q, s), p, rtol=0, atol=1e-12)
        beta = acceptance(p, s)
        torch.testing.assert_close((p - s).clamp_min(0).sum(-1), 1 - beta, rtol=0, atol=1e-12)
    distance = 0.5 * (p - q).abs().sum(-1)
    torch.testing.assert_close(acceptance(p, q), 1 - distance, rtol=0, atol=1e-12)


def test_tokens_stand_up_to_the_first_rejection() -> None:
    p = torch.tensor([0.3, 0.3, 0.3, 0.9]).double()
    s = torch.tensor([0.6, 0.2, 0.6, 0.1]).double()
    chances = torch.tensor([0.4, 0.999, 0.6, 0.0]).double()
    assert accepted(p, s, chances) == 2
    assert accepted(p, s, torch.tensor([0.5, 0, 0, 0]).double()) == 0, "u = p / s rejects"
    assert accepted(p[:2], s[:2], chances[:2]) == 2
    assert accepted(p[:0], s[:0], chances[:0]) == 0
    assert accepted(p, torch.zeros(4), torch.zeros(4)) == 0, "s = 0 is void"
    assert accepted(torch.zeros(4), s, torch.zeros(4)) == 0, "p = 0 never stands"


def test_a_correction_is_never_a_token_that_p_has_less_of() -> None:
    p, s = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.6, 0.2]).double()
    assert residual(p, s).tolist() == [1.0, 0.0, 0.0]
    assert {correction(p, s, torch.tensor(u).double()) for u in (0.0, 0.5, 1 - 2**-53)} == {0}
    assert torch.equal(residual(p, p), p), "nothing left: p itself, not NaN"
    assert torch.equal(residual(p, torch.ones(3).double()), p)


def test_judging_draws_a_correction_a_bonus_or_follows_a_void_token() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]).double()
    s = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]).double()
    zero = torch.zeros(3).double()
    assert judge(p, s, [1, 2], zero, zero) == (2, 3), "the bonus is from the last row"
    assert judge(p, s, [1, 3], zero, zero) == (1, 2), "the correction is from the rejected row"
    assert judge(p[:2], s, [0], zero, zero) == (1, 2), "a void token follows: its row decides"
    assert judge(p[:1], s[:0], [], zero, torch.tensor([0.7]).double()) == (0, 1)
    assert chosen(s, [1, 2]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_down_gives_the_largest_grid_number_below(name: str) -> None:
    grid = Grid(name)
    q = torch.cat(
        [
            rows(5, (50, 30)).flatten(),
            torch.tensor([0.0, 1.0, 1 / 3, 2.0**-20], dtype=torch.float64),
        ]
    )
    s = grid.down(q)
    assert bool((s <= q).all()) and bool((s >= 0).all())
    assert torch.equal(grid.down(s), s), "a grid number is its own"
    if name in ("fp32", "fp16"):
        kind = np.dtype({"fp32": np.float32, "fp16": np.float16}[name])
        above = np.nextafter(s.numpy().astype(kind), kind.type(np.inf)).astype(float)
        assert (s.numpy().astype(kind) == s.numpy()).all()
        assert (above > q.numpy()).all()
    elif name != "exact":
        step = 1 / (2 ** int(name) - 1)
        assert bool((q - s < step).all())
        assert bool((s < q).any())
    else:
        assert torch.equal(s, q)


def test_a_product_that_rounds_up_is_still_rounded_down() -> None:
    grid = Grid("6")
    edge = torch.arange(1, 64).double() / 63
    below = torch.tensor(np.nextafter(edge.numpy(), 0))
    assert torch.equal(grid.down(edge), edge)
    assert bool((grid.down(below) < edge).all())


@pytest.mark.parametrize("name", GRIDS)
def test_a_row_rounded_to_nearest_is_close_and_has_mass(name: str) -> None:
    p = torch.cat([rows(7, (20, 300)), torch.full((1, 300), 1 / 300, dtype=torch.float64)])
    near = Grid(name).near(p)
    law = unit(near)
    torch.testing.assert_close(law.sum(-1), torch.ones(21).double())
    wanted = {"exact": 1e-15, "fp32": 1e-7, "fp16": 1e-3}.get(name) or 300 / 2 ** int(name)
    assert float(0.5 * (law - p).abs().sum(-1).max()) <= wanted
    if name != "exact":
        assert bool((near.amax(-1) == 1).all()), "relative to the largest"
        relative = p / p.amax(-1, keepdim=True)
        step = 2.0**-11 if name == "fp16" else 2.0**-24 if name == "fp32" else None
        most = (relative * step).clamp_min(2.0**-25) if step else 0.5 / (2 ** int(name) - 1)
        assert bool(((near - relative).abs() <= most * (1 + 1e-9)).all())


def test_a_flat_row_over_many_words_does_not_vanish() -> None:
    p = torch.full((1, 1 << 20), 2.0**-20, dtype=torch.float64)
    for name in GRIDS:
        assert torch.equal(unit(Grid(name).near(p)), p)


@pytest.mark.parametrize("name", GRIDS)
def test_greedy_rows_are_exact_on_every_grid(name: str) -> None:
    q = Law(temperature=0.0)(torch.tensor([[0.1, 3.0, 2.0], [5.0, 1.0, 1.0]]).double())
    assert torch.equal(Grid(name).down(q), q)
    assert torch.equal(Grid(name).near(q), q)


@given(st.sampled_from(GRIDS), st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 33))
def test_grid_numbers_cross_unchanged(name: str, seed: int, g: int, vocab: int) -> None:
    grid = Grid(name)
    s = grid.down(rows(seed, (g, vocab)))
    schema = Schema("rows", 1, {}, {"s": grid.spec(None, vocab)})
    data = encode(Message("rows", {}, {"s": grid.pack(s)}), schema, "compact")
    assert torch.equal(grid.unpack("s", decode(data, schema).tensors["s"], (g, vocab)), s)
    near = grid.near(rows(seed, (2, vocab)))
    assert torch.equal(grid.unpack("s", grid.pack(near), (2, vocab)), near)


@pytest.mark.parametrize("bits", [1, 3, 6, 10, 17])
def test_n_bits_cost_n_bits(bits: int) -> None:
    grid = Grid(str(bits))
    s = grid.down(rows(1, (5, 13)))
    assert grid.bits == bits
    assert grid.pack(s).nbytes == -(-5 * 13 * bits // 8)
    assert Grid("2").pack(torch.tensor([1 / 3, 2 / 3, 1.0, 0.0], dtype=torch.float64)).tolist() == [
        0b00111001
    ]


@pytest.mark.parametrize("name", ["exact", "fp16", "3"])
def test_what_no_grid_sends_is_refused(name: str) -> None:
    grid = Grid(name)
    packed = grid.pack(grid.down(rows(1, (3, 7))))
    for shape in ((3, 8), (2, 7), (0, 7), (30, 7)):
        with pytest.raises(WireError, match=r"^rows: "):
            grid.unpack("rows", packed, shape)
    if name == "3":
        packed = packed.clone()
        packed[-1] |= 0x80
        with pytest.raises(WireError, match="bits after"):
            grid.unpack("rows", packed, (3, 7))
        return
    for bad in (float("nan"), -1e-3, 1.002, float("inf")):
        broken = packed.clone()
        broken[1, 2] = bad
        with pytest.raises(WireError, match="outside 0 to 1"):
            grid.unpack("rows", broken, (3, 7))


@pytest.mark.parametrize("name", ["fp8", "0", "33", "03", "", "-1", "1.5"])
def test_other_grids_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="grid"):
        Grid(name)
