from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated.adapters.rounds import Round, draw, mean_product, rel, served

from isthmus.federated.adapters import fedex_lora, fedit
from isthmus.federated.adapters.fedex_lora import Knobs
from isthmus.federated.adapters.product import Global


@given(seed=st.integers(0, 10**6), n=st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_exact_with_weighted_means_and_a_residual_of_n_minus_one_times_r(seed: int, n: int) -> None:
    case = draw(seed, d=40, k=50, ranks=(3,) * n)
    result = fedex_lora.aggregate(*case)
    assert rel(served(result), mean_product(case.uploads, case.weights)) < 1e-12
    plain = fedit.aggregate(*case).factors
    assert torch.equal(result.factors.B, plain.B) and torch.equal(result.factors.A, plain.A)
    left, right = result.base_delta[0]
    assert left.shape[1] == right.shape[0] == result.diag["residual_rank"] == (n - 1) * 3
    S = torch.linalg.svdvals(left @ right)
    assert int((1e-10 * S[0] < S).sum()) == (n - 1) * 3


def test_rank_twenty_for_six_clients_of_rank_four() -> None:
    case = draw(0, d=60, k=50, ranks=(4,) * 6)
    assert fedex_lora.aggregate(*case).diag["residual_rank"] == 20


def test_one_weighted_and_one_plain_mean_would_not_be_exact() -> None:
    case = draw(2)
    plain = Round(case.uploads, torch.full((4,), 0.25), case.down)
    truth = mean_product(case.uploads, case.weights)
    mixed = Global(fedit.aggregate(*plain).factors, fedex_lora.aggregate(*case).base_delta)
    assert rel(served(fedex_lora.aggregate(*case)), truth) < 1e-12 < 0.1 < rel(served(mixed), truth)


@pytest.mark.parametrize("rank", [0, 1, 4, 9])
def test_a_truncated_residual_is_the_nearest_of_its_rank(rank: int) -> None:
    case = draw(3)
    left, right = fedex_lora.aggregate(*case).base_delta[0]
    S = torch.linalg.svdvals(left @ right)
    result = fedex_lora.aggregate(*case, Knobs(residual_rank=rank))
    assert result.diag["residual_rank"] == rank and bool(result.base_delta) == (rank > 0)
    missed = float((served(result) - mean_product(case.uploads, case.weights)).norm())
    assert abs(missed - float(S[rank:].norm())) < 1e-12 * float(S[0])


def test_one_client_needs_no_correction() -> None:
    case = draw(4, ranks=(3,))
    assert fedex_lora.aggregate(*case).base_delta == []
