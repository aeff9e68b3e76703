from __future__ import annotations

import pytest
import torch
from tests.federated.adapters.rounds import draw, mean_product, rel

from isthmus.errors import InputError
from isthmus.federated.adapters import ffa_lora


def test_b_is_the_mean_and_a_is_the_very_same() -> None:
    case = draw(0, scales=(1.7, 0.4, 1.7, 3.0))
    uploads = [x._replace(A=case.down.A) for x in case.uploads]
    result = ffa_lora.aggregate(uploads, case.weights, case.down)
    assert result.factors.A is case.down.A and result.base_delta == []
    assert rel(result.factors.delta(), mean_product(uploads, case.weights)) < 1e-13
    by_hand = sum(
        float(p) * x.B * x.scale / 1.7 for p, x in zip(case.weights, uploads, strict=True)
    )
    assert rel(result.factors.B, by_hand) < 1e-14


def test_an_a_that_was_trained_is_refused() -> None:
    case = draw(0)
    uploads = [case.uploads[0]._replace(A=case.down.A), *case.uploads[1:]]
    with pytest.raises(InputError, match=r"uploads\[1\].A: changed given"):
        ffa_lora.aggregate(uploads, case.weights, case.down)


def test_half_the_traffic_of_square_layers() -> None:
    assert ffa_lora.upload(512, 512, 8) == ffa_lora.download(512, 512, 8) == 8 * 512
    assert ffa_lora.upload(100, 7, 2) == 200


def test_under_noise_there_is_no_product_of_two_noises() -> None:
    """With noise E_i on B alone the error is the mean of s E_i A: linear in the noise."""
    case = draw(3)
    uploads = [x._replace(A=case.down.A) for x in case.uploads]
    clean = ffa_lora.aggregate(uploads, case.weights, case.down).factors.delta()
    errors = []
    for size in (1e-3, 1.0):
        g = torch.Generator().manual_seed(9)
        noisy = [
            x._replace(B=x.B + size * torch.randn(x.B.shape, generator=g, dtype=torch.float64))
            for x in uploads
        ]
        noised = ffa_lora.aggregate(noisy, case.weights, case.down).factors.delta()
        errors.append((noised - clean) / size)
    assert rel(errors[0], errors[1]) < 1e-10
