from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated.adapters.rounds import draw, rel
from torch import Tensor

from isthmus.contracts import LowRank
from isthmus.errors import InputError
from isthmus.federated.adapters.delta_log import DeltaLog
from isthmus.federated.adapters.fedmomentum import Knobs, aggregate
from isthmus.models.factors import Place, add_pair, merged

SHAPES = {"q": (40, 64), "mlp": (64, 48)}


def pair(seed: int, layer: str, rank: int) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    d, k = SHAPES[layer]
    return LowRank(torch.randn(d, rank, generator=g), torch.randn(rank, k, generator=g))


def caught_up(
    log: DeltaLog, version: int, mine: dict[str, Tensor], server: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A client's weights after it applied what it was sent."""
    mine = dict(mine)
    for layer, pairs in log.pairs_since(version).items():
        if pairs is None:
            mine[layer] = server[layer].clone()
        for each in pairs or []:
            mine[layer] = add_pair(mine[layer], each)
    return mine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("absent", [1, 2, 3, 5, 9])
def test_who_was_away_ends_with_the_same_bits(absent: int, dtype: torch.dtype) -> None:
    log = DeltaLog(SHAPES)
    server = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    history = [dict(server)]
    whole = 0
    for t in range(9):
        deltas = {"q": [pair(t, "q", 4), pair(50 + t, "q", 1)]}
        if t % 3 == 0:
            deltas["mlp"] = [pair(100 + t, "mlp", 2)]
        assert log.append(deltas) == t + 1
        for layer, pairs in deltas.items():
            for each in pairs:
                server[layer] = add_pair(server[layer], each)
        history.append(dict(server))
        back = max(0, t + 1 - absent)
        got = caught_up(log, back, history[back], server)
        assert all(torch.equal(got[name], server[name]) for name in server)
        whole += sum(pairs is None for pairs in log.pairs_since(back).values())
    assert (whole > 0) == (absent > 4)  # 5 directions of 104 values a round: whole after 4 rounds


def test_three_absent_rounds_of_training_end_in_the_same_function() -> None:
    at = {"q": Place("B", "A", "W", 1.7, 3, (60, 80))}
    log = DeltaLog({"q": (60, 80)})
    present = {"W": torch.randn(60, 80, generator=torch.Generator().manual_seed(0)).double()}
    absent = dict(present)
    down = draw(0, 60, 80).down
    for t in range(3):
        case = draw(t, 60, 80)._replace(down=down)
        result = aggregate(*case, Knobs(tau=0.95), key=t)
        assert result.base_delta
        log.append({"q": result.base_delta})
        present |= merged(present, at, {"q": result.base_delta})
        down = result.factors
    sent = log.pairs_since(0)["q"]
    assert sent is not None and len(sent) == 3
    assert torch.equal(merged(absent, at, {"q": sent})["W"], present["W"])


def test_values_and_bytes_are_those_of_the_tensors_sent() -> None:
    log = DeltaLog(SHAPES)
    for t in range(5):
        log.append({"q": [pair(t, "q", 5)], "mlp": [pair(t, "mlp", 3)]})
    assert (log.values(5), log.nbytes(5)) == (0, 0) and log.pairs_since(5) == {}
    assert log.values(4) == 5 * 104 + 3 * 112
    assert log.values(1) == 20 * 104 + 12 * 112
    assert log.values(0) == 40 * 64 + 15 * 112  # 25 * 104 > 40 * 64: q is sent whole
    assert log.pairs_since(0)["q"] is None
    assert log.nbytes(0) == 4 * log.values(0) == 2 * log.nbytes(0, width=2)


@given(ranks=st.lists(st.integers(0, 12), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_the_log_never_outgrows_the_layer(ranks: list[int]) -> None:
    log = DeltaLog({"q": SHAPES["q"]})
    for t, rank in enumerate(ranks):
        log.append({"q": [pair(t, "q", rank)]})
    held = sum(x.numel() for name, x in log.state().items() if name.endswith(("left", "right")))
    assert held <= 40 * 64
    for version in range(len(ranks) + 1):
        missing = sum(ranks[version:])
        assert log.values(version) == min(missing * 104, 40 * 64)


def test_beyond_the_cap_pairs_are_recompressed_without_loss() -> None:
    log = DeltaLog(SHAPES, cap=6)
    first = pair(0, "q", 4)
    pairs = [LowRank(first.left * (t + 1), first.right) for t in range(4)]
    for each in pairs:
        log.append({"q": [each]})
    (joined,) = log.pairs_since(0)["q"] or []
    assert joined.left.shape[1] == 4 and log.values(0) == 4 * 104
    assert rel(joined.left @ joined.right, first.left @ first.right * 10) < 1e-5
    assert len(log.pairs_since(3)["q"] or []) == 1


def test_a_log_survives_a_checkpoint() -> None:
    log, again = DeltaLog(SHAPES), DeltaLog(SHAPES)
    for t in range(6):
        log.append({"q": [pair(t, "q", 5), pair(9 * t, "q", 1)], "mlp": []})
    again.load_state(log.state())
    assert again.version == 6
    for version in range(7):
        one, two = log.pairs_since(version), again.pairs_since(version)
        assert one.keys() == two.keys()
        for layer, pairs in one.items():
            assert (pairs is None) == (two[layer] is None)
            for x, y in zip(pairs or [], two[layer] or [], strict=True):
                assert torch.equal(x.left, y.left) and torch.equal(x.right, y.right)


def test_bad_versions_and_shapes_are_refused() -> None:
    log = DeltaLog(SHAPES)
    with pytest.raises(InputError, match="version: 1 given, allowed: 0 to 0"):
        log.pairs_since(1)
    with pytest.raises(InputError, match="layer: k given"):
        log.append({"k": []})
    with pytest.raises(InputError, match=r"q: \[64, 2\] and \[2, 48\] given"):
        log.append({"q": [pair(0, "mlp", 2)]})
    assert log.version == 0
