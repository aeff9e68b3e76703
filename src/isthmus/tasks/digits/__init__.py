"""Handwritten digits: 1797 pictures of 8 x 8 pixels, ten classes, offline.

The data set is the test half of Alpaydin and Kaynak, "Optical Recognition of Handwritten
Digits" (UCI Machine Learning Repository, 1998, doi:10.24432/C50P49), which scikit-learn
carries. `load` reads the repository's own files, `optdigits.tes` and beside it, when present,
`optdigits.tra` (3823 more).

The files were written by 13 and 30 people but do not say who wrote which line: `group` is the
block of consecutive lines, 13 (and 30) blocks of equal length standing for the writers
(reconstructed).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from isthmus import catalogue, seeds
from isthmus.errors import InputError
from isthmus.models.nets import cnn, mlp
from isthmus.tasks.contract import Card, Size, Stage, Task, data_file, data_root
from isthmus.tasks.items import Batch, Items, Splits, weighted_mean
from isthmus.tasks.losses import cross_entropy
from isthmus.tasks.metrics import Accuracy

TEST, TRAIN = "digits/optdigits.tes", "digits/optdigits.tra"
WRITERS = {TEST: 13, TRAIN: 30}


@catalogue.register("digits", place="task", status="verified")
class Digits(Task):
    """Columns `x` `[1, 8, 8]` in [0, 1] and `y` (0 to 9); 70 % train, 10 % val, 20 % test.

    `tiny` takes 600 of the pictures, `small` and `paper` all; the model is an MLP 64-32-10, for
    `paper` a convolution net.
    """

    card = Card(
        "digits",
        source="UCI Optical Recognition of Handwritten Digits, doi:10.24432/C50P49",
        licence="CC BY 4.0",
    )
    metric = Accuracy()

    def synthesise(self, seed: int = 0, size: Size = "small") -> Splits:
        """scikit-learn's copy, split by `seed`."""
        x, y = _packaged()
        return _split(_items(x, y, TEST), seed, 600 if size == "tiny" else None)

    def load(self, root: str | Path | None = None, seed: int = 0) -> Splits:
        """The files under `root`/digits: lines of 64 counts (0 to 16) and the class."""
        parts = [_items(*_lines(data_file(root, TEST)), TEST)]
        more = data_root(root) / TRAIN
        if more.exists():
            parts.append(_items(*_lines(more), TRAIN))
        columns = {name: torch.cat([p.columns[name] for p in parts]) for name in ("x", "y")}
        groups = [group for part in parts for group in part.group]
        return _split(Items(columns, groups, ["digits"] * len(groups)), seed)

    def export_real(self, root: str | Path) -> Path:
        """Write scikit-learn's copy in the repository's format; returns the file."""
        x, y = _packaged()
        path = Path(root) / TEST
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savetxt(path, np.column_stack([x.reshape(len(x), -1), y]), fmt="%d", delimiter=",")
        return path

    def build(self, size: Size = "small", seed: int = 0) -> nn.Module:
        return cnn([16, 32], 10, seed) if size == "paper" else mlp([64, 32, 10], seed=seed)

    def stages(self) -> list[Stage]:
        return [Stage("train", self.loss, optimiser="sgd", lr=0.1, batch_size=10, epochs=5)]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy (nats)."""
        outputs = self.predict(model, self.inputs(batch.columns))
        return weighted_mean(cross_entropy(outputs, batch["y"]), batch.weight), {}


def _packaged() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pictures, classes = load_digits(return_X_y=True)
    return np.asarray(pictures), np.asarray(classes)


def _lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        table = np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError as error:
        raise InputError(path.name, error, "lines of 65 integers") from None
    if table.shape[1] != 65:
        raise InputError(path.name, f"{table.shape[1]} columns", "lines of 65 integers")
    return table[:, :64], table[:, 64]


def _items(x: np.ndarray, y: np.ndarray, file: str) -> Items:
    """Pictures `[n, 64]` in file order, with the blocks of lines that stand for writers."""
    pictures = torch.from_numpy((x / 16.0).astype(np.float32)).view(-1, 1, 8, 8)
    word = "tes" if file == TEST else "tra"
    group = [f"{word}-{i * WRITERS[file] // len(x):02d}" for i in range(len(x))]
    classes = torch.from_numpy(y.astype(np.int64))
    return Items({"x": pictures, "y": classes}, group, ["digits"] * len(x))


def _split(items: Items, seed: int, take: int | None = None) -> Splits:
    order = seeds.rng(seed, "digits", "split").permutation(len(items))[:take]
    train, val, test = np.split(order, [len(order) * 7 // 10, len(order) * 8 // 10])
    return Splits(items.take(np.sort(train)), items.take(np.sort(val)), items.take(np.sort(test)))
