"""The checks of TK-SLT and DSSD fail for what does not do what they claim."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.bench.serving import Served, prompts, serve
from isthmus.claims import dssd, tk_slt
from isthmus.inference import length
from isthmus.inference.method import Judged, method_of
from isthmus.inference.methods.dssd import Dssd
from isthmus.wire.link import Link
from isthmus.wire.message import Message

NEW = 16


def served(method: str, **settings: Any) -> Served:
    """Two texts over the link of the DSSD claim."""
    link = Link(up=dssd.UP, down=dssd.DOWN, latency=dssd.LATENCY)
    where = dssd.timed(dssd.DRAFT, dssd.VERIFY)
    return serve(method, link, prompts(2), where, {"gamma": 4, **settings}, NEW)


@pytest.fixture(scope="module")
def runs() -> dict[str, Served]:
    return {
        "full-row": served("full-row"),
        "tk-slt": served("tk-slt", adapt=False, K=tk_slt.K),
        "dssd": served("dssd"),
    }


@pytest.mark.slow
def test_a_cut_after_drawing_is_found() -> None:
    """And no cut before drawing is."""
    settings = tk_slt.one(tk_slt.FEW)
    assert tk_slt.fit(method_of("tk-slt", tk_slt.V, settings), 700) > 1e-3
    assert tk_slt.fit(method_of(tk_slt.Naive, tk_slt.V, settings), 700) < 1e-6


class Inverted(Dssd):
    """Accepts by s / p in place of p / s."""

    def judge(self, p: Tensor, offer: Message, accept: Tensor, correct: Tensor) -> Judged:
        ids = self.drafted(offer).ids
        s = self.grid.unpack("s", offer.tensors["s"], (1,)) if ids else torch.zeros(1)
        ratio = s[0] / p[0, ids[0]] if ids else 0.0
        chance = torch.full_like(accept, 0.0 if accept[0] < ratio else 1.0)
        return super().judge(p, offer, chance, correct)


def test_an_inverted_ratio_is_found() -> None:
    method = method_of(Inverted, dssd.V, {"gamma": 1})
    assert tk_slt.fit(method, 500) < 1e-6


def test_bytes_are_counted_against_the_formulas(runs: dict[str, Served]) -> None:
    assert tk_slt.crossed(runs["tk-slt"], runs["full-row"]).holds
    one = replace(runs["tk-slt"], up_values=runs["tk-slt"].up_values + 1)
    assert not tk_slt.crossed(one, runs["full-row"]).holds
    assert not tk_slt.crossed(runs["full-row"], runs["full-row"]).holds


def test_rows_that_go_up_are_found(runs: dict[str, Served]) -> None:
    assert dssd.nothing_wide(runs["dssd"]).holds
    assert not dssd.nothing_wide(runs["full-row"]).holds
    assert not dssd.nothing_wide(runs["tk-slt"]).holds


def test_rows_that_come_down_are_one_a_rejection(runs: dict[str, Served]) -> None:
    assert dssd.crossed(runs).holds
    more = replace(runs["dssd"], down=runs["dssd"].down + 2 * dssd.V)
    assert not dssd.crossed({**runs, "dssd": more}).holds
    assert not dssd.crossed({**runs, "dssd": runs["full-row"]}).holds


def test_the_table_of_bytes_and_that_of_lengths() -> None:
    assert dssd.table().holds and tk_slt.table().holds


def test_a_length_that_is_not_the_best_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def longer(alpha: float, load: float, base: float = 1.0) -> int:
        return length.best(alpha, load, base) + 1

    monkeypatch.setattr(tk_slt, "best", longer)
    assert not tk_slt.table().holds


@pytest.mark.slow
def test_texts_equal_full_rows_and_only_those(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = prompts(2)
    assert dssd.same(texts).holds and tk_slt.same(texts).holds
    monkeypatch.setattr(tk_slt, "V", 1024)  # K = 1024 of 2048 cuts rows
    assert not tk_slt.same(texts).holds


def test_a_round_that_takes_longer_than_the_formula_is_found(runs: dict[str, Served]) -> None:
    where = dssd.timed(dssd.DRAFT, dssd.VERIFY)
    link = Link(up=dssd.UP, down=dssd.DOWN, latency=dssd.LATENCY)
    later = Link(up=dssd.UP, down=dssd.DOWN, latency=2 * dssd.LATENCY)
    full = serve("dssd", link, prompts(4), where, {"gamma": 4}, 48)
    assert dssd.timing(full, link).holds
    assert not dssd.timing(full, later).holds
