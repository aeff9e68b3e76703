from __future__ import annotations

import pytest
import torch
from tests.federated.adapters.rounds import draw, mean_product, rel

from isthmus.federated.adapters import fedmomentum, flexlora
from isthmus.models.factors import dead


@pytest.mark.parametrize("scale", [0.3, 1.7, 8.0])
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_every_rank_and_scale_gets_the_nearest_product(rank: int, scale: float) -> None:
    case = draw(0, ranks=(1, 5, 2, 3), scales=(0.5, 1.0, 2.0, 3.0))
    U, S, Vh = torch.linalg.svd(mean_product(case.uploads, case.weights))
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    B, A, s = flexlora.serve(flexlora.aggregate(*case).factors, rank, scale)
    assert s == scale and rel(s * B @ A, best) < 1e-12
    assert rel(A @ A.mT, torch.eye(rank, dtype=torch.float64)) < 1e-12
    assert rel(B.mT @ B, torch.diag((S[:rank] / s) ** 2)) < 1e-12
    root = B / (S[:rank] / s).sqrt()  # the square root of S in B, and none in A
    assert scale > 0.3 or rel(s * root @ A, best) > 0.5


def test_what_is_lost_is_told() -> None:
    case = draw(1)
    S = torch.linalg.svdvals(mean_product(case.uploads, case.weights))
    assert abs(flexlora.aggregate(*case).diag["lost"] / float(S[3:].norm()) - 1) < 1e-12


def test_same_subspace_as_fedmomentum_without_its_residual() -> None:
    case = draw(2)
    one, two = flexlora.aggregate(*case).factors, fedmomentum.aggregate(*case).factors
    assert rel(one.delta(), two.delta()) < 1e-12 and rel(one.B, two.B) > 0.1


def test_a_client_larger_than_the_product_gets_directions_to_learn() -> None:
    case = draw(3, ranks=(1, 1), rank=5)
    factors = flexlora.aggregate(*case, key=4).factors
    assert factors.rank == 5 and not dead(factors).any()
    assert (factors.B[:, 2:] == 0).all()
    assert rel(factors.A @ factors.A.mT, torch.eye(5, dtype=torch.float64)) < 1e-12
    assert rel(factors.delta(), mean_product(case.uploads, case.weights)) < 1e-12


def test_the_global_pair_is_as_wide_as_the_largest_client() -> None:
    case = draw(4, ranks=(2, 6), rank=3)
    assert flexlora.aggregate(*case).factors.rank == 6
