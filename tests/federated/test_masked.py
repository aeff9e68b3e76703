"""Training under secure aggregation, through the whole engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny

from isthmus.errors import InputError
from isthmus.federated.masked import MASKED

SIZES = (5, 14, 9, 3, 7)
KEYS: dict[str, Any] = {"clip": 0.5, "mask": "secagg:bits=20", "link": "ideal"}


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedadam"])
def test_the_mean_is_that_without_a_mask(method: str) -> None:
    """Up to the step of the shared scale, whether examples or heads are counted."""
    task = tiny.task(SIZES)
    plain = tiny.play(method, task, 3, clip=0.5)
    hidden = tiny.play(method, task, 3, **KEYS)
    step = 0.5 / (2**19 - 1)
    for name, x in tiny.state(plain).items():
        assert (
            float((x - tiny.state(hidden)[name]).abs().max())
            < (50 if method != "fedavg" else 5) * step
        )
    start = tiny.federation(method, task)
    assert tiny.apart(tiny.state(start), tiny.state(hidden)) > 1e-3


def test_the_sum_is_exact_and_nothing_else_goes_up() -> None:
    """What the server opens is the integer sum of the survivors' codes, to the bit."""
    task = tiny.task(SIZES)
    fed = tiny.federation("fedavg", task, **KEYS, dropout=0.3, seed=4)
    masked = fed.masked
    assert masked is not None
    codes: list[np.ndarray] = []
    sent: list[Any] = []
    code, reveal = masked.codes, masked.reveal

    def watch(rows: torch.Tensor, keys: np.ndarray) -> np.ndarray:
        codes.append(code(rows, keys))
        return codes[-1]

    def opened(arrived: Any, like: Any) -> Any:
        sent.append((arrived, reveal(arrived, like)))
        return sent[-1][1]

    masked.codes, masked.reveal = watch, opened  # type: ignore[method-assign]
    for _ in range(4):
        fed.step()
    dropped = 0
    for q, (arrived, reduced) in zip(codes, sent, strict=True):
        weights = np.array([SIZES[c] for c in arrived.clients])
        want = (q * weights[:, None]).sum(0) / weights.sum() * 0.5 / (2**19 - 1)
        flat = torch.cat([x.flatten() for x in reduced.tensors.values()])
        np.testing.assert_allclose(flat.numpy(), want, rtol=1e-12, atol=1e-15)
        assert list(arrived.delta) == [MASKED] and not arrived.scalars
        assert all(m.n_examples == m.steps == 0 for m in arrived.meta)
        dropped += len(SIZES) - len(arrived)
    assert dropped > 0


def test_bytes_of_every_exchange() -> None:
    task = tiny.task(SIZES)
    fed = tiny.play("fedavg", task, 1, **KEYS)
    n, rows = len(SIZES), list(fed.ledger.rows())
    of = {kind: [r["bytes"] for r in rows if r["kind"] == kind] for kind in ("keys", "shares")}
    assert sorted(of["keys"]) == [64] * n + [64 * n] * n
    sealed = 2 * 68 + 28
    assert sorted(of["shares"]) == [sealed * (n - 1)] * 2 * n
    assert [r["bytes"] for r in rows if r["kind"] == "opening"] == [68 * n] * n
    ups = [r for r in rows if r["kind"] == "update"]
    assert all(
        r["values"] == 4 * (sum(x.numel() for x in fed.state["shared"].values()) + 1) for r in ups
    )


def test_below_the_threshold_the_round_is_aborted() -> None:
    task = tiny.task(SIZES)
    fed = tiny.federation("fedavg", task, **{**KEYS, "mask": "secagg:threshold=1.0"}, dropout=0.5)
    with pytest.raises(InputError, match=r"secure aggregation: . of 5 uploads given, allowed: 5"):
        for _ in range(9):
            fed.step()


def test_rounding_is_unbiased() -> None:
    fed = tiny.federation("fedavg", tiny.task(SIZES), clip=1.0, mask="secagg:bits=3")
    assert fed.masked is not None
    u = torch.tensor([[0.1, -0.3, 0.71, 1.0, -1.0]], dtype=torch.float64)
    draws = np.concatenate([fed.masked.codes(u, np.array([k])) for k in range(4000)]) / 3
    error = draws.std(0) / 4000**0.5
    assert (np.abs(draws.mean(0) - u.numpy()[0]) <= 4 * error + 1e-12).all()
    assert set(np.unique(draws * 3)) <= set(range(-3, 4))


def test_what_cannot_be_masked_is_refused() -> None:
    task = tiny.task(SIZES)

    def tried(method: str = "fedavg", **more: Any) -> None:
        tiny.federation(method, task, **{**KEYS, **more})

    with pytest.raises(InputError, match="clip: None given"):
        tried(clip=None)
    with pytest.raises(InputError, match="mask: with discrete codec"):
        tried(codec="int8")
    with pytest.raises(InputError, match="mask: with selector"):
        tried(selector="krum:f=1")
    with pytest.raises(InputError, match="mask: with coordinate reducer"):
        tried(reducer="median")
    with pytest.raises(InputError, match="mask: with async schedule"):
        tried(schedule="fedasync")
    with pytest.raises(InputError, match="mask: with adapter-product reducer"):
        tried("fedmomentum")
    with pytest.raises(InputError, match="mask: 304 examples in a round given, allowed: fewer"):
        tiny.federation("fedavg", tiny.task((300, 4)), **{**KEYS, "mask": "secagg:bits=24"}).step()
