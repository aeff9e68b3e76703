"""Local learning on Transformers: near end-to-end accuracy in a fraction of its memory.

Paper (arXiv 2212.14215): Swin-Tiny in local modules that reconstruct their own input features:
36 % less memory than end-to-end training with two modules and 45 % less with four, accuracy up to
0.58 % above that of InfoPro-Transformer with up to 12 % less memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.claims.claim import Check, Progress
from isthmus.federated.method import Local
from isthmus.federated.methods.local_learning import LocalLearning, Settings, with_auxiliary
from isthmus.learn import modules
from isthmus.models import optim
from isthmus.models.vit import vit
from isthmus.run.api import Run, train
from isthmus.tasks.contract import Batch, Size
from isthmus.tasks.digits import Digits

BELOW = {2: 0.62, 4: 0.38}
TARGETS = ("features", "pixels", "none")
EPOCHS, NEAR = 10, 0.05


class Patched(Digits):
    """Digits as 16 patches of 2 x 2 pixels, for a Transformer of width 32."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def build(self, size: Size = "small", seed: int = 0) -> nn.Module:
        return vit(8, 2, 32, self.depth, 10, seed)


class Saved:
    """Counts the bytes that autograd holds for backward passes to come, parameters not."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.mine = {p.untyped_storage().data_ptr() for p in parameters}
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, x: Tensor) -> Held:
        at = x.untyped_storage().data_ptr()
        return Held(x, self, 0 if at in self.mine else at)

    def watch(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.x)


class Held:
    """A saved tensor; one that is saved several times counts once."""

    def __init__(self, x: Tensor, saved: Saved, at: int) -> None:
        self.x = x
        if at:
            size = x.untyped_storage().nbytes()
            if not saved.held.get(at):
                saved.now += size
                saved.peak = max(saved.peak, saved.now)
            saved.held[at] = saved.held.get(at, 0) + 1
            weakref.finalize(self, _released, saved, at, size)


def _released(saved: Saved, at: int, size: int) -> None:
    saved.held[at] -= 1
    if not saved.held[at]:
        saved.now -= size


def peak(knobs: Settings, items: int = 64) -> int:
    """Peak bytes saved in one step of `items` digits."""
    task = Patched(8)
    net = with_auxiliary(task.build(), knobs, 0)
    stage = task.stages()[0]
    method = LocalLearning(Local(optim.sgd()), stage, names=None, knobs=knobs)  # type: ignore[arg-type]
    columns = task.synthesise().train.take(range(items)).columns
    saved = Saved(net.parameters())
    with saved.watch():
        method.learn(net, Batch(columns, torch.ones(items)), modules.plain)
    return saved.peak


def trained(depth: int, method: str, seed: int, **knobs: Any) -> Run:
    return train(
        Patched(depth), method, seed=seed, clients=1, partition="iid", rounds=1, epochs=EPOCHS,
        batch=32, optimiser="adamw", lr=2e-3, evaluate=0, executor="sequential", settings=knobs,
    )  # fmt: skip


def reconstructed(run: Run) -> tuple[float, float]:
    """How far the decoders are from their targets on test items, and how far the mean target is."""
    model: Any = run.model
    h = run.task.synthesise(run.config.seed).test.columns["x"]
    missed, spread = [], []
    with torch.no_grad():
        for k, part in enumerate(modules.parts(model, 4)[:-1]):
            before = part.enter(model, h)
            h = part.work(model, before)
            target = F.layer_norm(before, before.shape[-1:])
            made = model.auxiliary.common[k].decoder(h)
            missed.append(float((made - target).square().mean()))
            spread.append(float((target - target.mean(0)).square().mean()))
    return mean(missed), mean(spread)


def claim(progress: Progress) -> list[Check]:
    """Memory of one step, accuracy, and that the decoders decode."""
    progress("memory")
    whole = peak(Settings(K=1))
    share = {(k, t): peak(Settings(K=k, target=t)) / whole for k in BELOW for t in TARGETS}
    checks = [
        Check(
            f"memory with {k} modules",
            f"{paper} % less than end to end",
            f"{share[k, 'features']:.3f} of end to end ({BELOW[k]} allowed), "
            f"pixels {share[k, 'pixels']:.3f}, greedy {share[k, 'none']:.3f}",
            share[k, "features"] <= BELOW[k],
        )
        for k, paper in ((2, 36), (4, 45))
    ]
    found: dict[str, float] = {}
    for name, method, knobs in (
        ("end to end", "fedavg", {}),
        ("features", "local-learning", {"share": True}),
        ("greedy", "local-learning", {"target": "none"}),
    ):
        progress(name)
        run = trained(4, method, 0, **knobs)
        found[name] = run.accuracy
        if name == "features":
            missed, spread = reconstructed(run)
            checks.append(
                Check(
                    "decoders know their module's input",
                    "features are reconstructed",
                    f"squared error {missed:.3f}, of the mean feature {spread:.3f}",
                    missed < 0.5 * spread,
                )
            )
    here = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    near = found["features"] >= found["end to end"] - NEAR
    said = f"{here} ({NEAR} below end to end allowed)"
    return [*checks, Check("accuracy", "near end to end", said, near)]
