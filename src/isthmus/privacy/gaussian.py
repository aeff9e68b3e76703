"""The Gaussian mechanism: clip what a client sends to norm S, add normal noise of std sigma S.

*Central* (DP-FedAvg: McMahan, Ramage, Talwar and Zhang, "Learning Differentially Private
Recurrent Language Models", ICLR 2018, arXiv:1710.06963, Algorithm 1 with the fixed-denominator
estimator). Clients are sampled with rate q from N; the trusted server forms

    u = ( sum_i clip(u_i, S) + Normal(0, (sigma S)^2) ) / (q N) .

The divisor is the expected cohort q N, never the realised one, and no client counts for more
than another; so the mean's weights are 1/(qN) (`weight`), a client moves the sum by at most S,
and a round with an empty cohort is noised and counted like any other.

*Local*: each client adds Normal(0, (sigma S)^2) to its own clipped upload before it leaves. Any
two uploads of one client may then be exchanged for one another, which moves it by up to 2S; its
event is therefore `replace-one`, without amplification by sampling.

The norm is joint: over all fields that go up together, because they are released together.

*Adaptive clip* (Andrew, Thakkar, McMahan and Ramaswamy, "Differentially Private Learning with
Adaptive Clipping", NeurIPS 2021, arXiv:1905.03871, Algorithm 1): the server also learns a noisy
share b of clients whose upload was within S, and moves S towards the gamma-quantile of the norms,

    S <- S exp(-eta (b - gamma)) ,   b = 1/2 + ( sum_i (b_i - 1/2) + Normal(0, sigma_b^2) ) / (qN) .

A centred bit moves its sum by 1/2, so both releases of a round together are one Gaussian release
of multiplier sigma when the uploads get sigma_u = (sigma^-2 - (2 sigma_b)^-2)^(-1/2) (Theorem 1).
The event names sigma: the budget of b is in it.

Noise in a simulation is a function of the key. With `real=True` all its bits come from the
operating system. Samples are floating-point numbers, whose lowest bits a determined observer may
exploit (Mironov, CCS 2012).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from isthmus import catalogue, seeds
from isthmus.contracts import Noised
from isthmus.errors import InputError, unknown
from isthmus.privacy.clip import clip_rows, norms
from isthmus.tree import Tree

SAMPLINGS = ("none", "poisson", "without-replacement")


@dataclass(frozen=True)
class AdaptiveClip:
    """How the clip bound follows the norms: quantile `gamma`, step `eta`, noise `sigma_b` on b.

    `sigma_b` is in clients; the paper takes one twentieth of the expected cohort.
    """

    sigma_b: float
    gamma: float = 0.5
    eta: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise InputError("adaptive-clip.gamma", self.gamma, "a quantile from 0 to 1")
        if not self.sigma_b >= 0.0:
            raise InputError("adaptive-clip.sigma_b", self.sigma_b, "0 or more")

    def upload_multiplier(self, sigma: float) -> float:
        """sigma_u: the multiplier left for the uploads out of a total of `sigma`."""
        if sigma == 0.0:
            return 0.0
        if 2.0 * self.sigma_b <= sigma:
            raise InputError("adaptive-clip.sigma_b", self.sigma_b, f"more than {sigma / 2:g}")
        return (sigma**-2 - (2.0 * self.sigma_b) ** -2) ** -0.5


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise of std `noise_multiplier * clip` on uploads, locally or on their sum.

    `population` (N) and `rate` (q) describe the cohort of a central mechanism; `sampling` is how
    clients are really chosen, on which the guarantee rests: `poisson`, `without-replacement`
    (cohorts of fixed size) or `none` (no amplification claimed). `noise_multiplier=0` with
    `clip=inf` leaves every bit as it is.
    """

    noise_multiplier: float
    clip: float
    where: Literal["local", "central"] = "central"
    population: int = 1
    rate: float = 1.0
    sampling: str = "none"
    adaptive: AdaptiveClip | None = None
    real: bool = False

    def __post_init__(self) -> None:
        sigma = self.noise_multiplier
        if not 0.0 <= sigma < math.inf:
            raise InputError("privacy.noise_multiplier", sigma, "0 or more")
        if not self.clip > 0.0 or (math.isinf(self.clip) and sigma > 0.0):
            raise InputError("privacy.clip", self.clip, "a positive bound (inf only without noise)")
        if self.where not in ("local", "central"):
            raise unknown("privacy.where", self.where, ("local", "central"))
        if self.sampling not in SAMPLINGS:
            raise unknown("privacy.sampling", self.sampling, SAMPLINGS)
        if self.population < 1:
            raise InputError("privacy.population", self.population, "1 or more")
        if not 0.0 < self.rate <= 1.0:
            raise InputError("privacy.rate", self.rate, "above 0, up to 1")
        if self.adaptive is not None:
            if self.where == "local" or math.isinf(self.clip):
                raise InputError("adaptive-clip", self.where, "central noise and a finite clip")
            self.adaptive.upload_multiplier(sigma)

    @property
    def weight(self) -> float:
        """1/(qN): the weight of every upload in the sum that `central` noises."""
        return 1.0 / (self.rate * self.population)

    def clipped(self, tensors: Mapping[str, Tensor]) -> Tree:
        """Stacked uploads `[n, *shape]`, each at joint norm at most `clip`."""
        return clip_rows(tensors, self.clip)

    def local(self, tensors: Mapping[str, Tensor], keys: np.ndarray) -> Noised:
        """Stacked uploads, clipped, each with noise of its own key (int64 `[n]`).

        The event is what each of the n clients spends.
        """
        bounded = self.clipped(tensors)
        std = self._std(self.noise_multiplier)
        if std:
            own = torch.from_numpy(np.asarray(keys, dtype=np.int64))
            bounded = {name: x + std * self._noise(own, name, x) for name, x in bounded.items()}
        return Noised(bounded, self._event("replace-one", "none"))

    def central(self, total: Mapping[str, Tensor], key: int) -> Noised:
        """The sum of clipped uploads, each times `weight`, with noise of std sigma S `weight`."""
        sigma = self.noise_multiplier
        if self.adaptive is not None:
            sigma = self.adaptive.upload_multiplier(sigma)
        std = self._std(sigma) * self.weight
        noised = dict(total)
        if std:
            own = torch.tensor([key], dtype=torch.int64)
            for name, x in total.items():
                noised[name] = x + std * self._noise(own, name, x.unsqueeze(0))[0]
        adjacency = "replace-one" if self.sampling == "without-replacement" else "add-remove"
        return Noised(noised, self._event(adjacency, self.sampling))

    def adapted(self, tensors: Mapping[str, Tensor], key: int) -> Gaussian:
        """The mechanism of the next round, its bound moved by the stacked uploads of this one.

        `tensors` are the uploads before clipping. Without `adaptive` it is the same mechanism.
        """
        if self.adaptive is None:
            return self
        within = (norms(tensors) <= self.clip).double() - 0.5
        own = torch.tensor([key], dtype=torch.int64)
        noise = self._noise(own, "adaptive-clip", torch.zeros(1, 1, dtype=torch.float64))
        total = within.sum() + self.adaptive.sigma_b * noise[0, 0]
        share = 0.5 + float(total) * self.weight
        bound = self.clip * math.exp(-self.adaptive.eta * (share - self.adaptive.gamma))
        return replace(self, clip=bound)

    def _std(self, sigma: float) -> float:
        return sigma * self.clip if sigma else 0.0

    def _event(self, adjacency: str, sampling: str) -> dict[str, Any]:
        return {
            "mechanism": "gaussian",
            "parameters": {"noise_multiplier": self.noise_multiplier},
            "sampling": {"kind": "none"}
            if sampling == "none"
            else {"kind": sampling, "rate": self.rate},
            "adjacency": adjacency,
            "unit": "client",
            "count": 1,
        }

    def _noise(self, keys: Tensor, name: str, like: Tensor) -> Tensor:
        """Standard normal noise `[n, *shape]`, row i from key i and the field's name."""
        if self.real:
            return system_normal(like.shape).to(like.dtype)
        own = torch.as_tensor(seeds.fold(keys, seeds.key(name)))
        shape = like.shape[1:]
        return torch.stack([seeds.normal(k, shape, like.dtype) for k in own])


@catalogue.register("dp-fedavg", place="mechanism", status="verified")
@dataclass(frozen=True)
class DPFedAvg(Gaussian):
    """The central mechanism: cohorts drawn by Poisson sampling, unless said otherwise."""

    where: Literal["local", "central"] = field(default="central", init=False)
    sampling: str = "poisson"


@catalogue.register("local-dp", place="mechanism", status="verified")
@dataclass(frozen=True)
class LocalDP(Gaussian):
    """The local mechanism: noise before the upload leaves its client."""

    where: Literal["local", "central"] = field(default="local", init=False)


def system_normal(shape: tuple[int, ...]) -> Tensor:
    """Standard normal draws, float64, every bit from the operating system (Box and Muller)."""
    count = math.prod(shape)
    raw = np.frombuffer(os.urandom(16 * count), dtype=np.uint64).reshape(2, count) >> np.uint64(11)
    radius, angle = (raw.astype(np.float64) + 0.5) * 2.0**-53
    draws = np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle)
    return torch.from_numpy(draws).view(shape)
