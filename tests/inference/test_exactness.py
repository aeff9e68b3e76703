"""Texts follow the target's law, whatever a method sends; and each known mistake shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.inference.pure import Pair, chi_square, tables
from torch import Tensor

from isthmus.inference import verify
from isthmus.inference.method import Kept, Settled, method_of
from isthmus.models.decode import Law, top_k
from isthmus.wire.message import Message

V, TEXTS, MISTAKEN = 12, 8000, 1000
DRAFT, TARGET = tables(V, seed=5)
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def pair(name: str, **settings: Any) -> Pair:
    return Pair(method_of(name, V, settings), DRAFT, TARGET)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("full-row", {}),
        ("full-row", {"grid": "2", "row": "fp16"}),
        ("tk-slt", {"K": 1}),
        ("tk-slt", {"K": 2}),
        ("tk-slt", {"K": 6}),
        ("tk-slt", {"K": 2, "form": "raw"}),
        ("tk-slt", {"K": 3, "grid": "3", "row": "fp32"}),
        ("dssd", {}),
        ("dssd", {"grid": "3", "row": "exact"}),
        ("dssd", {"grid": "6", "row": "exact"}),
        ("dssd", {"grid": "10", "row": "exact"}),
        ("dssd", {"grid": "exact", "row": "fp32"}),
    ],
)
def test_one_step_has_exactly_the_law_of_the_target(name: str, settings: dict[str, Any]) -> None:
    """To 1e-12, of a first drafted token and of a second, by the chances that lead to each."""
    draft, target = tables(6, seed=5)
    subject = Pair(method_of(name, 6, settings), draft, target)
    grid = verify.Grid(settings.get("row", "fp16" if name == "dssd" else "exact"))
    law = verify.unit(grid.near(subject.p))
    likely = int(subject.q[2].argmax())
    for context in ((2,), (2, likely)):
        found = subject.law_of_one_step(*context)
        torch.testing.assert_close(found, law[context[-1]], rtol=0, atol=1e-12)
    distance = 0.5 * (law - subject.p).abs().sum(-1).max()
    assert distance < (1e-3 if grid.name == "fp16" else 1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dssd", {"grid": "6"}),
        pytest.param("tk-slt", {"K": 4}, marks=slow),
        pytest.param("cloud-only", {}, marks=slow),
        pytest.param("full-row", {}, marks=slow),
        pytest.param("tk-slt", {"K": 1}, marks=slow),
        pytest.param("tk-slt", {"K": 2}, marks=slow),
        pytest.param("tk-slt", {"K": V}, marks=slow),
        pytest.param("tk-slt", {"K": 4, "form": "raw"}, marks=slow),
        pytest.param("dssd", {"grid": "fp16"}, marks=slow),
        pytest.param("dssd", {"grid": "3"}, marks=slow),
        pytest.param("dssd", {"grid": "10"}, marks=slow),
    ],
)
def test_the_first_two_tokens_follow_the_target(name: str, settings: dict[str, Any]) -> None:
    subject = pair(name, **settings)
    assert subject.method.lossless
    assert chi_square(subject.pairs(TEXTS, seed=1), subject.p) > 1e-3


def test_the_draft_alone_does_not() -> None:
    subject = pair("full-row")
    subject.p = Law()(DRAFT)
    assert chi_square(subject.pairs(MISTAKEN, seed=1), Law()(TARGET)) < 1e-6


# Each is one way to get it wrong; all must be seen.

Mistake = Callable[[pytest.MonkeyPatch], Pair]


def inverted_ratio(patch: pytest.MonkeyPatch) -> Pair:
    right = verify.accepted
    patch.setattr(verify, "accepted", lambda p, s, u: right(s, p, u))
    return pair("full-row")


def softmaxed_residual(patch: pytest.MonkeyPatch) -> Pair:
    right = verify.residual
    patch.setattr(verify, "residual", lambda p, s: right(p, s).softmax(-1))
    return pair("full-row")


def residual_of_logits(patch: pytest.MonkeyPatch) -> Pair:
    right = verify.residual
    patch.setattr(verify, "residual", lambda p, s: right(p, s.log().clamp_min(-5.0)))
    return pair("full-row")


def judged_by_another_law(patch: pytest.MonkeyPatch) -> Pair:
    drawn = top_k(DRAFT, 4).softmax(-1)
    return Pair(method_of("full-row", V), DRAFT, TARGET, drawn=drawn)


def judged_by_the_truncated_row(patch: pytest.MonkeyPatch) -> Pair:
    return Pair(method_of("tk-slt", V, {"K": 2}), DRAFT, TARGET, drawn=DRAFT.softmax(-1))


def bonus_from_the_row_before(patch: pytest.MonkeyPatch) -> Pair:
    subject = pair("full-row")
    right = subject.rows
    patch.setattr(subject, "rows", lambda context: right([*context[:-1], context[-2]]))
    return subject


def goes_on_after_a_rejection(patch: pytest.MonkeyPatch) -> Pair:
    patch.setattr(verify, "accepted", lambda p, s, u: int((u * s < p).sum()))
    return pair("full-row")


def one_chance_for_all(patch: pytest.MonkeyPatch) -> Pair:
    subject = pair("full-row")
    right = subject.pairs
    patch.setattr(subject, "pairs", lambda n, seed: right(2 * n, seed, gammas=(2,), alike=True))
    return subject


def another_scalar_than_subtracted(patch: pytest.MonkeyPatch) -> Pair:
    subject = pair("dssd", grid="3")
    right = subject.method.settle

    def settle(kept: Kept, verdict: Message, correct: Tensor) -> Settled:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(verify.Grid, "down", lambda grid, q: q)
            return right(kept, verdict, correct)

    patch.setattr(subject.method, "settle", settle)
    return subject


def rounded_upward(patch: pytest.MonkeyPatch) -> Pair:
    patch.setattr(verify.Grid, "down", lambda grid, q: (q * grid.steps).ceil() / grid.steps)
    return pair("dssd", grid="3")


def never_void(patch: pytest.MonkeyPatch) -> Pair:
    subject = pair("tk-slt", K=4, grid="3")
    right = subject.method.offer

    def offer(at: int, last: int, ids: Tensor, q: Tensor, u: Tensor) -> tuple[Message, Kept]:
        return right(at, last, ids, q, torch.zeros_like(u))

    patch.setattr(subject.method, "offer", offer)
    return subject


MISTAKES: list[Mistake] = [
    inverted_ratio,
    softmaxed_residual,
    residual_of_logits,
    judged_by_another_law,
    judged_by_the_truncated_row,
    bonus_from_the_row_before,
    goes_on_after_a_rejection,
    one_chance_for_all,
    another_scalar_than_subtracted,
    rounded_upward,
    never_void,
]


@pytest.mark.parametrize(
    "mistake",
    [*MISTAKES[::2], *(pytest.param(mistake, marks=slow) for mistake in MISTAKES[1::2])],
    ids=lambda mistake: mistake.__name__,
)
def test_a_mistake_shows(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = mistake(monkeypatch)
    assert chi_square(subject.pairs(MISTAKEN, seed=1), subject.p) < 1e-6
