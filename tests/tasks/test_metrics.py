from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, mean_absolute_error, r2_score

from isthmus import seeds
from isthmus.tasks import metrics


def _once(metric, outputs, y, weight):
    return metric.finish(metric.update(metric.init(), outputs, {"y": y}, weight))


def test_accuracy_and_loss_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    got = _once(
        metrics.Accuracy(), probabilities.log(), torch.tensor([0, 2, 2]), torch.tensor([1.0, 2, 4])
    )
    assert got["accuracy"] == pytest.approx(5 / 7)
    nats = -(math.log(0.5) + 2 * math.log(0.3) + 4 * math.log(0.4)) / 7
    assert got["loss"] == pytest.approx(nats, rel=1e-6)


def test_macro_f1_equals_scikit_learn_with_weights_and_an_absent_class() -> None:
    rng = np.random.default_rng(1)
    y, said = rng.choice([0, 1, 2, 4], 60), rng.choice([0, 1, 2, 4], 60, p=[0.5, 0.2, 0.2, 0.1])
    weight = rng.integers(0, 4, 60).astype(float)
    logits = torch.nn.functional.one_hot(torch.tensor(said), 5).float()
    got = _once(metrics.MacroF1(5), logits, torch.tensor(y), torch.tensor(weight))
    expected = f1_score(y, said, average="macro", sample_weight=weight, labels=[0, 1, 2, 4])
    assert got["f1"] == pytest.approx(expected, rel=1e-12)
    assert got["accuracy"] == pytest.approx(np.average(y == said, weights=weight))


def test_the_confusion_has_targets_in_rows() -> None:
    metric = metrics.MacroF1(3)
    logits = torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]])
    state = metric.update(
        metric.init(), logits, {"y": torch.tensor([1, 2])}, torch.tensor([5.0, 7])
    )
    assert state["confusion"].tolist() == [[0, 0, 0], [0, 0, 5], [0, 0, 7]]


def test_f1_of_clients_is_not_averaged() -> None:
    """Two clients with one class each: their mean F1 is 1/2, the F1 of the union is 1/3."""
    metric, logits = metrics.MacroF1(2), torch.tensor([[1.0, 0.0]])
    one, two = (
        metric.update(metric.init(), logits, {"y": torch.tensor([y])}, torch.ones(1))
        for y in (0, 1)
    )
    assert (metric.finish(one)["f1"] + metric.finish(two)["f1"]) / 2 == 0.5
    assert metric.finish(metric.merge(one, two))["f1"] == pytest.approx(1 / 3)


def test_perplexity_counts_tokens_not_rows() -> None:
    vocabulary = 6
    y = torch.tensor([[1, 2, 3], [4, -100, -100]])
    uniform = torch.zeros(2, 3, vocabulary)
    got = _once(metrics.Perplexity(), uniform, y, torch.tensor([1.0, 1.0]))
    assert got["perplexity"] == pytest.approx(vocabulary)
    sure = uniform.clone()
    sure[1, 0, 4] = 1000.0
    got = _once(metrics.Perplexity(), sure, y, torch.tensor([1.0, 2.0]))
    assert got["loss"] == pytest.approx(3 * math.log(vocabulary) / 5)
    assert got["accuracy"] == pytest.approx(2 / 5)


def test_regression_equals_scikit_learn() -> None:
    draw = seeds.generator(2)
    y = torch.randn(40, 1, generator=draw) + 3
    said, weight = y + torch.randn(40, 1, generator=draw), torch.rand(40, generator=draw)
    got = _once(metrics.Regression(), said.squeeze(1), y, weight)
    a, b, w = y.numpy(), said.numpy(), weight.numpy()
    assert got["r2"] == pytest.approx(r2_score(a, b, sample_weight=w), rel=1e-6)
    assert got["mae"] == pytest.approx(mean_absolute_error(a, b, sample_weight=w), rel=1e-6)
    error = np.average((a - b)[:, 0] ** 2, weights=w)
    assert got["rmse"] == pytest.approx(math.sqrt(error), rel=1e-6)


def test_a_loss_of_your_own_is_averaged_over_items() -> None:
    metric = metrics.Loss(lambda outputs, targets: (outputs - targets["y"]).abs())
    got = _once(metric, torch.tensor([[1.0, 3], [5, 5]]), torch.zeros(2, 2), torch.tensor([3.0, 1]))
    assert got == {"loss": pytest.approx((3 * 2 + 5) / 4)}


EVERY = [
    (metrics.Accuracy(), False),
    (metrics.MacroF1(4), False),
    (metrics.Perplexity(), False),
    (metrics.Regression(), True),
    (metrics.Loss(lambda outputs, targets: outputs.mean(1) * (1.0 + targets["y"])), True),
]


@pytest.mark.parametrize(("metric", "real"), EVERY, ids=lambda m: type(m).__name__)
def test_update_runs_under_vmap_and_changes_nothing(metric, real) -> None:
    draw = seeds.generator(3)
    outputs = torch.randn(2, 5, 4, generator=draw)
    y = outputs + 1 if real else torch.randint(0, 4, (2, 5), generator=draw)
    y = y.mean(-1, keepdim=True).expand(2, 5, 4) if real else y
    if isinstance(metric, metrics.Loss):
        y = y[..., 0]
    weight, zero = torch.rand(2, 5, generator=draw), metric.init()
    together = torch.vmap(lambda o, t, w: metric.update(zero, o, {"y": t}, w))(outputs, y, weight)
    for i in range(2):
        alone = metric.update(zero, outputs[i], {"y": y[i]}, weight[i])
        for name in alone:
            torch.testing.assert_close(together[name][i], alone[name])
    assert all(not x.any() for x in zero.values())


@pytest.mark.parametrize(("metric", "real"), EVERY, ids=lambda m: type(m).__name__)
def test_no_items_finish_as_nan(metric, real) -> None:
    values = metric.finish(metric.init())
    assert metric.primary in values and all(math.isnan(v) for v in values.values())
