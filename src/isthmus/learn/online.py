"""A small layer that learns from a stream, on top of a network that stays as it is.

Ren, Anicic, Runkler, "TinyOL: TinyML with online-learning on microcontrollers", IJCNN 2021,
arXiv:2103.08295 (details reconstructed). Each sample is used once and forgotten:

    z = backbone(x);  mean and variance of z by Welford's update (Technometrics 1962);
    s = (z - mean) / sqrt(variance + eps);  predict W s + b first, which is the score;
    then, where there is a label, one step  W <- W - lr (softmax(W s + b) - y) s^T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.errors import InputError

EPS = 1e-5


class Online:
    """A softmax layer over K standardised features, with state that a stream does not lengthen.

    `backbone` maps a batch of inputs to features `[b, K]`; `observe` takes one input of it.

    >>> layer = Online(lambda x: x, features=2, classes=3, lr=0.5)
    >>> for label in (0, 2, 0, 2):
    ...     _ = layer.observe(torch.tensor([float(label), 1.0]), label)
    >>> layer.seen, layer.correct, layer.add_class()
    (4, 3, 3)
    """

    def __init__(
        self, backbone: Callable[[Tensor], Tensor], features: int, classes: int, lr: float = 0.05
    ) -> None:
        if features < 1 or classes < 1:
            raise InputError("online", f"{features} features, {classes} classes", "1 or more")
        if not lr > 0:
            raise InputError("lr", lr, "above 0")
        self.backbone, self.lr = backbone, lr
        self.weight, self.bias = torch.zeros(classes, features), torch.zeros(classes)
        self.mean, self.squares = torch.zeros(features), torch.zeros(features)
        self.count = self.seen = self.correct = 0

    @property
    def variance(self) -> Tensor:
        """Of the features seen so far, `[K]`, with divisor n; 1 before the second sample."""
        if self.count < 2:
            return torch.ones_like(self.squares)
        return self.squares / self.count

    @property
    def accuracy(self) -> float:
        """The prequential score: each sample was predicted before it was learned."""
        return self.correct / max(1, self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of all state: the layer and 2 K statistics."""
        held = (self.weight, self.bias, self.mean, self.squares)
        return sum(x.numel() * x.element_size() for x in held)

    def standard(self, z: Tensor) -> Tensor:
        """Features `[..., K]`, standardised by the statistics so far."""
        return (z - self.mean) / (self.variance + EPS).sqrt()

    def predict(self, x: Tensor) -> Tensor:
        """Logits `[..., C]` of inputs; changes nothing."""
        with torch.no_grad():
            return self.standard(self.backbone(x)) @ self.weight.T + self.bias

    def observe(self, x: Tensor, label: int | None = None) -> int:
        """Predict one sample, learn from it, and forget it: the class that was predicted.

        Without a label only the statistics move. Raises `InputError` for a class without a row.
        """
        if label is not None and not 0 <= label < len(self.bias):
            raise InputError("label", label, f"0 to {len(self.bias) - 1}, or add_class() first")
        with torch.no_grad():
            z = self.backbone(x[None])[0]
            self._count(z)
            s = self.standard(z)
            logits = self.weight @ s + self.bias
            said = int(logits.argmax())
            if label is not None:
                self.seen += 1
                self.correct += said == label
                slope = logits.softmax(0)
                slope[label] -= 1.0
                self.weight -= self.lr * torch.outer(slope, s)
                self.bias -= self.lr * slope
        return said

    def add_class(self) -> int:
        """A new row of zeros for a class that appears; its number."""
        self.weight = torch.cat([self.weight, torch.zeros(1, self.weight.shape[1])])
        self.bias = torch.cat([self.bias, torch.zeros(1)])
        return len(self.bias) - 1

    def _count(self, z: Tensor) -> None:
        self.count += 1
        apart = z - self.mean
        self.mean = self.mean + apart / self.count
        self.squares = self.squares + apart * (z - self.mean)
