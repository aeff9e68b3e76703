from __future__ import annotations

import torch
from tests.federated.adapters.rounds import draw, mean_product, rel

from isthmus.federated.adapters import flora
from isthmus.models.factors import fresh


def test_the_stack_carries_the_weight_on_one_side_only() -> None:
    case = draw(0, ranks=(1, 3, 2), scales=(0.5, 2.0, 1.0))
    result = flora.aggregate(*case, key=9)
    left, right = result.base_delta[0]
    assert torch.equal(left, torch.cat([x.B for x in case.uploads], 1))
    rows = [float(p) * x.scale * x.A for p, x in zip(case.weights, case.uploads, strict=True)]
    assert rel(right, torch.cat(rows)) < 1e-15
    assert rel(left @ right, mean_product(case.uploads, case.weights)) < 1e-13
    twice = torch.cat([float(p) * x.B for p, x in zip(case.weights, case.uploads, strict=True)], 1)
    assert rel(twice @ right, mean_product(case.uploads, case.weights)) > 0.3
    assert result.diag["stack_rank"] == 6


def test_the_adapter_starts_afresh() -> None:
    case = draw(1, ranks=(3, 3))
    B, A, s = flora.aggregate(*case, key=9).factors
    assert torch.equal(B, torch.zeros(23, 3, dtype=torch.float64)) and s == 1.7
    assert torch.equal(A, fresh(9, 3, 31, torch.float64))
    assert float(A.abs().max()) <= 31**-0.5 and float(A.abs().max()) > 0.8 * 31**-0.5
    assert not torch.equal(A, flora.aggregate(*case, key=10).factors.A)


def test_many_clients_are_cheaper_dense() -> None:
    assert flora.download(100, 50, 20) == 20 * 150
    assert flora.download(100, 50, 40) == 5000
