"""The path of an upload, piece by piece, through the whole engine."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from torch import Tensor

from isthmus import tree
from isthmus.contracts import Context, Meta, OutsideThreatModel, ThreatModel, Updates, View
from isthmus.defenses.krum import krum
from isthmus.defenses.median import Median, median
from isthmus.errors import InputError
from isthmus.federated import path as module
from isthmus.federated.cohort import Cohort, Done, Ground
from isthmus.federated.executors.sequential import Sequential
from isthmus.federated.method import Method
from isthmus.federated.path import Path
from isthmus.federated.round import Federation
from isthmus.privacy.clip import norms
from isthmus.tree import Tree
from isthmus.wire.codecs import ErrorFeedback, parse
from isthmus.wire.errors import WireError

TASK = tiny.task((5, 14, 9, 3, 7, 11, 4))
N = 7


class Watched:
    """An executor that remembers the honest uploads, and may change them."""

    def __init__(self, change: Any = None) -> None:
        self.seen: list[Updates] = []
        self.change = change

    def run(self, method: Method, ground: Ground, cohort: Cohort) -> Done:
        done = Sequential().run(method, ground, cohort)
        if self.change is not None:
            self.change(done.updates, cohort.clients.tolist())
        copies = {part: tree.clone(getattr(done.updates, part)) for part in ("delta", "values")}
        self.seen.append(Updates(**copies, meta=[None] * len(cohort)))  # type: ignore[list-item]
        return done


class Spy:
    """A reducer that remembers what the server really used."""

    needs: frozenset[str] = frozenset()

    def __init__(self, reducer: Any) -> None:
        self.reducer = reducer
        self.seen: list[tuple[Updates, Tensor]] = []

    def reduce(self, updates: Updates, weights: Tensor, ctx: Context) -> Any:
        self.seen.append((updates, weights))
        return self.reducer.reduce(updates, weights, ctx)


def watched(
    method: str = "fedavg", change: Any = None, **keys: Any
) -> tuple[Federation, Watched, Spy]:
    fed = tiny.federation(method, keys.pop("task", TASK), **keys)
    watch, spy = Watched(change), Spy(fed.method.reducer)
    fed.executor, fed.method.reducer = watch, spy
    return fed, watch, spy


def used(spy: Spy, round: int = -1) -> Tree:
    return spy.seen[round][0].delta


def row_norms(stacked: Tree) -> Tensor:
    return norms(stacked)


def test_what_the_server_uses_is_what_was_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are changed on the way: the server works with those, in both directions."""
    fed, watch, spy = watched(codec="dense:fp32", download="dense:bf16")
    fed.step()
    honest = watch.seen[0].delta
    rounded = {n: x.float().double() for n, x in honest.items()}
    assert tree.equal(used(spy), rounded) and not tree.equal(rounded, honest)
    down = {
        n: x.bfloat16().double() for n, x in tiny.federation("fedavg", TASK).state["shared"].items()
    }
    other = tiny.federation("fedavg", TASK)
    other.state = {"shared": down}
    assert tree.equal(
        Sequential().run(other.method, other.ground, _cohort(other, down)).updates.delta, honest
    )
    weights = torch.tensor([5, 14, 9, 3, 7, 11, 4], dtype=torch.float64)
    mean = tree.weighted_mean(rounded, weights / weights.sum())
    start = tiny.federation("fedavg", TASK).state["shared"]
    assert tree.equal(fed.state["shared"], tree.add(start, mean))

    plain, _, spied = watched()
    decode = module.decode_many

    def meddled(parcel: Any, schema: Any, **more: Any) -> Any:
        fields, tensors = decode(parcel, schema, **more)
        return fields, {n: 2.0 * x for n, x in tensors.items()}

    monkeypatch.setattr(module, "decode_many", meddled)
    plain.step()
    doubled = {n: 2.0 * x for n, x in plain.executor.seen[0].delta.items()}  # type: ignore[attr-defined]
    assert tree.equal(used(spied), doubled)


def _cohort(fed: Federation, down: Tree) -> Cohort:
    from isthmus import seeds

    clients = np.arange(N)
    keys = seeds.keys(seeds.key(fed.seed, "visit", 1), clients)
    zeros = np.zeros(N, np.int64)
    return Cohort(clients, keys, zeros, zeros, 1, 0.1, [down] * N, fed.store.get(clients))


def test_clip_bounds_every_upload_and_keeps_small_ones() -> None:
    free, _, _ = watched()
    free.step()
    sizes = row_norms(watched_round(free))
    bound = float(sizes.median())
    fed, watch, spy = watched(clip=bound)
    fed.step()
    got, honest = used(spy), watch.seen[0].delta
    assert float(row_norms(got).max()) <= bound
    small = (row_norms(honest) <= bound).nonzero().flatten().tolist()
    assert 0 < len(small) < N
    for i in range(N):
        factor = 1.0 if i in small else bound / float(row_norms(honest)[i])
        for n, x in honest.items():
            torch.testing.assert_close(got[n][i], factor * x[i], rtol=1e-12, atol=0)


def watched_round(fed: Federation) -> Tree:
    return fed.executor.seen[0].delta  # type: ignore[attr-defined]


def events(fed: Federation) -> list[dict[str, Any]]:
    return [row for row in fed.ledger.rows() if row["what"] == "privacy"]


def test_local_noise_of_each_client_is_its_own() -> None:
    keys = {"clip": 0.5, "privacy": "local", "noise": 0.3, "public": ("examples",)}
    fed, watch, spy = watched(**keys)
    fed.step()
    clipped = module._over(
        replace(watch.seen[0], meta=[]),
        lambda t: fed.path.local.clipped(t),
        {},  # type: ignore[union-attr]
    ).delta
    noise = tree.flatten_stacked(tree.sub(used(spy), clipped)) / (0.3 * 0.5)
    d = noise.shape[1]
    assert np.abs(noise.mean(1).numpy()).max() < 4.5 / d**0.5
    assert np.abs(noise.square().mean(1).numpy() - 1).max() < 4.5 * (2 / d) ** 0.5
    assert np.abs(np.corrcoef(noise.numpy())[np.triu_indices(N, 1)]).max() < 4.5 / d**0.5
    rows = events(fed)
    assert sorted(r["from"] for r in rows) == [f"client/{i:03d}" for i in range(N)]
    event = rows[0]["event"] if isinstance(rows[0]["event"], dict) else json.loads(rows[0]["event"])
    assert event["adjacency"] == "replace-one" and event["parameters"] == {"noise_multiplier": 0.3}
    again, _, second = watched(**keys)
    again.step()
    assert tree.equal(used(second), used(spy))
    again.step()
    assert not torch.allclose(used(second)["head.bias"], used(spy)["head.bias"])


def test_central_noise_is_added_once_to_a_sum_of_fixed_weights() -> None:
    keys = {"clip": 0.05, "privacy": "central", "noise": 0.4, "cohort": 4}
    fed, _, spy = watched(**keys)
    before = fed.state["shared"]
    fed.step()
    updates, weights = spy.seen[0]
    assert torch.equal(weights, torch.full((4,), 1 / 4, dtype=torch.float64))
    assert float(row_norms(updates.delta).max()) <= 0.05
    moved = tree.sub(fed.state["shared"], before)
    noise = tree.flatten(tree.sub(moved, tree.weighted_mean(updates.delta, weights)))
    z = noise / (0.4 * 0.05 / 4)
    assert abs(float(z.mean())) < 4 / len(z) ** 0.5
    assert abs(float(z.square().mean()) - 1) < 4 * (2 / len(z)) ** 0.5
    (row,) = events(fed)
    assert row["from"] == row["to"] == "server" and row["kind"] == "gaussian"


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedit", "ffa-lora"])
def test_a_round_without_clients_is_noised_all_the_same(method: str) -> None:
    keys = {
        "clip": 0.5, "privacy": "central", "noise": 0.4, "cohort": 1, "sampling": "poisson",
        "seed": 2,
    }  # fmt: skip
    fed = tiny.federation(method, TASK, **keys)
    sizes = []
    for _ in range(8):
        before = tiny.state(fed)
        report = fed.step()
        sizes.append(len(report.clients))
        moved = tree.sub(tiny.state(fed), before)
        if not sizes[-1]:
            names = [n for n in moved if n.startswith("shared")]
            z = torch.cat([moved[n].flatten() for n in names]) / (0.4 * 0.5)
            assert abs(float(z.square().mean()) - 1) < 4.5 * (2 / len(z)) ** 0.5
            assert not any(x.any() for n, x in moved.items() if not n.startswith("shared"))
    assert 0 in sizes and max(sizes) > 1  # cohorts above the expected size work as well
    assert len(events(fed)) == 8


@pytest.mark.parametrize("method", ["fedit", "ffa-lora"])
def test_privacy_of_adapters_bounds_the_change_of_the_factors(method: str) -> None:
    """A factor itself is long; what a client can move is what must be bounded."""
    free = tiny.play(method, TASK, 1)
    loose = tiny.play(method, TASK, 1, clip=1e6)
    assert tiny.apart(tiny.state(free), tiny.state(loose)) < 1e-12
    start = tiny.federation(method, TASK).state["shared"]
    tight = tiny.play(method, TASK, 1, clip=1e-3).state["shared"]
    assert 0 < float(tree.norm(tree.sub(tight, start))) <= 1.001e-3
    keys = {"clip": 1e-3, "privacy": "central", "noise": 50.0}
    noised = tiny.play(method, TASK, 1, **keys).state["shared"]
    z = tree.flatten(tree.sub(noised, tight)) / (50.0 * 1e-3 / N)
    assert abs(float(z.square().mean()) - 1) < 0.1 + 4.5 * (2 / len(z)) ** 0.5
    assert all(bool((noised[n] != tight[n]).all()) for n in tight)  # nothing goes unnoised


def test_int8_is_what_crosses() -> None:
    fed, watch, spy = watched(codec="int8")
    fed.step()
    honest, got = watch.seen[0].delta, used(spy)
    for n, x in honest.items():
        peak = x.abs().flatten(1).amax(1)
        error = (got[n] - x).abs().flatten(1).amax(1)
        assert bool((error > 0).any()) and bool((error <= peak / 127 + 1e-12).all())
    numbers = sum(x[0].numel() for x in honest.values())
    assert fed.ledger.total("values", kind="update") == N * numbers
    assert fed.ledger.total("bytes", kind="update") < fed.ledger.total("bytes", kind="model")


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
@pytest.mark.parametrize("codec", ["topk:0.1", "topk:0.2|int8"])
def test_error_feedback_loses_nothing(method: str, codec: str) -> None:
    """All that was decoded and what is in memory are all that was put in, client by client."""
    fed, watch, spy = watched(method, codec=codec, feedback=True, cohort=4)
    put_in = {f"delta/{n}": torch.zeros(N, *x.shape) for n, x in fed.state["shared"].items()}
    for name in list(put_in):
        if method == "scaffold":
            shared = name.removeprefix("delta/")
            put_in[f"delta/control/{shared}"] = put_in[name].clone()
    put_in = {n: x.double() for n, x in put_in.items()}
    decoded = tree.zeros_like(put_in)
    for round in range(5):
        fed.step()
        clients = torch.from_numpy(fed.schedule.clients(round + 1))
        for n, x in watch.seen[-1].delta.items():
            put_in[f"delta/{n}"].index_add_(0, clients, x)
            decoded[f"delta/{n}"].index_add_(0, clients, used(spy)[n])
    memory = {
        n.removeprefix(module.MEMORY): x
        for n, x in tiny.kept(fed).items()
        if n.startswith(module.MEMORY)
    }
    assert memory.keys() == put_in.keys()
    assert tiny.apart(put_in, tree.add(decoded, memory)) < 1e-12
    assert float(tree.norm(memory)) > 1e-2
    kept = {n: (x != 0).flatten(1).sum(1).amax() for n, x in used(spy).items()}
    assert all(int(k) <= -(-0.2 * used(spy)[n][0].numel() // 1) for n, k in kept.items())


def test_a_lossless_codec_leaves_no_memory() -> None:
    fed = tiny.play("fedavg", TASK, 2, codec="dense", feedback=True)
    memory = {n: x for n, x in tiny.kept(fed).items() if n.startswith(module.MEMORY)}
    assert memory and not any(x.any() for x in memory.values())
    assert tree.equal(fed.state["shared"], tiny.play("fedavg", TASK, 2).state["shared"])


def test_median_and_krum() -> None:
    fed, watch, _ = watched(reducer="median")
    before = fed.state["shared"]
    fed.step()
    middle = {n: median(x) for n, x in watch.seen[0].delta.items()}
    assert tiny.apart(fed.state["shared"], tree.add(before, middle)) < 1e-13
    fed, watch, spy = watched(selector="krum:f=2")
    report = fed.step()
    chosen = krum(tree.flatten_stacked(watch.seen[0].delta), 2)
    assert (
        tiny.apart({"d": tree.flatten(tree.sub(fed.state["shared"], before))}, {"d": chosen})
        < 1e-12
    )
    assert len(report.accepted) == 1 and len(report.clients) == N and len(spy.seen[0][0]) == 1
    fed, watch, spy = watched(selector="multi-krum:f=2,m=3,weighted=true")
    report = fed.step()
    updates, weights = spy.seen[0]
    sizes = torch.tensor([TASK_SIZES[c] for c in report.accepted], dtype=torch.float64)
    assert updates.clients == report.accepted and len(updates) == 3
    torch.testing.assert_close(weights, sizes / sizes.sum(), rtol=1e-12, atol=0)


TASK_SIZES = (5, 14, 9, 3, 7, 11, 4)


class Halving:
    """A selector whose weights mean something: half a step."""

    needs: frozenset[str] = frozenset()

    def select(self, updates: Updates, ctx: Context) -> Any:
        from isthmus.contracts import Selection

        accepted = torch.tensor([c % 2 == 0 for c in updates.clients])
        return Selection(torch.where(accepted, 0.5 / accepted.sum(), 0.0).double(), accepted)


def test_a_selectors_weights_are_kept_as_they_are() -> None:
    fed, _, spy = watched()
    fed.path.selectors = [Halving()]
    report = fed.step()
    assert report.accepted == [0, 2, 4, 6]
    assert spy.seen[0][1].tolist() == [0.125] * 4
    nobody = tiny.federation("fedavg", TASK)
    nobody.path.selectors = [_Nobody()]
    with pytest.raises(InputError, match="no upload accepted"):
        nobody.step()


class _Nobody(Halving):
    def select(self, updates: Updates, ctx: Context) -> Any:
        from isthmus.contracts import Selection

        return Selection(None, torch.zeros(len(updates), dtype=torch.bool))


def test_attackers_skip_clip_and_noise_but_not_the_codec() -> None:
    keys = {"attack": "sign-flip:scale=3", "attackers": 2}
    local = {"clip": 0.01, "privacy": "local", "noise": 0.5, "public": ("examples",)}
    fed, watch, spy = watched(**keys, **local)
    fed.step()
    honest, got = watch.seen[0].delta, used(spy)
    for n, x in honest.items():
        torch.testing.assert_close(got[n][:2], -3.0 * x[:2], rtol=0, atol=0)
    others = {n: x[2:] for n, x in got.items()}
    quiet, _, calm = watched(**local)
    quiet.step()
    assert tree.equal(others, {n: x[2:] for n, x in used(calm).items()})
    fed, watch, spy = watched(**keys, clip=0.01, codec="topk:0.1")
    fed.step()
    flipped = {n: -3.0 * x[:2] for n, x in watch.seen[0].delta.items()}
    sent = {n: x[:2] for n, x in used(spy).items()}
    for n, x in sent.items():
        live = x != 0
        assert 0 < int(live.sum()) <= 2 * -(-x[0].numel() // 10)
        torch.testing.assert_close(x[live], flipped[n][live], rtol=0, atol=0)


def test_an_attacker_sees_only_what_its_threat_model_lists() -> None:
    seen: dict[str, Any] = {}

    class Curious:
        threat = ThreatModel("client", frozenset({"own_update"}), frozenset({"update"}))

        def craft(self, own: Updates, view: View) -> Updates:
            seen["own"] = view["own_update"].clients
            with pytest.raises(OutsideThreatModel, match="benign_updates"):
                view["benign_updates"]
            return own.with_delta(tree.scale(own.delta, 0.0))

    fed, watch, spy = watched()
    fed.path.attack, fed.path.attackers = Curious(), frozenset({1, 4, 99})
    fed.step()
    assert seen["own"] == [1, 4]
    for n, x in watch.seen[0].delta.items():
        rows = [i for i in range(N) if i not in (1, 4)]
        assert not used(spy)[n][[1, 4]].any() and torch.equal(used(spy)[n][rows], x[rows])


def poison(client: int, value: float = float("nan")) -> Any:
    def change(updates: Updates, clients: list[int]) -> None:
        if client in clients:
            updates.delta["head.bias"][clients.index(client), 1] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", ["dense", "int8", "topk:0.5"])
def test_guards(codec: str, value: float) -> None:
    fed, _, _ = watched(change=poison(2, value), codec=codec)
    with pytest.raises(WireError, match="NaN or infinity"):
        fed.step()

    fed, watch, spy = watched(change=poison(2, value), codec=codec, guard="drop")
    report = fed.step()
    assert report.accepted == [0, 1, 3, 4, 5, 6] and len(report.clients) == N
    sizes = torch.tensor([s for i, s in enumerate(TASK_SIZES) if i != 2], dtype=torch.float64)
    torch.testing.assert_close(spy.seen[0][1], sizes / sizes.sum(), rtol=1e-12, atol=0)
    assert all(bool(torch.isfinite(x).all()) for x in fed.state["shared"].values())

    fed, watch, spy = watched(change=poison(2, value), codec=codec, guard="clip")
    assert fed.step().accepted == list(range(N))
    got = used(spy)["head.bias"][2]
    assert float(got[1]) == 0.0 and bool(torch.isfinite(got).all())
    if codec == "dense":
        rest = [0, 2, 3]
        assert torch.equal(got[rest], watch.seen[0].delta["head.bias"][2][rest])


@pytest.mark.parametrize("part", ["delta", "values", "buffers", "scalars"])
@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (0.5, 0.5, 0.0), (1.0, 2.0, 3.0)])
def test_a_mean_shows_what_its_uploads_hold(part: str, weights: tuple[float, ...]) -> None:
    """The search may be left to the mean: the same error; a weight of nothing hides nothing."""
    method = tiny.federation("fedavg", TASK).method
    meta = [Meta(i, 1, 0, 1.0) for i in range(3)]
    path, given = Path(late=True), torch.tensor(weights, dtype=torch.float64)
    for bad in (np.nan, np.inf, -np.inf):
        held = {"a": torch.randn(3, 4), "b": torch.randn(3)}
        updates = Updates(**{part: held}, meta=meta)
        path.reduce(method, {}, updates, Context(1, 0), given)
        held["b"][2] = bad
        with pytest.raises(WireError, match=f"{part}/b: holds NaN or infinity"):
            path.reduce(method, {}, updates, Context(1, 0), given)
        replace(path, late=False).reduce(method, {}, updates, Context(1, 0), given)


def test_a_mean_that_overflows_by_itself_accuses_nobody() -> None:
    method = tiny.federation("fedavg", TASK).method
    most = torch.finfo(torch.float32).max
    updates = Updates({"a": torch.full((2, 3), most)}, meta=[Meta(i, 1, 0, 1.0) for i in (0, 1)])
    one = torch.ones(2, dtype=torch.float64)
    reduced, _ = Path(late=True).reduce(method, {}, updates, Context(1, 0), one)
    assert bool(torch.isinf(reduced.tensors["a"]).all())


def test_only_a_plain_mean_is_trusted_to_show_nan() -> None:
    late = {"fedavg": {}, "fedprox": {}, "scaffold": {"codec": "int8"}}
    for name, keys in late.items():
        assert tiny.federation(name, TASK, **keys).path.late
    exact: list[tuple[str, dict[str, Any]]] = [
        ("fedavg", {"guard": "drop"}),
        ("fedavg", {"reducer": "median"}),
        ("fedavg", {"selector": "krum:f=1"}),
        ("fedavg", {"schedule": "fedasync"}),
        ("fedit", {}),
    ]
    for name, keys in exact:
        assert not tiny.federation(name, TASK, **keys).path.late

    def sicken(updates: Updates, clients: list[int]) -> None:
        updates.delta["head.bias"][2] = np.inf

    fed, _, _ = watched(change=sicken)
    fed.method.reducer = Median()  # which would hide it
    with pytest.raises(WireError, match=r"head\.bias: holds NaN or infinity"):
        fed.step()


def test_a_round_of_nothing_but_nan() -> None:
    def everyone(updates: Updates, clients: list[int]) -> None:
        updates.delta["head.bias"].fill_(float("nan"))

    for codec in ("dense", "int8"):
        fed, _, _ = watched(change=everyone, guard="drop", codec=codec)
        with pytest.raises(WireError, match="from every client"):
            fed.step()


def test_a_lossy_link_drops_clients() -> None:
    fed = tiny.federation("scaffold", TASK, link="wifi,loss=0.6,attempts=2", epochs=2)
    lost, arrived = 0, 0
    for _ in range(6):
        report = fed.step()
        rows = [r for r in fed.ledger.rows() if r["round"] == fed.round]
        up = [r for r in rows if r["kind"] == "update"]
        here = {r["from"] for r in up if r["note"] != "lost"}
        assert [f"client/{c:03d}" for c in report.accepted] == sorted(here)
        trained = {r["from"] for r in rows if r["kind"] == "train"}
        reached = {r["to"] for r in rows if r["kind"] == "model" and r["note"] != "lost"}
        assert trained == reached and here <= trained
        lost, arrived = lost + len(trained - here), arrived + len(here)
        own = {n: x.mean(0) for n, x in tiny.kept(fed).items() if n.startswith("control/")}
        assert tiny.apart(own, fed.state["c"]) < 1e-12  # who did not get through changed nothing
    assert lost > 3 and arrived > 3
    values = fed.ledger.total("values", kind="update")
    one = fed.ledger.total("values", kind="update", round=1) // len(
        [r for r in fed.ledger.rows() if r["round"] == 1 and r["kind"] == "update" and r["values"]]
    )
    assert values == arrived * one
    assert fed.ledger.total("bytes", kind="update") > 1.5 * values


def test_feedback_survives_a_lossy_link() -> None:
    fed, watch, spy = watched(
        codec="topk:0.2", feedback=True, link="wifi,loss=0.6,attempts=1", seed=3
    )
    put_in = {n: torch.zeros(N, *x.shape).double() for n, x in fed.state["shared"].items()}
    decoded = tree.zeros_like(put_in)
    for _ in range(4):
        done = len(spy.seen)
        report = fed.step()
        if len(spy.seen) == done:
            continue
        rows = [report.clients.index(c) for c in report.accepted]
        for n, x in watch.seen[-1].delta.items():
            put_in[n][report.accepted] += x[rows]
            decoded[n][report.accepted] += used(spy)[n]
    memory = {n.removeprefix("memory/delta/"): x for n, x in tiny.kept(fed).items()}
    assert tiny.apart(put_in, tree.add(decoded, memory)) < 1e-12
    assert len(spy.seen) >= 2


def test_feedback_is_for_changes() -> None:
    with pytest.raises(InputError, match="feedback: True given, allowed: false with method fedit"):
        tiny.federation("fedit", TASK, codec="topk:0.2", feedback=True)
    with pytest.raises(InputError, match="error feedback"):
        tiny.federation("fedavg", TASK, codec="randomk:0.2,unbiased", feedback=True)
    assert isinstance(tiny.federation("fedavg", TASK, feedback=True).path.feedback, ErrorFeedback)


@pytest.mark.parametrize("codec", ["dense", "int8:stochastic", "topk:0.3|int8", "sign"])
def test_downloads_of_the_same_shapes_cross_together_as_they_would_alone(codec: str) -> None:
    made = [
        {"w": torch.randn(4, 3, generator=draw), "b": torch.randn(5, generator=draw)}
        for draw in map(torch.Generator().manual_seed, range(3))
    ]
    path, axes = Path(download=parse(codec)), {"w": -2}
    for rank in (0, 2):
        told = {"rank": rank, "axes": axes} if rank else {}
        together = path.down(made, 4, 99, **told)
        alone = [one for each in made for one in path.down([each], 4, 99, **told)]
        for (got, *sizes), (wanted, *sizes_alone) in zip(together, alone, strict=True):
            assert tree.equal(got, wanted) and sizes == sizes_alone
        if codec == "dense" and rank:
            assert all((got["w"][rank:] == 0).all() for got, *_ in together)


def test_downloads_without_tensors_are_messages_all_the_same() -> None:
    assert Path().down([{}, {}], 1, 0) == Path().down([{}], 1, 0) * 2
