"""Local learning on Transformers: modules trained apart, each reconstructing what came into it.

Pathak, Zhang and Samaras, "Local learning on transformers via feature reconstruction", 2022,
arXiv:2212.14215. Claim (Swin-Tiny on CIFAR-10, CIFAR-100, STL-10, SVHN, three kinds of decoder):
up to 0.58 % above InfoPro-Transformer with up to 12 % less memory; against end-to-end training
36 % less memory with two modules and 45 % with four.

    h_0: embedded tokens;   h_k = M_k(h_{k-1}),  no gradient crosses a border
    loss_k = l1(k) mse(dec_k(h_k), h_{k-1}) + l2(k) CE(aux_k(h_k), y)      k < K
    loss_K = the task's loss at the head
    backward at once in every module; one update after all K

The coefficients go linearly from those of module 1 to those of module K - 1, as in the code of
InfoPro. (Reconstructed:) their values; the target as a constant, normalised per token so that it
cannot be made small; the decoders (per token linear or two linear layers, two convolutions on the
token grid, one Transformer block). `target` none is greedy learning (Belilovsky, Eickenberg and
Oyallon, ICML 2019). Decoders and auxiliary heads stay with the client unless `share` is set, and
take no part in predicting. A net without tokens has its widths in place of tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.federated.method import Knobs, Method
from isthmus.learn import forward, modules
from isthmus.learn.modules import Border, Part
from isthmus.learn.phase import Carry
from isthmus.models import layerwise
from isthmus.models.factors import Places
from isthmus.models.nets import initialise
from isthmus.models.vit import Block, Patches
from isthmus.tasks.contract import Batch, Role, weighted_mean

OWN, COMMON = "auxiliary.own.", "auxiliary.common."
CONTRAST = 128
"""Width in which a contrastive auxiliary head compares items."""


class Settings(Knobs):
    """K: modules, at most one a block; target: what dec_k reconstructs; decoder: its kind;
    first, last: (l1, l2) of module 1 and of module K - 1; auxiliary: the loss of aux_k, with
    tau the temperature of the contrastive one; normalise: the target per token; share: send
    decoders and auxiliary heads too.
    """

    K: int = Field(default=4, ge=1)
    target: Literal["features", "pixels", "none"] = "features"
    decoder: Literal["linear", "mlp", "conv", "transformer"] = "mlp"
    first: tuple[float, float] = (5.0, 0.5)
    last: tuple[float, float] = (1.0, 1.0)
    auxiliary: Literal["classes", "contrastive"] = "classes"
    tau: float = Field(default=0.07, gt=0.0)
    normalise: bool = True
    share: bool = False


@catalogue.register("local-learning", place="method", status="miniature")
class LocalLearning(Method):
    """Overrides L, whose gradient in each module is that of the module's own loss."""

    Settings = Settings

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        return with_auxiliary(module, knobs, seed)

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return {name: "local" if name.startswith(OWN) else role for name, role in given.items()}

    def loss(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        value, aux, grads = self.learn(model, batch)
        return layerwise.handed(model, grads, value), aux

    def learn(
        self, model: Any, batch: Batch, gradient: modules.Gradient = modules.functional
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The last module's loss, what is logged, and every module's own gradient."""
        cut = modules.parts(model, self.knobs.K)
        names = modules.names_of(model, cut, self.prefix)
        pixels: list[Tensor] = []

        def seen(outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return self.stage.loss(lambda x: (pixels.append(x), outputs(x))[1], batch)

        def local(border: Border) -> tuple[Tensor, dict[str, Tensor]]:
            return self.local_loss(border, pixels[-1], batch, len(cut))

        return modules.learn(seen, local, model, batch, cut, names, gradient)

    def prefix(self, k: int) -> str:
        return f"{COMMON if self.knobs.share else OWN}{k}."

    def local_loss(
        self, border: Border, x: Tensor, batch: Batch, count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """loss_k of module k + 1 of `count`."""
        k, model, before, after = border
        own = (model.auxiliary.common if self.knobs.share else model.auxiliary.own)[k]
        l1, l2 = self.coefficients(k, count)
        pooled = after.mean(1) if after.ndim == 3 else after
        said = own.head(pooled)
        if self.knobs.auxiliary == "contrastive":
            each = contrastive(said, forward.labels(batch), batch.weight, self.knobs.tau)
            value = weighted_mean(each, batch.weight)
        else:
            value, _ = self.stage.loss(lambda x: said, batch)
        if self.knobs.target == "none":
            return l2 * value, {}
        made = own.decoder(after)
        if self.knobs.target == "pixels":
            embed = model.features[0]
            real = embed.cut(x) if isinstance(embed, Patches) else x.flatten(1)
            each = F.softplus(made) - real * made  # cross-entropy of pixels in [0, 1]
        else:
            real = F.layer_norm(before, before.shape[-1:]) if self.knobs.normalise else before
            each = (made - real).square()
        missed = weighted_mean(each, batch.weight)
        return l1 * missed + l2 * value, {"reconstruction": missed}

    def coefficients(self, k: int, count: int) -> tuple[float, float]:
        """(l1, l2) of module k + 1."""
        at = k / (count - 2) if count > 2 else 0.0
        (a, b), (c, d) = self.knobs.first, self.knobs.last
        return a + at * (c - a), b + at * (d - b)


def contrastive(z: Tensor, y: Tensor, weight: Tensor, tau: float) -> Tensor:
    """Supervised contrastive loss of each item `[b]` (Khosla et al., NeurIPS 2020, L_out).

    Items count `weight` times as partners; one without a partner of its class has loss 0.
    """
    z = F.normalize(z, dim=1)
    others = weight * (1.0 - torch.eye(len(y), dtype=weight.dtype, device=weight.device))
    scores = z @ z.mT / tau
    shifted = scores - scores.amax(1, keepdim=True).detach()
    total = (others * shifted.exp()).sum(1, keepdim=True)
    tiny = torch.finfo(total.dtype).tiny
    same = others * (y[:, None] == y).to(weight.dtype)
    many = same.sum(1)
    each = (same * (total.clamp_min(tiny).log() - shifted)).sum(1)
    return each / torch.where(many > 0, many, torch.ones_like(many))


class Grid(nn.Module):
    """Two convolutions on the grid that the tokens `[b, n, width]` come from."""

    def __init__(self, grid: int, width: int, out: int) -> None:
        super().__init__()
        self.grid = grid
        self.near, self.out = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, out, 1)

    def forward(self, h: Tensor) -> Tensor:
        b, n, width = h.shape
        picture = h.mT.reshape(b, width, self.grid, n // self.grid)
        return self.out(F.gelu(self.near(picture))).flatten(2).mT


def with_auxiliary(module: Any, knobs: Settings, seed: int) -> nn.Module:
    """The module with a decoder and an auxiliary head for every module but the last."""
    cut = modules.parts(module, knobs.K)
    with torch.device("meta"):
        made = [_auxiliary(module, knobs, cut, k) for k in range(len(cut) - 1)]
        held = nn.ModuleDict({"common" if knobs.share else "own": nn.ModuleList(made)})
    if made:
        like = module.head.weight
        drawn = initialise(held.to_empty(device=like.device), seed)
        module.auxiliary = drawn.to(like.dtype)
    return module


def _auxiliary(module: Any, knobs: Settings, cut: list[Part], k: int) -> nn.ModuleDict:
    features = dict(module.features.named_children())
    embed = module.features[0]
    if isinstance(embed, Patches):
        width, out = embed.width, embed.values if knobs.target == "pixels" else embed.width
    else:
        dense = [features[name] for part in cut for name in part.body]
        if not any(isinstance(x, nn.Linear) for x in dense) or any(
            isinstance(x, nn.Conv2d) for x in dense
        ):
            raise InputError("method", "convolutions", "a Transformer or a dense net")
        mine = [x for name in cut[k].body if isinstance(x := features[name], nn.Linear)]
        first = next(x for x in dense if isinstance(x, nn.Linear))
        width = mine[-1].out_features
        out = (first if knobs.target == "pixels" else mine[0]).in_features
    classes = CONTRAST if knobs.auxiliary == "contrastive" else module.head.out_features
    held: OrderedDict[str, nn.Module] = OrderedDict(head=_two(width, classes))
    if knobs.target != "none":
        held["decoder"] = _decoder(module, knobs.decoder, width, out)
    return nn.ModuleDict(held)


def _decoder(module: Any, kind: str, width: int, out: int) -> nn.Module:
    embed = module.features[0]
    if kind == "linear":
        return nn.Linear(width, out)
    if kind == "mlp":
        return _two(width, out)
    if not isinstance(embed, Patches):
        raise InputError("settings.decoder", kind, "linear, mlp for a net without tokens")
    if kind == "conv":
        return Grid(embed.grid, width, out)
    return nn.Sequential(Block(width, module.features.block0.heads), nn.Linear(width, out))


def _two(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))
