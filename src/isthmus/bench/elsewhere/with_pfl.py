"""The round in pfl-research (Granqvist et al., arXiv:2404.06430), simulated."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import logging
import os
import sys
import time
from itertools import pairwise
from typing import Any


def main(path: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    import numpy as np
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel
    from torch import nn

    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    np.random.seed(0)
    work = {name: torch.as_tensor(x) for name, x in np.load(path).items()}
    starts = work["starts"].tolist()
    data = [(work["x"][a:b], work["y"][a:b]) for a, b in pairwise(starts)]
    (wide, pixels), classes = work["w1"].shape, len(work["w2"])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(pixels, wide), nn.ReLU(), nn.Linear(wide, classes))

        def loss(self, x: Any, y: Any, eval: bool = False) -> Any:
            return nn.functional.cross_entropy(self.net(x), y)

        def metrics(self, x: Any, y: Any, eval: bool = False) -> dict[str, Any]:
            return {}

    net = Net()
    with torch.no_grad():
        for p, name in zip(net.parameters(), ("w1", "b1", "w2", "b2"), strict=True):
            p.copy_(work[name])
    first = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))

    def dataset(user: int) -> Any:
        """In an order of its own at each visit, as every one of the libraries does."""
        x, y = data[user]
        order = torch.from_numpy(np.random.permutation(len(x)))
        return PyTorchTensorDataset((x[order], y[order]), user_id=str(user))

    cohort = int(work["cohort"])
    users: list[int] = []

    def sampler() -> int:
        """Without replacement within a round; its own sampler draws with it."""
        if not users:
            users.extend(np.random.choice(len(data), cohort, replace=False).tolist())
        return users.pop()

    backend = SimulatedBackend(
        training_data=FederatedDataset(dataset, sampler),
        val_data=FederatedDataset(dataset, sampler),
        postprocessors=[WeightByDatapoints()],
    )
    train = NNTrainHyperParams(
        local_num_epochs=1,
        local_learning_rate=float(work["lr"]),
        local_batch_size=int(work["batch"]),
    )
    algorithm, done = FederatedAveraging(), 0
    for line in sys.stdin:
        done += int(line)
        plan = NNAlgorithmParams(
            central_num_iterations=done,
            evaluation_frequency=10**9,
            train_cohort_size=cohort,
            val_cohort_size=0,
        )
        start = time.perf_counter()
        model = algorithm.run(
            plan,
            backend,
            model,
            train,
            NNEvalHyperParams(local_batch_size=None),
            send_metrics_to_platform=False,
        )
        seconds = time.perf_counter() - start
        with torch.no_grad():
            right = float((net.net(work["test_x"]).argmax(1) == work["test_y"]).float().mean())
            norm = float((nn.utils.parameters_to_vector(net.parameters()) - first).norm())
        print(json.dumps({"seconds": seconds, "accuracy": right, "moved": norm}), file=answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
