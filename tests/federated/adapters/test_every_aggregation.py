"""What holds for every aggregation, and what only for the exact ones."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated.adapters.rounds import (
    TOLERANCE,
    Round,
    draw,
    mean_product,
    rel,
    served,
)

from isthmus.contracts import LowRank
from isthmus.errors import InputError
from isthmus.federated.adapters import (
    fedex_lora,
    fedit,
    fedmomentum,
    ffa_lora,
    flexlora,
    flora,
)
from isthmus.federated.adapters.product import Global, NonFinite
from isthmus.models.factors import Factors

ALL = {
    "fedit": fedit,
    "ffa-lora": ffa_lora,
    "flora": flora,
    "fedex-lora": fedex_lora,
    "flexlora": flexlora,
    "fedmomentum": fedmomentum,
}
EXACT = ["ffa-lora", "flora", "fedex-lora", "fedmomentum"]
ANY_RANK = ["flora", "flexlora", "fedmomentum"]


def run(name: str, case: Round, key: int = 5) -> Global:
    module: ModuleType = ALL[name]
    knobs = fedmomentum.Knobs(tau=1.0) if name == "fedmomentum" else module.DEFAULTS
    return module.aggregate(*case, knobs, key=key)


def case_for(name: str, seed: int, **options: object) -> Round:
    """A round the method accepts: FFA-LoRA's clients all hold the A they were given."""
    case = draw(seed, **options)  # type: ignore[arg-type]
    if name == "ffa-lora":
        return case._replace(uploads=[x._replace(A=case.down.A) for x in case.uploads])
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT)
@given(seed=st.integers(0, 10**6), d=st.integers(6, 30), k=st.integers(31, 50))
@settings(max_examples=8, deadline=None)
def test_exact_methods_serve_the_mean_product(
    name: str, dtype: torch.dtype, seed: int, d: int, k: int
) -> None:
    case = case_for(name, seed, d=d, k=k, dtype=dtype)
    assert rel(served(run(name, case)), mean_product(case.uploads, case.weights)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", EXACT)
def test_scales_of_clients_may_differ_from_the_scale_of_the_next_pair(name: str) -> None:
    case = case_for(name, 4, scale=0.9, scales=[0.5, 1.0, 2.0, 3.5])
    result = run(name, case)
    assert result.factors.scale == 0.9
    assert rel(served(result), mean_product(case.uploads, case.weights)) < 1e-12


def test_the_inexact_ones_are_far_away_on_the_same_round() -> None:
    case = draw(2)
    truth = mean_product(case.uploads, case.weights)
    for name in ("fedit", "flexlora"):
        assert rel(served(run(name, case)), truth) > 0.1


@pytest.mark.parametrize("name", ALL)
def test_one_client_keeps_its_product_and_identical_clients_too(name: str) -> None:
    case = case_for(name, 11)
    one = case.uploads[0]
    alone = Round([one], torch.tensor([1.0]), case.down)
    same = Round([one] * 3, torch.tensor([0.5, 0.2, 0.3]), case.down)
    assert rel(served(run(name, alone)), one.delta()) < 1e-6
    assert rel(served(run(name, same)), one.delta()) < 1e-6


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)))
@settings(max_examples=6, deadline=None)
def test_order_and_splitting_a_client_change_nothing(
    name: str, seed: int, order: list[int]
) -> None:
    case = case_for(name, seed)
    result = run(name, case)
    shuffled = Round([case.uploads[i] for i in order], case.weights[torch.tensor(order)], case.down)
    halves = torch.cat([case.weights[:1] / 2, case.weights[:1] / 2, case.weights[1:]])
    split = Round([case.uploads[0], *case.uploads], halves, case.down)
    for other in (run(name, shuffled), run(name, split)):
        assert rel(served(other), served(result)) < 1e-11
        assert rel(other.factors.delta(), result.factors.delta()) < 1e-8 or name == "flora"


@pytest.mark.parametrize("name", ALL)
def test_nobody_counts_and_nothing_changes(name: str) -> None:
    case = case_for(name, 17)
    result = run(name, case._replace(weights=torch.zeros(4)))
    assert rel(served(result), case.down.delta()) < 1e-12


@pytest.mark.parametrize("name", EXACT)
def test_weight_a_selector_took_stays_with_the_pair_sent(name: str) -> None:
    case = case_for(name, 19)
    result = run(name, case._replace(weights=0.6 * case.weights))
    truth = 0.6 * mean_product(case.uploads, case.weights) + 0.4 * case.down.delta()
    assert rel(served(result), truth) < 1e-12


@pytest.mark.parametrize("name", ANY_RANK)
def test_ranks_may_differ(name: str) -> None:
    case = draw(23, ranks=(1, 4, 2, 4))
    truth = mean_product(case.uploads, case.weights)
    if name == "fedmomentum":  # the frozen tails of the smaller clients count as well
        for p, x in zip(case.weights, case.uploads, strict=True):
            truth += p * case.down.scale * case.down.B[:, x.rank :] @ case.down.A[x.rank :]
    result = run(name, case)
    if name == "flexlora":
        assert abs(float((served(result) - truth).norm()) - result.diag["lost"]) < 1e-12
    else:
        assert rel(served(result), truth) < 1e-12


@pytest.mark.parametrize("name", sorted(ALL.keys() - ANY_RANK))
def test_ranks_must_be_equal_where_factors_are_averaged(name: str) -> None:
    case = draw(23, ranks=(3, 2, 3))
    with pytest.raises(InputError, match=r"uploads\[1\]: rank 2 given, allowed: rank 3"):
        run(name, case)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_uploads_have_a_named_error(name: str, poison: float) -> None:
    case = case_for(name, 29)
    B = case.uploads[2].B.clone()
    B[4, 1] = poison
    uploads = [*case.uploads[:2], case.uploads[2]._replace(B=B), case.uploads[3]]
    with pytest.raises(NonFinite) as caught:
        run(name, case._replace(uploads=uploads))
    assert caught.value.clients == [2]


@pytest.mark.parametrize("name", ALL)
def test_dtype_is_kept_and_inputs_are_not_touched(name: str) -> None:
    case = case_for(name, 31, dtype=torch.bfloat16)
    before = [x.B.clone() for x in case.uploads]
    result = run(name, case)
    assert result.factors.B.dtype == result.factors.A.dtype == torch.bfloat16
    assert all(left.dtype == torch.float32 for left, _ in result.base_delta)
    assert all(torch.equal(x.B, b) for x, b in zip(case.uploads, before, strict=True))
    truth = mean_product(case.uploads, case.weights)
    if name in EXACT:
        assert rel(served(result), truth) < 2e-2


@pytest.mark.parametrize("name", ALL)
def test_same_key_same_bits(name: str) -> None:
    case = case_for(name, 37)
    one, two, other = run(name, case), run(name, case), run(name, case, key=6)
    assert torch.equal(one.factors.B, two.factors.B) and torch.equal(one.factors.A, two.factors.A)
    assert torch.equal(one.factors.A, other.factors.A) == (name != "flora")


def test_costs_count_the_tensors_that_cross() -> None:
    d, k = 200, 300

    def size(x: Factors) -> int:
        return x.B.numel() + x.A.numel()

    for name, module in ALL.items():
        case = case_for(name, 41, d=d, k=k, ranks=(3, 3, 3, 3))
        result = run(name, case)
        base = sum(left.numel() + right.numel() for left, right in result.base_delta)
        up = case.uploads[0].B.numel() if name == "ffa-lora" else size(case.uploads[0])
        assert module.upload(d, k, 3) == up
        down: Callable[..., int] = module.download
        if name == "flora":
            assert down(d, k, result.diag["stack_rank"]) == base == 12 * (d + k)
        elif name == "fedex-lora":
            assert down(d, k, 3, result.diag["residual_rank"]) == size(result.factors) + base
            assert base == 9 * (d + k)
        elif name == "fedmomentum":
            e = result.diag["residual_rank"]
            assert down(d, k, 3, e) == size(result.factors) + base == (3 + e) * (d + k)
            assert e == 9
        elif name == "ffa-lora":
            assert down(d, k, 3) == result.factors.B.numel()
        else:
            assert down(d, k, 3) == size(result.factors) and base == 0
    assert flora.download(d, k, 1000) == d * k
    assert fedex_lora.download(d, k, 3, 1000) == 3 * (d + k) + d * k
    assert fedmomentum.download(d, k, 3, 1000) == 3 * (d + k) + d * k


@pytest.mark.parametrize("name", ["fedex-lora", "fedmomentum"])
def test_errors_easily_made_with_the_residual_are_seen(name: str) -> None:
    case = draw(43, d=31, k=31, scale=2.0)
    truth = mean_product(case.uploads, case.weights)
    result = run(name, case)
    (left, right) = result.base_delta[0]

    def total(pair: LowRank) -> float:
        return rel(served(Global(result.factors, [pair])), truth)

    assert total(LowRank(left, right)) < 1e-12
    assert total(LowRank(left / case.down.scale, right)) > 0.1  # the scale forgotten
    assert total(LowRank(left * case.down.scale, right)) > 0.1  # the scale twice
    assert total(LowRank(right.mT, left.mT)) > 0.1  # transposed, unseen in square layers


def test_settings_are_frozen_and_unknown_ones_refused() -> None:
    with pytest.raises(ValueError, match="frozen"):
        fedmomentum.DEFAULTS.tau = 0.5  # type: ignore[misc]
    with pytest.raises(ValueError, match="extra"):
        fedmomentum.Knobs(taw=0.5)  # type: ignore[call-arg]
    assert (fedmomentum.DEFAULTS.tau, fedit.DEFAULTS.rank) == (0.9999, 16)
