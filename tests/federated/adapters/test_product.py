from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated.adapters.rounds import TOLERANCE, draw, mean_product, rel

from isthmus.contracts import LowRank
from isthmus.errors import InputError
from isthmus.federated.adapters import product
from isthmus.models.factors import Factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "k", "n"), [(40, 60, 8), (60, 40, 8), (40, 60, 30), (9, 60, 30)])
def test_svd_equals_the_dense_one(d: int, k: int, n: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(d + n)
    L = torch.randn(d, n, generator=g, dtype=torch.float64)
    R = torch.randn(n, k, generator=g, dtype=torch.float64)
    U, S, V = product.svd(LowRank(L.to(dtype), R.to(dtype)))
    m = min(n, d, k)
    dense = torch.linalg.svdvals(L @ R)
    assert S.dtype == torch.float64
    assert rel(S[:m], dense[:m]) < TOLERANCE[dtype]
    assert rel((U.double() * S) @ V.double().mT, L @ R) < TOLERANCE[dtype]
    for Q in (U[:, :m].double(), V[:, :m].double()):
        assert rel(Q.mT @ Q, torch.eye(m, dtype=torch.float64)) < TOLERANCE[dtype]


def test_signs_do_not_depend_on_the_signs_of_the_factors() -> None:
    (first, *_), _, _ = draw(3, ranks=(4,))
    flip = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    one = product.svd(LowRank(first.B, first.A))
    two = product.svd(LowRank(first.B * flip, flip[:, None] * first.A))
    assert rel(one.U, two.U) < 1e-10 and rel(one.V, two.V) < 1e-10
    peaks = one.U.gather(0, one.U.abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()


def test_a_small_singular_value_is_not_lost_as_a_gram_matrix_would_lose_it() -> None:
    g = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(50, 3, generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(70, 3, generator=g, dtype=torch.float64))
    S = torch.tensor([1.0, 1e-3, 1e-5], dtype=torch.float64)
    pair = LowRank((U * S.sqrt()).float(), (V * S.sqrt()).mT.float())
    assert rel(product.svd(pair).S[2:3], S[2:]) < 1e-3
    gram = torch.linalg.eigvalsh((pair.left @ pair.right).mT @ (pair.left @ pair.right))
    assert rel(gram[-3:-2].clamp(min=0).sqrt().double(), S[2:]) > 0.5


@given(seed=st.integers(0, 10**6), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_the_stack_is_the_mean_product(seed: int, ranks: list[int]) -> None:
    scales = [0.5 + 0.3 * i for i in range(len(ranks))]
    uploads, weights, down = draw(seed, ranks=ranks, scales=scales)
    L, R = product.stacked(product.members(uploads, weights, down))
    assert L.shape == (23, sum(ranks)) and R.shape == (sum(ranks), 31)
    assert rel(L @ R, mean_product(uploads, weights)) < 1e-13
    assert 1e-3 < float(L.norm() / R.norm()) < 1e3


def test_missing_weight_stays_with_what_the_clients_were_given() -> None:
    uploads, weights, down = draw(5)
    L, R = product.stacked(product.members(uploads, 0.7 * weights, down))
    expected = 0.7 * mean_product(uploads, weights) + 0.3 * down.delta()
    assert rel(L @ R, expected) < 1e-13
    nobody = product.members(uploads, torch.zeros(4), down)
    assert [w for w, _ in nobody] == [1.0] and nobody[0].factors is down


@pytest.mark.parametrize("rank", [1, 2, 5, None])
def test_recompress_is_the_nearest_of_its_rank(rank: int | None) -> None:
    uploads, _, _ = draw(7, ranks=(2, 3))
    pairs = [LowRank(x.B, x.A) for x in uploads]
    pairs.append(LowRank(uploads[0].B, 2.0 * uploads[0].A))
    dense = uploads[0].B @ uploads[0].A * 3.0 + uploads[1].B @ uploads[1].A
    S = torch.linalg.svdvals(dense)
    got = product.recompress(pairs, rank)
    assert got.left.shape[1] == (rank or 5)
    lost = float((got.left @ got.right - dense).norm())
    assert abs(lost - float(S[rank or 5 :].norm())) < 1e-12 * float(S[0])


@pytest.mark.parametrize(("k", "kept", "count"), [(20, 3, 4), (20, 0, 5), (6, 4, 2), (5, 3, 4)])
def test_fresh_rows_are_new_directions(k: int, kept: int, count: int) -> None:
    g = torch.Generator().manual_seed(1)
    V, _ = torch.linalg.qr(torch.randn(k, kept, generator=g, dtype=torch.float64))
    rows = product.fresh_rows(V, count, 0.7, key=11)
    assert rows.shape == (count, k)
    assert torch.allclose(rows.norm(dim=1), torch.full((count,), 0.7, dtype=torch.float64))
    room = min(count, k - kept)
    assert float((rows[:room] @ V).abs().max() if kept else 0.0) < 1e-12
    gram = rows[:room] @ rows[:room].mT
    assert torch.allclose(gram, 0.49 * torch.eye(room, dtype=torch.float64), atol=1e-12)
    assert torch.equal(rows, product.fresh_rows(V, count, 0.7, key=11))
    assert not torch.equal(rows, product.fresh_rows(V, count, 0.7, key=12))


def test_bad_rounds_are_refused_in_one_line() -> None:
    uploads, weights, down = draw(9)
    bad = [uploads[0], Factors(uploads[1].B * float("nan"), uploads[1].A, 1.7), *uploads[2:]]
    with pytest.raises(product.NonFinite, match="non-finite factors at") as caught:
        product.check(bad, weights, down)
    assert caught.value.clients == [1]
    assert product.finite(bad).tolist() == [True, False, True, True]
    with pytest.raises(InputError, match="weights"):
        product.check(uploads, 2 * weights, down)
    with pytest.raises(InputError, match="weights"):
        product.check(uploads, weights - 0.5, down)
    with pytest.raises(InputError, match="weights"):
        product.check(uploads, weights[:2], down)
    with pytest.raises(InputError, match=r"uploads\[2\]"):
        product.check(
            [*uploads[:2], Factors(uploads[2].A.mT, uploads[2].B.mT, 1.7)], weights[:3] / 2, down
        )
    with pytest.raises(InputError, match="scale"):
        product.check(uploads, weights, down._replace(scale=0.0))
