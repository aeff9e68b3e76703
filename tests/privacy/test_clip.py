from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import seeds, tree
from isthmus.errors import InputError
from isthmus.privacy.clip import clip, clip_rows, norms


def uploads(n=7, scale=1.0, dtype=torch.float32):
    """Stacked trees of two fields whose rows have quite different norms."""
    size = scale * 3.0 ** torch.arange(n, dtype=torch.float64)
    return {
        "w": (seeds.normal(1, (n, 5, 3), torch.float64) * size[:, None, None]).to(dtype),
        "b": (seeds.normal(2, (n, 4), torch.float64) * size[:, None]).to(dtype),
    }


def flat(stacked):
    return tree.flatten_stacked(stacked).double()


def test_the_norm_is_joint_over_all_fields():
    given_rows = uploads(dtype=torch.float64)
    reference = (flat(given_rows) ** 2).sum(dim=1).sqrt()
    assert torch.allclose(norms(given_rows), reference, rtol=1e-14)
    bound = 20.0
    expected = flat(given_rows) * torch.clamp(bound / reference, max=1.0)[:, None]
    assert torch.allclose(flat(clip_rows(given_rows, bound)), expected, rtol=1e-13)
    # clipping each field by itself would allow sqrt(2) times the bound
    alone = {name: clip_rows({name: x}, bound)[name] for name, x in given_rows.items()}
    assert norms(alone)[-1] > 1.4 * bound > 1.4 * norms(clip_rows(given_rows, bound))[-1] - 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_within_the_bound_keep_their_bits_and_others_never_exceed_it(dtype):
    rows = uploads(dtype=dtype)
    bound = float(norms(rows)[3])
    clipped = clip_rows(rows, bound)
    for name, x in rows.items():
        assert clipped[name].dtype == dtype
        assert torch.equal(clipped[name][:4], x[:4])
    assert (norms(clipped)[4:] <= bound).all()
    assert (norms(clipped)[4:] >= bound * (1 - 12 * torch.finfo(dtype).eps)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(1e-6, 1e6))
def test_clipped_norms_are_bounded_and_directions_kept(seed, bound, scale):
    x = {"a": seeds.normal(seed, (3, 8)) * scale, "b": seeds.normal(seed + 1, (3, 2)) * scale}
    clipped = clip_rows(x, bound)
    assert (norms(clipped) <= bound).all()
    cosine = torch.cosine_similarity(flat(x), flat(clipped), dim=1)
    assert torch.allclose(cosine, torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_stacked_equals_one_by_one():
    rows = uploads(dtype=torch.float64)
    single = tree.stack([clip(row, 20.0) for row in tree.unstack(rows)])
    for name, x in clip_rows(rows, 20.0).items():
        assert torch.allclose(x, single[name], rtol=1e-14, atol=0.0)


def test_no_bound_returns_every_bit():
    rows = uploads()
    rows["w"][0, 0, 0] = math.nan
    for name, x in clip_rows(rows, math.inf).items():
        assert torch.equal(x.view(torch.int32), rows[name].view(torch.int32))


def test_large_float32_values_do_not_overflow_and_others_become_zero():
    rows = uploads(n=4)
    rows["w"][1] = 3e38
    rows["w"][2, 0, 0] = math.inf
    rows["b"][3, 1] = math.nan
    clipped = clip_rows(rows, 2.0)
    assert norms(clipped)[1] == pytest.approx(2.0, rel=1e-5)
    for name, x in clipped.items():
        assert torch.count_nonzero(x[2:]) == 0
        assert torch.isfinite(x).all(), name


def test_bad_bounds_and_whole_numbers_are_named():
    for bound in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="clip"):
            clip_rows(uploads(), bound)
    with pytest.raises(InputError, match=r"steps: torch\.int64"):
        clip_rows({"steps": torch.ones(3, 1, dtype=torch.int64)}, 1.0)
