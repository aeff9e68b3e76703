from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from isthmus import catalogue, seeds, tree
from isthmus.contracts import Mechanism
from isthmus.errors import InputError
from isthmus.privacy import gaussian
from isthmus.privacy.accountant import epsilon
from isthmus.privacy.clip import norms
from isthmus.privacy.gaussian import AdaptiveClip, DPFedAvg, Gaussian, LocalDP, system_normal

N = 20


def uploads(scale=1.0):
    size = torch.linspace(0.1, 6.0, N, dtype=torch.float64) * scale
    return {
        "w": seeds.normal(3, (N, 6, 4), torch.float64) * size[:, None, None],
        "b": seeds.normal(4, (N, 5), torch.float64) * size[:, None],
    }


def keys(n=N):
    return seeds.keys(seeds.key(7, "noise"), range(n))


def total(mechanism, rows, present):
    """The sum that the mechanism noises, over the clients that are present."""
    clipped = mechanism.clipped(rows)
    weights = torch.as_tensor(present, dtype=torch.float64) * mechanism.weight
    return tree.weighted_mean(clipped, weights)


def test_removing_any_client_moves_the_sum_by_at_most_the_bound():
    mechanism = DPFedAvg(1.0, 2.5, population=40, rate=0.5)
    whole = total(mechanism, uploads(), [1.0] * N)
    moves = []
    for i in range(N):
        rest = total(mechanism, uploads(), [float(j != i) for j in range(N)])
        moves.append(float(tree.norm(tree.sub(whole, rest))) / mechanism.weight)
    assert max(moves) <= 2.5 * (1 + 1e-6)
    assert max(moves) >= 2.5 * (1 - 1e-6)  # and the bound is reached: it is the sensitivity
    assert min(moves) < 1.0  # small uploads are not blown up to it
    free = DPFedAvg(0.0, math.inf, population=40, rate=0.5)
    assert float(norms(free.clipped(uploads())).max()) > 10.0  # so the clip did the work


def test_central_noise_has_the_std_it_names_and_a_mean_of_zero():
    mechanism = DPFedAvg(1.3, 2.0, population=50, rate=0.2)  # qN = 10
    zero = {"w": torch.zeros(100, 60), "b": torch.zeros(4000)}
    noised = mechanism.central(zero, key=11).tensors
    draws = torch.cat([noised["w"].reshape(-1), noised["b"]])
    assert draws.numel() == 10_000
    assert float(draws.std()) == pytest.approx(1.3 * 2.0 / 10.0, rel=0.03)
    assert abs(float(draws.mean())) < 4 * 0.26 / 100
    again = mechanism.central(zero, key=11).tensors
    other = mechanism.central(zero, key=12).tensors
    assert tree.equal(noised, again) and not tree.equal(noised, other)
    joint = torch.corrcoef(torch.stack([noised["w"].reshape(-1)[:4000], noised["b"]]))
    assert abs(float(joint[0, 1])) < 0.07  # fields have noise of their own


def test_local_noise_has_the_std_it_names_for_each_client_by_its_own_key():
    mechanism = LocalDP(0.7, 3.0)
    zero = {"w": torch.zeros(N, 125, 4), "b": torch.zeros(N, 9)}
    noised = mechanism.local(zero, keys()).tensors
    rows = tree.flatten_stacked(noised)
    assert float(noised["w"].std()) == pytest.approx(2.1, rel=0.03)
    assert torch.corrcoef(rows).triu(1).abs().max() < 0.2  # no two clients share noise
    for i in range(0, N, 7):  # stacked equals the loop, bit by bit
        one = mechanism.local({k: x[i : i + 1] for k, x in zero.items()}, keys()[i : i + 1])
        assert tree.equal(tree.row(noised, i), tree.row(one.tensors, 0))
    # a field's noise does not depend on which other fields go up with it
    assert torch.equal(mechanism.local({"b": zero["b"]}, keys()).tensors["b"], noised["b"])


def test_local_uploads_are_clipped_jointly_before_the_noise():
    rows = uploads()
    silent = LocalDP(0.0, 2.0).local(rows, keys()).tensors
    assert float(norms(silent).max()) <= 2.0
    assert tree.equal(tree.row(silent, 0), tree.row(rows, 0))
    noised = LocalDP(0.5, 2.0).local(rows, keys()).tensors
    noise = LocalDP(0.5, 2.0).local({k: torch.zeros_like(x) for k, x in rows.items()}, keys())
    expected = tree.add(silent, noise.tensors)
    for name, x in noised.items():
        assert torch.allclose(x, expected[name], atol=1e-12)


def test_no_noise_and_no_clip_reproduce_every_bit():
    rows = {name: x.float() for name, x in uploads().items()}
    assert tree.equal(LocalDP(0.0, math.inf).local(rows, keys()).tensors, rows)
    central = DPFedAvg(0.0, math.inf, population=N)
    assert tree.equal(central.clipped(rows), rows)
    one = tree.row(rows, 4)
    assert tree.equal(central.central(one, key=1).tensors, one)


def test_events_say_what_was_done_and_the_accountant_reads_them():
    central = DPFedAvg(1.1, 1.0, population=1000, rate=0.01)
    event = central.central({"x": torch.zeros(2)}, key=0).event
    assert event["sampling"] == {"kind": "poisson", "rate": 0.01}
    assert (event["adjacency"], event["unit"]) == ("add-remove", "client")
    assert epsilon([event | {"count": 10_000}], 1e-5, "rdp") == pytest.approx(5.632, abs=5e-4)
    local = LocalDP(4.0, 1.0).local({"x": torch.zeros(1, 2)}, keys(1)).event
    assert local["adjacency"] == "replace-one" and local["sampling"] == {"kind": "none"}
    # local noise at sigma protects like a release at sigma / 2 under adding or removing
    twin = local | {"adjacency": "add-remove", "parameters": {"noise_multiplier": 2.0}}
    assert epsilon([local], 1e-5) == pytest.approx(epsilon([twin], 1e-5), rel=1e-9)
    fixed = DPFedAvg(1.1, 1.0, population=1000, rate=0.01, sampling="without-replacement")
    assert fixed.central({"x": torch.zeros(2)}, 0).event["adjacency"] == "replace-one"
    free = DPFedAvg(0.0, 1.0).central({"x": torch.zeros(2)}, 0).event
    assert epsilon([free], 1e-5) == math.inf


def test_adaptive_clip_follows_its_equation_without_noise():
    rows = uploads()
    bound = float(norms(rows).sort().values[7]) + 1e-9  # eight of twenty are within
    mechanism = DPFedAvg(
        0.0, bound, population=80, rate=0.5, adaptive=AdaptiveClip(sigma_b=0.0, gamma=0.3, eta=0.2)
    )
    # qN = 40 expected, 20 came: b = 1/2 + (8/2 - 12/2) / 40
    share = 0.5 + (8 * 0.5 - 12 * 0.5) / 40
    moved = mechanism.adapted(rows, key=1)
    assert moved.clip == pytest.approx(bound * math.exp(-0.2 * (share - 0.3)), rel=1e-12)
    assert moved.where == "central" and type(moved) is DPFedAvg and moved.population == 80
    plain = DPFedAvg(0.0, bound, population=80, rate=0.5)
    assert plain.adapted(rows, key=1) is plain


@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.8])
def test_adaptive_clip_settles_at_the_quantile(gamma):
    rows = uploads()
    mechanism = DPFedAvg(0.0, 1e-2, population=N, adaptive=AdaptiveClip(0.0, gamma=gamma))
    for step in range(150):
        mechanism = mechanism.adapted(rows, key=step)
    within = float((norms(rows) <= mechanism.clip).double().mean())
    assert within == pytest.approx(gamma, abs=0.051)


def test_the_budget_of_the_noisy_share_is_inside_the_event():
    sigma, sigma_b = 1.0, 3.0
    mechanism = DPFedAvg(sigma, 2.0, population=10, adaptive=AdaptiveClip(sigma_b))
    own = AdaptiveClip(sigma_b).upload_multiplier(sigma)
    assert own == pytest.approx((1 - 1 / 36) ** -0.5) and own > sigma
    noised = mechanism.central({"x": torch.zeros(20_000)}, key=5)
    assert float(noised.tensors["x"].std()) == pytest.approx(own * 2.0 / 10, rel=0.02)
    # two Gaussian releases together cost what the event names
    event = noised.event | {"sampling": {"kind": "none"}}
    assert event["parameters"] == {"noise_multiplier": sigma}
    both = [event | {"parameters": {"noise_multiplier": s}} for s in (own, 2 * sigma_b)]
    assert epsilon(both, 1e-5, "rdp") == pytest.approx(epsilon([event], 1e-5, "rdp"), rel=1e-9)
    assert epsilon([both[0]], 1e-5, "rdp") < epsilon([event], 1e-5, "rdp")


def test_the_share_is_noised_with_its_std():
    rows = {"x": torch.zeros(1, 1)}
    start = DPFedAvg(0.5, 1.0, population=100, adaptive=AdaptiveClip(4.0, gamma=0.5, eta=1.0))
    shares = [0.5 - math.log(start.adapted(rows, key=k).clip) for k in range(2000)]
    noise = (np.array(shares) - 0.5) * 100 - 0.5  # one upload, within: its centred bit is 1/2
    assert abs(noise.mean()) < 4 * 4.0 / math.sqrt(2000)
    assert noise.std() == pytest.approx(4.0, rel=0.06)


def test_real_noise_comes_from_the_operating_system(monkeypatch):
    asked = []

    def counting(n):
        asked.append(n)
        return real_urandom(n)

    real_urandom = os.urandom
    monkeypatch.setattr(gaussian.os, "urandom", counting)
    mechanism = LocalDP(1.0, 1.0, real=True)
    zero = {"x": torch.zeros(4, 2500)}
    one = mechanism.local(zero, keys(4)).tensors["x"]
    two = mechanism.local(zero, keys(4)).tensors["x"]
    assert sum(asked) == 2 * 16 * 10_000  # 16 bytes for each draw
    assert not torch.equal(one, two)  # the key plays no part
    assert float(one.std()) == pytest.approx(1.0, rel=0.05)
    LocalDP(1.0, 1.0).local(zero, keys(4))
    assert sum(asked) == 2 * 16 * 10_000


def test_system_normal_is_normal():
    draws = system_normal((200, 250))
    assert draws.shape == (200, 250) and draws.dtype == torch.float64
    ordered = draws.reshape(-1).sort().values
    law = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    n = len(ordered)
    distance = (law - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert float(distance) < 2.2 / math.sqrt(n)  # Kolmogorov: exceeded once in 8000 times


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: DPFedAvg(-1.0, 1.0), "noise_multiplier"),
        (lambda: DPFedAvg(1.0, 0.0), "privacy.clip"),
        (lambda: DPFedAvg(1.0, math.inf), "inf only without noise"),
        (lambda: DPFedAvg(1.0, 1.0, population=0), "population"),
        (lambda: DPFedAvg(1.0, 1.0, rate=0.0), "rate"),
        (lambda: DPFedAvg(1.0, 1.0, sampling="poison"), "nearest: poisson"),
        (lambda: Gaussian(1.0, 1.0, where="lokal"), "nearest: local"),
        (lambda: LocalDP(1.0, 1.0, adaptive=AdaptiveClip(2.0)), "central noise"),
        (lambda: DPFedAvg(2.0, 1.0, adaptive=AdaptiveClip(1.0)), "sigma_b: 1.0 given"),
        (lambda: AdaptiveClip(1.0, gamma=1.5), "gamma"),
        (lambda: AdaptiveClip(-1.0), "sigma_b"),
    ],
)
def test_bad_knobs_are_named(make, names):
    with pytest.raises(InputError, match=names):
        make()


def test_both_are_found_by_name_and_keep_the_contract():
    assert catalogue.find("mechanism", "DP-FedAvg") is DPFedAvg
    assert catalogue.find("mechanism", "local_dp") is LocalDP
    assert isinstance(DPFedAvg(1.0, 1.0), Mechanism) and DPFedAvg(1.0, 1.0).where == "central"
    assert isinstance(LocalDP(1.0, 1.0), Mechanism) and LocalDP(1.0, 1.0).where == "local"
