from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated.adapters.rounds import (
    TOLERANCE,
    Round,
    double,
    draw,
    mean_product,
    rel,
    served,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.errors import InputError
from isthmus.federated.adapters import fedit, fedmomentum, flora
from isthmus.federated.adapters.fedmomentum import Knobs, aggregate, serve
from isthmus.models.factors import Factors, dead, stack, unstack

EXACT = Knobs(tau=1.0)


def gradients(factors: Factors, G: Tensor) -> tuple[Tensor, Tensor]:
    """Of <G, W + s B A>: dB = s G A^T, dA = s B^T G."""
    return factors.scale * G @ factors.A.mT, factors.scale * factors.B.mT @ G


@given(
    seed=st.integers(0, 10**6),
    d=st.integers(5, 40),
    k=st.integers(5, 40),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    alpha=st.sampled_from([0.5, 1.0, 4.0, 16.0]),
    split=st.sampled_from(["balanced", "orth_a"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_total_is_exact_at_tau_one(
    seed: int, d: int, k: int, ranks: list[int], alpha: float, split: str, dtype: torch.dtype
) -> None:
    scales = [alpha / r for r in ranks]
    case = draw(seed, d, k, ranks, scale=alpha / max(ranks), scales=scales, dtype=dtype)
    truth = mean_product(case.uploads, case.weights)
    for p, x in zip(case.weights, case.uploads, strict=True):
        tail = double(case.down)
        truth += p * tail.scale * tail.B[:, x.rank :] @ tail.A[x.rank :]
    result = aggregate(*case, Knobs(tau=1.0, split=split), key=seed)  # type: ignore[arg-type]
    W = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert rel(W + served(result), W + truth) < TOLERANCE[dtype]
    assert rel(served(result), truth) < TOLERANCE[dtype]
    assert result.factors.rank == max(ranks) and not dead(result.factors).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", ["few", "columns", "rows"])
def test_a_rank_that_suffices_leaves_no_residual(shared: str, dtype: torch.dtype) -> None:
    case = draw(1, ranks=(4, 4, 4, 4), dtype=dtype)
    if shared == "few":
        small = draw(1, ranks=(1, 2, 1), rank=4, dtype=dtype)
        blank = Factors(0 * small.down.B, small.down.A, small.down.scale)
        case = small._replace(down=blank)
    elif shared == "columns":
        case = case._replace(uploads=[x._replace(B=case.down.B) for x in case.uploads])
    else:
        case = case._replace(uploads=[x._replace(A=case.down.A) for x in case.uploads])
    result = aggregate(*case, EXACT)
    assert result.base_delta == [] and result.diag["residual_rank"] == 0
    truth = mean_product(case.uploads, case.weights)
    assert rel(double(result.factors).delta(), truth) < TOLERANCE[dtype]


def test_no_pair_of_the_rank_is_nearer() -> None:
    case = draw(2)
    truth = mean_product(case.uploads, case.weights)
    S = torch.linalg.svdvals(truth)
    ours = float((truth - aggregate(*case).factors.delta()).norm())
    assert abs(ours / float(S[3:].norm()) - 1.0) < 1e-12
    assert ours < float((truth - fedit.aggregate(*case).factors.delta()).norm())
    g = torch.Generator().manual_seed(0)
    for _ in range(5):  # the best B for a random A is still no nearer
        A = torch.randn(3, 31, generator=g, dtype=torch.float64)
        B = torch.linalg.lstsq(A.mT, truth.mT).solution.mT
        assert ours < float((truth - B @ A).norm())


def test_balanced_and_ordered() -> None:
    B, A, s = aggregate(*(case := draw(3))).factors
    S = torch.linalg.svdvals(mean_product(case.uploads, case.weights))[:3]
    assert rel(B.mT @ B, torch.diag(S / s)) < 1e-12
    assert rel(A @ A.mT, torch.diag(S / s)) < 1e-12


def test_orth_a_has_rows_of_one_length() -> None:
    case = draw(3)
    B, A, s = aggregate(*case, Knobs(split="orth_a", c=0.3)).factors
    S = torch.linalg.svdvals(mean_product(case.uploads, case.weights))[:3]
    assert rel(A @ A.mT, 0.09 * torch.eye(3, dtype=torch.float64)) < 1e-12
    assert rel(B.mT @ B, torch.diag((S / (s * 0.3)) ** 2)) < 1e-12


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_gauge(seed: int) -> None:
    """(B M, M^-1 A) is the same client; averaging factors is not so lucky."""
    case = draw(seed, ranks=(2, 4, 3), rank=4)
    g = torch.Generator().manual_seed(seed)
    turned = []
    for x in case.uploads:
        M, _ = torch.linalg.qr(torch.randn(x.rank, x.rank, generator=g, dtype=torch.float64))
        M = M * (0.5 + torch.rand(x.rank, generator=g, dtype=torch.float64))
        turned.append(Factors(x.B @ M, torch.linalg.solve(M, x.A), x.scale))
    one, two = aggregate(*case, EXACT), aggregate(*case._replace(uploads=turned), EXACT)
    assert rel(served(two), served(one)) < 1e-12
    assert rel(two.diag["singular_values"][:4], one.diag["singular_values"][:4]) < 1e-12
    assert rel(two.factors.delta(), one.factors.delta()) < 1e-9
    assert rel(two.factors.B, one.factors.B) < 1e-6 and rel(two.factors.A, one.factors.A) < 1e-6


def test_clients_that_differ_by_a_rotation_agree_here_and_not_in_fedit() -> None:
    case = draw(6, ranks=(4,))
    (one,) = case.uploads
    g = torch.Generator().manual_seed(0)
    turned = []
    for _ in range(5):
        Q, _ = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))
        turned.append(Factors(one.B @ Q, Q.mT @ one.A, one.scale))
    case = Round(turned, torch.full((5,), 0.2), case.down)
    result = aggregate(*case, EXACT)
    assert rel(result.factors.delta(), one.delta()) < 1e-6 and result.base_delta == []
    assert rel(fedit.aggregate(*case).factors.delta(), one.delta()) > 0.5


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_tau_keeps_the_fewest_components_that_reach_it(seed: int) -> None:
    case = draw(seed, d=37, k=29, ranks=(2, 2, 2, 2, 2))
    truth = mean_product(case.uploads, case.weights)
    energy = torch.linalg.svdvals(truth)[:10].square()
    last = 0
    for tau in (0.3, 0.7, 0.9, 0.99, 0.999, 0.9999, 1.0):
        result = aggregate(*case, Knobs(tau=tau))
        e = 2 + result.diag["residual_rank"]
        assert energy[:e].sum() >= (tau - 1e-12) * energy.sum()
        assert e == 2 or energy[: e - 1].sum() < tau * energy.sum()
        assert rel(served(result), truth) <= (1 - tau) ** 0.5 + 1e-12
        assert abs(result.diag["kept"] - float(energy[:e].sum() / energy.sum())) < 1e-12
        assert result.diag["residual_rank"] >= last
        last = result.diag["residual_rank"]
    assert last == 8


@pytest.mark.parametrize("split", ["balanced", "orth_a"])
@pytest.mark.parametrize("own", [0, 1, 3])
def test_no_direction_dies(own: int, split: str) -> None:
    """After a round of rank `own` < r the product stands and one step moves every direction."""
    case = draw(8, ranks=(5, 5, 5))
    B = (
        case.down.B[:, :own]
        @ torch.randn(own, 5, generator=torch.Generator().manual_seed(1)).double()
    )
    uploads = [Factors(B, x.A, 1.7) for x in case.uploads]
    case = case._replace(uploads=uploads)
    result = aggregate(*case, Knobs(tau=1.0, split=split), key=3)  # type: ignore[arg-type]
    truth = mean_product(case.uploads, case.weights)
    assert float((served(result) - truth).norm()) < 1e-12
    assert result.diag["live"] == own
    assert (result.factors.B[:, own:] == 0).all() and not dead(result.factors).any()
    new, kept = result.factors.A[own:], result.factors.A[:own]
    assert float((new @ kept.mT).norm()) < 1e-12
    length = float(kept.norm(dim=1).mean()) if own else 3.0**-0.5
    assert torch.allclose(new.norm(dim=1), torch.full((5 - own,), length, dtype=torch.float64))
    G = torch.randn(23, 31, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dB, dA = gradients(result.factors, G)
    assert ((dB.norm(dim=0) + dA.norm(dim=1)) > 1e-3).all()

    zeros = Factors(0 * result.factors.B, 0 * result.factors.A, 1.7)
    assert dead(zeros).all() and all(float(x.norm()) == 0 for x in gradients(zeros, G))


def test_a_faint_direction_goes_to_the_backbone_not_to_nothing() -> None:
    g = torch.Generator().manual_seed(4)
    U, _ = torch.linalg.qr(torch.randn(23, 3, generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(31, 3, generator=g, dtype=torch.float64))
    S = torch.tensor([1.0, 0.5, 1e-9], dtype=torch.float64)
    one = Factors(U * S, V.mT, 1.0)
    result = aggregate([one], torch.ones(1), one, EXACT)
    assert result.diag["live"] == 2 and result.diag["residual_rank"] == 1
    assert rel(served(result), one.delta()) < 1e-14
    left, right = result.base_delta[0]
    assert abs(float((left @ right).norm()) - 1e-9) < 1e-15


def test_a_client_that_did_not_move_contributes_what_it_was_given() -> None:
    case = draw(9)
    case = case._replace(uploads=[case.down, *case.uploads[1:]])
    truth = case.weights[0] * case.down.delta()
    truth = truth + mean_product(case.uploads[1:], case.weights[1:])
    assert rel(served(aggregate(*case, EXACT)), truth) < 1e-12
    still = case._replace(uploads=[case.down] * 4)
    assert rel(aggregate(*still, EXACT).factors.delta(), case.down.delta()) < 1e-12


def test_small_clients_hold_the_tail_still() -> None:
    """A round of clients of lower rank that train nothing changes nothing, round after round."""
    down = aggregate(*draw(10, ranks=(4, 4)), EXACT).factors
    start = down.delta()
    for _ in range(3):
        uploads = [serve(down, 2, 0.5), serve(down, 1, 2.0)]
        result = aggregate(uploads, torch.tensor([0.3, 0.7]), down, EXACT)
        down = result.factors
        assert result.base_delta == []
    assert rel(down.delta(), start) < 1e-12


def test_padded_training_sends_slices_and_gives_the_same_round() -> None:
    case = draw(12, ranks=(1, 3, 2))
    wide = stack(case.uploads, case.down)
    assert wide.B.shape == (3, 23, 3) and wide.A.shape == (3, 3, 31)
    assert torch.equal(wide.B[0][:, 1:], case.down.B[:, 1:])
    back = unstack(wide, [1, 3, 2])
    assert [x.rank for x in back] == [1, 3, 2]
    one, two = aggregate(*case, EXACT), aggregate(back, case.weights, case.down, EXACT)
    assert rel(served(two), served(one)) < 1e-13


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.4, 1.7, 6.0])
def test_a_client_is_served_the_leading_directions_at_its_own_scale(
    rank: int, scale: float
) -> None:
    whole = aggregate(*draw(13)).factors
    B, A, s = serve(whole, rank, scale)
    U, S, Vh = torch.linalg.svd(whole.delta())
    assert s == scale and B.shape == (23, rank) and A.shape == (rank, 31)
    assert rel(s * B @ A, (U[:, :rank] * S[:rank]) @ Vh[:rank]) < 1e-12
    assert rel(B.mT @ B, A @ A.mT) < 1e-12


def test_alignment_turns_the_pair_and_nothing_else() -> None:
    first = aggregate(*draw(14)).factors
    g = torch.Generator().manual_seed(3)
    Q, _ = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))
    down = Factors(first.B @ Q, Q.mT @ first.A, first.scale)
    near = [down._replace(B=down.B + 1e-3 * x.B) for x in draw(14).uploads]
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    plain = aggregate(near, p, down, EXACT)
    turned = aggregate(near, p, down, Knobs(tau=1.0, align=True))
    assert rel(turned.factors.delta(), plain.factors.delta()) < 1e-12
    B, A, _ = turned.factors
    assert rel(B.mT @ B, A @ A.mT) < 1e-12
    assert rel(B, down.B) < 0.05 and rel(plain.factors.B, down.B) > 0.3
    with pytest.raises(InputError, match="align"):
        aggregate([serve(down, 2, 1.0)], torch.ones(1), down, Knobs(align=True))


def test_row_spaces_persist_and_flora_forgets_them() -> None:
    """overlap(t) = ||V_t^T V_t+1||^2 / r: near 1 here, about r / k for a random restart."""

    def overlap(a: Tensor, b: Tensor) -> float:
        V, W = torch.linalg.qr(a.mT)[0], torch.linalg.qr(b.mT)[0]
        return float((V.mT @ W).square().sum()) / a.shape[0]

    case = draw(15, ranks=(4,) * 5, k=60)
    moved = [Factors(case.down.B + 0.1 * x.B, case.down.A + 0.1 * x.A, 1.7) for x in case.uploads]
    case = case._replace(uploads=moved)
    assert overlap(case.down.A, aggregate(*case).factors.A) > 0.9
    restarts = [overlap(case.down.A, flora.aggregate(*case, key=i).factors.A) for i in range(20)]
    assert abs(sum(restarts) / 20 - 4 / 60) < 0.03


def test_twenty_thousand_square_never_becomes_a_matrix() -> None:
    d = k = 20_000

    class NothingDense(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor):
                    self.largest = max(self.largest, x.untyped_storage().nbytes())
                    assert self.largest <= 4 * d * k / 100, f"{func}: {list(x.shape)}"
            return out

    g = torch.Generator().manual_seed(0)
    uploads = [
        Factors(torch.randn(d, 8, generator=g), torch.randn(8, k, generator=g) / k**0.5, 2.0)
        for _ in range(8)
    ]
    weights = torch.arange(1.0, 9.0) / 36
    with NothingDense() as watch:
        result = aggregate(uploads, weights, uploads[0], EXACT)
    assert watch.largest >= 4 * d * 64  # the stack itself was seen
    x = torch.randn(k, generator=g)
    truth = sum(
        float(p) * u.scale * (u.B.double() @ (u.A.double() @ x.double()))
        for p, u in zip(weights, uploads, strict=True)
    )
    B, A, s = result.factors
    got = s * (B @ (A @ x)) + sum(left @ (right @ x) for left, right in result.base_delta)
    assert rel(got.double(), truth) < 1e-5
    assert result.diag["residual_rank"] == 56


def test_defaults_drop_what_is_faint() -> None:
    case = draw(16)
    assert aggregate(*case).diag["residual_rank"] == 9
    faint = [Factors(case.down.B + 1e-3 * x.B, case.down.A, 1.7) for x in case.uploads]
    faint = [x._replace(A=x.A + 1e-3 * u.A) for x, u in zip(faint, case.uploads, strict=True)]
    assert aggregate(faint, case.weights, case.down).diag["residual_rank"] == 0
    assert aggregate(faint, case.weights, case.down, EXACT).diag["residual_rank"] == 9
    assert (fedmomentum.DEFAULTS.tau, fedmomentum.DEFAULTS.split) == (0.9999, "balanced")
