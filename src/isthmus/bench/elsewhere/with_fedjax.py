"""The round in FedJAX (Ro, Suresh and Wu, arXiv:2108.02117): its `fed_avg`, clients under jit.

Its last batch of an epoch is filled up with items drawn again, where the others' is shorter.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main(path: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    import fedjax
    import haiku as hk
    import jax
    import jax.numpy as jnp
    import numpy as np

    work = dict(np.load(path))
    sizes, starts = np.diff(work["starts"]), work["starts"]
    data = fedjax.InMemoryFederatedData(
        {
            i: {"x": work["x"][a : a + n], "y": work["y"][a : a + n]}
            for i, (a, n) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=False))
        }
    )
    wide, classes = work["w1"].shape[0], work["w2"].shape[0]
    net = hk.transform(lambda batch: hk.nets.MLP([wide, classes])(batch["x"]))

    def loss(batch: Any, logits: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1)[:, 0]

    sample = {"x": work["x"][:1], "y": work["y"][:1]}
    model = fedjax.create_model_from_haiku(net, sample, loss)
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(float(work["lr"])),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=int(work["batch"])),
    )
    sampler = fedjax.client_samplers.UniformGetClientSampler(data, int(work["cohort"]), seed=0)
    first = {
        f"mlp/~/linear_{i}": {"w": jnp.asarray(work[f"w{i + 1}"].T), "b": work[f"b{i + 1}"]}
        for i in range(2)
    }
    made = jax.tree_util.tree_structure(model.init(jax.random.PRNGKey(0)))
    assert made == jax.tree_util.tree_structure(first), made
    state = algorithm.init(first)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            state, _ = algorithm.apply(state, sampler.sample())
        jax.block_until_ready(state.params)
        seconds = time.perf_counter() - start
        logits = model.apply_for_eval(state.params, {"x": work["test_x"]})
        right = float((np.asarray(logits).argmax(1) == work["test_y"]).mean())
        moved = jax.tree_util.tree_map(lambda a, b: a - b, state.params, first)
        norm = sum(float((d**2).sum()) for d in jax.tree_util.tree_leaves(moved)) ** 0.5
        print(json.dumps({"seconds": seconds, "accuracy": right, "moved": norm}), file=answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
