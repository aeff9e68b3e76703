"""Adapter methods through the engine: what they send, what they serve, who catches up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.federated import tiny
from torch import Tensor

from isthmus import tree
from isthmus.federated.adapters import fedex_lora, fedit, fedmomentum, ffa_lora, flexlora, flora
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.round import Federation
from isthmus.models.factors import add_pair
from isthmus.tree import Tree

TASK = tiny.task((5, 14, 9, 3))
N = 4
SHAPES = ((9, 6), (4, 9))
"""d outputs, k inputs of the two adapted layers."""

WIDTH = 8  # bytes of a float64


def factors(fed: Federation) -> LoraMethod:
    assert isinstance(fed.method, LoraMethod)
    return fed.method


def served(fed: Federation) -> dict[str, Tensor]:
    """The weight of every layer as it is served: base + s B A, dense."""
    method = factors(fed)
    tensors = {**fed.ground.base, **method.base(fed.state), **method.served(fed.state)}
    return {
        layer: tensors[at.weight] + at.scale * tensors[at.B] @ tensors[at.A]
        for layer, at in method.places.items()
    }


def uploads(fed: Federation) -> list[Tree]:
    """The factors that clients sent in the last round, as the server decoded them."""
    return fed.extras["seen"][-1]


def watched(method: str, **keys: Any) -> Federation:
    """A federation that remembers the decoded uploads of each round in `extras`."""
    fed = tiny.federation(method, TASK, **keys)
    seen: list[list[Tree]] = []
    fed.extras = {"seen": seen}
    reduce = fed.path.reduce

    def remember(method: Any, state: Any, updates: Any, ctx: Any) -> Any:
        seen.append(tree.unstack(updates.values))
        return reduce(method, state, updates, ctx)

    fed.path.reduce = remember  # type: ignore[method-assign]
    return fed


def counted(fed: Federation, kind: str, round: int) -> dict[str, int]:
    party = "from" if kind == "update" else "to"
    sums = fed.ledger.sums("values", by=party, kind=kind, round=round)
    return {client: int(values) // WIDTH for client, values in sums.items()}


def each(amount: int) -> dict[str, int]:
    return {f"client/{i:03d}": amount for i in range(N)}


def total(formula: Any, **more: int) -> int:
    return sum(formula(d, k, **more) for d, k in SHAPES)


@pytest.mark.parametrize(("name", "module"), [("fedit", fedit), ("ffa-lora", ffa_lora)])
def test_bytes_of_averaged_factors(name: str, module: Any) -> None:
    fed = tiny.play(name, TASK, 2, settings={"rank": 3})
    for round in (1, 2):
        assert counted(fed, "update", round) == each(total(module.upload, r=3))
        assert counted(fed, "model", round) == each(total(module.download, r=3))
    assert "base" not in {row["kind"] for row in fed.ledger.rows()}


def test_bytes_of_ffa_are_half_of_those_of_fedit_where_layers_are_square() -> None:
    """Only B travels: r d of r (d + k)."""
    assert total(ffa_lora.upload, r=3) == 3 * (9 + 4) and total(fedit.upload, r=3) == 3 * 28


def test_bytes_of_flora_of_two_ranks() -> None:
    fed = tiny.play("flora", TASK, 2, ranks=(1, 2))
    own = {f"client/{i:03d}": total(flora.upload, r=(1, 2)[i % 2]) for i in range(N)}
    for round in (1, 2):
        assert counted(fed, "update", round) == own
        assert counted(fed, "model", round) == each(0)
    stack = 1 + 2 + 1 + 2
    assert counted(fed, "base", 2) == each(total(flora.download, stack_rank=stack))
    assert counted(fed, "base", 1) == {}
    assert total(flora.download, stack_rank=stack) == 54 + 36  # both layers are sent whole


def test_bytes_of_fedex() -> None:
    fed = tiny.play("fedex-lora", TASK, 2, settings={"rank": 1})
    for round in (1, 2):
        assert counted(fed, "update", round) == each(total(fedex_lora.upload, r=1))
        assert counted(fed, "model", round) == each(total(fedex_lora.upload, r=1))
    correction = total(fedex_lora.download, r=1, residual_rank=N - 1) - total(
        fedex_lora.upload, r=1
    )
    assert counted(fed, "base", 2) == each(correction)
    assert correction == 3 * 15 + 36  # of the second layer 3 (4 + 9) is more than 4 times 9


def test_bytes_of_flexlora_of_two_ranks() -> None:
    fed = tiny.play("flexlora", TASK, 2, ranks=(1, 3))
    for round in (1, 2):
        for i in range(N):
            r, client = (1, 3)[i % 2], f"client/{i:03d}"
            assert counted(fed, "update", round)[client] == total(flexlora.upload, r=r)
            assert counted(fed, "model", round)[client] == total(flexlora.download, r=r)
    assert fed.ledger.total("rows", kind="base") == 0


def test_bytes_of_fedmomentum_of_two_ranks() -> None:
    fed = watched("fedmomentum", ranks=(1, 2), settings={"tau": 1.0})
    for _ in range(2):
        report = fed.step()
        residual = {layer: report.diag[layer]["residual_rank"] for layer in factors(fed).places}
        if fed.round == 1:
            first = residual
    for round in (1, 2):
        own = {f"client/{i:03d}": total(fedmomentum.upload, r=(1, 2)[i % 2]) for i in range(N)}
        assert counted(fed, "update", round) == own
        assert counted(fed, "model", round) == each(total(fedmomentum.upload, r=2))
    whole = sum(
        fedmomentum.download(d, k, 2, first[layer]) - fedmomentum.upload(d, k, 2)
        for layer, (d, k) in zip(factors(fed).places, SHAPES, strict=True)
    )
    assert counted(fed, "base", 2) == each(whole) and whole > 0
    assert counted(fed, "base", 1) == {}


def test_bytes_of_local_lora() -> None:
    fed = tiny.play("local-lora", TASK, 2)
    assert fed.ledger.total("bytes") == fed.ledger.total("values") == 0
    assert fed.ledger.sums("rows", by="kind") == {"train": 2 * N}
    kept, start = tiny.kept(fed), tiny.kept(tiny.federation("local-lora", TASK))
    assert kept.keys() == start.keys() and len(kept) == 4
    items = TASK.synthesise().train.columns
    alone = tiny.task((5,), data=(items["x"][:5], items["y"][:5].clone()))
    one = tiny.play("local-lora", alone, 2)
    assert tree.equal(tree.row(tiny.kept(one), 0), tree.row(kept, 0))  # it is training alone
    assert all(not torch.equal(x[0], x[1]) for x in kept.values())


def test_one_fedit_round_is_the_mean_of_each_factor() -> None:
    fed = watched("fedit")
    fed.step()
    p = torch.tensor([5, 14, 9, 3], dtype=torch.float64) / 31
    assert len(uploads(fed)) == N
    for name, x in fed.state["shared"].items():
        expected = sum((w * u[name] for w, u in zip(p, uploads(fed), strict=True)), torch.zeros(()))
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-15)
    start = tiny.federation("fedit", TASK).state["shared"]
    assert all(not torch.equal(x, start[n]) for n, x in fed.state["shared"].items())


def test_ffa_never_moves_a() -> None:
    fed = watched("ffa-lora")
    a = tree.clone(fed.state["A"])
    for _ in range(2):
        fed.step()
    assert all(set(u) == {at.B for at in factors(fed).places.values()} for u in uploads(fed))
    assert tree.equal(fed.state["A"], a) and not set(a) & set(fed.state["shared"])


EXACT: dict[str, dict[str, Any]] = {
    "fedmomentum": {"settings": {"tau": 1.0, "rank": 3}, "ranks": (1, 3)},
    "flora": {"settings": {"rank": 3}, "ranks": (1, 3)},
    "fedex-lora": {},
    "ffa-lora": {},
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_served_moves_by_the_mean_of_the_clients_moves(name: str) -> None:
    """base + s B A after a round = the weighted mean of what the clients made of it."""
    fed = watched(name, **EXACT[name])
    p = torch.tensor([5, 14, 9, 3], dtype=torch.float64) / 31
    for _ in range(3):
        before = served(fed)
        base = {**fed.ground.base, **factors(fed).base(fed.state)}
        given = {**fed.state["shared"], **fed.state.get("A", {})}
        if name == "flora":
            given = factors(fed).origin(fed.state, {}, fed.round + 1)
        fed.step()
        for layer, at in factors(fed).places.items():
            expected = torch.zeros(at.shape, dtype=torch.float64)
            for i, (w, u) in enumerate(zip(p, uploads(fed), strict=True)):
                B, A = u.get(at.B, given[at.B]).clone(), u.get(at.A, given[at.A]).clone()
                rank = EXACT[name].get("ranks", (at.rank,) * 2)[i % 2]
                if name == "fedmomentum":  # who trains fewer directions holds the others still
                    B[:, rank:], A[rank:] = given[at.B][:, rank:], given[at.A][rank:]
                expected += w * (base[at.weight] + at.scale * B @ A)
            got = served(fed)[layer]
            assert float((got - expected).norm() / expected.norm()) < 1e-12
            assert float((got - before[layer]).norm() / before[layer].norm()) > 1e-4


@pytest.mark.parametrize("name", ["fedmomentum", "flora", "fedex-lora"])
def test_who_was_away_catches_up_to_the_same_bits(name: str) -> None:
    """Three rounds missed: the pairs replayed one after the other give the server's own base."""
    settings = {"rank": 1, "targets": ("lower",)} | ({"tau": 1.0} if name == "fedmomentum" else {})
    fed = tiny.federation(name, TASK, settings=settings, cohort=3)
    method = factors(fed)
    bases, rounds = [tree.clone(method.base(fed.state))], 7
    held = {c: 0 for c in range(N)}
    longest = 0
    for _ in range(rounds):
        version = method.version(fed.state)
        chosen = fed.schedule.clients(fed.round + 1).tolist()
        for c in chosen:
            changes = method.catch_up(fed.state, held[c])
            mine = dict(bases[held[c]])
            for layer, at in method.places.items():
                if f"{layer}|whole" in changes:
                    mine[at.weight] = changes[f"{layer}|whole"]
                i = 0
                while f"{layer}|{i}|left" in changes:
                    pair = (changes[f"{layer}|{i}|left"], changes[f"{layer}|{i}|right"])
                    mine[at.weight] = add_pair(mine[at.weight], pair, at.transposed)
                    i += 1
            assert tree.equal(mine, method.base(fed.state))
            longest = max(longest, version - held[c])
            held[c] = version
        fed.step()
        assert {c: int(v) for c, v in enumerate(fed.versions)} == held
        bases.append(tree.clone(method.base(fed.state)))
    assert longest >= 3 and method.version(fed.state) == rounds
    assert not tree.equal(bases[-1], bases[-2])


def test_a_client_of_smaller_rank_trains_only_its_own_directions() -> None:
    for name in ("fedmomentum", "flexlora", "flora"):
        fed = watched(name, ranks=(1, 3), settings={"rank": 3})
        fed.step()
        for at in factors(fed).places.values():
            for i, u in enumerate(uploads(fed)):
                rank = (1, 3)[i % 2]
                assert not u[at.B][:, rank:].any() and not u[at.A][rank:].any()
                assert bool(u[at.B][:, :rank].any(0).all()) and bool(u[at.A][:rank].any(1).all())


def test_the_served_model_learns() -> None:
    for name in ("fedit", "fedmomentum"):
        fed = tiny.federation(name, TASK, lr=0.5, epochs=3)
        first = fed.step().loss
        for _ in range(6):
            last = fed.step().loss
        assert last < 0.9 * first
