from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated.adapters.rounds import Round, draw, mean_product, rel

from isthmus.federated.adapters import fedit
from isthmus.models.factors import Factors


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_the_error_is_the_weighted_covariance_of_the_factors(seed: int) -> None:
    uploads, p, _ = case = draw(seed)
    B, A, s = fedit.aggregate(*case).factors
    covariance = sum(float(w) * s * (x.B - B) @ (x.A - A) for w, x in zip(p, uploads, strict=True))
    error = mean_product(uploads, p) - s * B @ A
    assert rel(covariance, error) < 1e-12 and float(error.norm()) > 0.1


def test_the_mean_by_hand() -> None:
    one = Factors(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0, 0.0, 4.0]]), 2.0)
    two = Factors(torch.tensor([[5.0], [-1.0]]), torch.tensor([[-2.0, 8.0, 0.0]]), 2.0)
    result = fedit.aggregate([one, two], torch.tensor([0.75, 0.25]), one)
    assert result.factors.B.tolist() == [[2.0], [2.0]]
    assert result.factors.A.tolist() == [[1.0, 2.0, 3.0]]
    assert result.factors.scale == 2.0 and result.base_delta == []


def test_exact_only_where_clients_agree_in_one_factor() -> None:
    case = draw(1)
    for shared in ("B", "A"):
        same = [x._replace(**{shared: getattr(case.down, shared)}) for x in case.uploads]
        result = fedit.aggregate(same, case.weights, case.down)
        assert rel(result.factors.delta(), mean_product(same, case.weights)) < 1e-13
    alone = Round([case.uploads[2]], torch.ones(1), case.down)
    assert torch.equal(fedit.aggregate(*alone).factors.B, case.uploads[2].B)
