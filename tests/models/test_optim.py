"""Every optimiser against `torch.optim`, alone, stacked, traced and masked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.models.optim import adam, adamw, clipped, parse, sgd
from isthmus.tree import Tree

CASES = {
    "sgd": (sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "decay": (sgd(0.1, weight_decay=0.2), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2)),
    "momentum": (
        sgd(0.1, momentum=0.8, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.1),
    ),
    "nesterov": (
        sgd(0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    "adam": (
        adam(0.05, beta1=0.7, beta2=0.95, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.7, 0.95), weight_decay=0.1),
    ),
    "adam-beta0": (
        adam(0.05, beta1=0.0, beta2=0.9, eps=1e-3),
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.0, 0.9), eps=1e-3),
    ),
    "adamw": (
        adamw(0.05, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    ),
}


def start(dtype: torch.dtype = torch.float64, key: int = 0) -> Tree:
    draw = seeds.generator(key, "start")
    return {
        "w": torch.randn(3, 4, generator=draw, dtype=torch.float64).to(dtype),
        "b": torch.randn(2, generator=draw, dtype=torch.float64).to(dtype),
    }


def objective(params: Tree) -> Tensor:
    """Curved, with an interaction, and gradients of unequal size."""
    bowl = (1 + params["w"].square()).sqrt().sum()
    return bowl + 3 * (params["b"] - params["w"].mean()).square().sum()


gradient = torch.func.grad(objective)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_equal_to_torch_over_twenty_steps(name, dtype, rtol) -> None:
    ours, make = CASES[name]
    params = start(dtype)
    theirs = {n: x.clone().requires_grad_() for n, x in params.items()}
    oracle, state = make(list(theirs.values())), ours.init(params)
    for step in range(20):
        rate = ours.lr * (1 + step % 3) / 3
        params, state = ours.update(gradient(params), state, params, rate)
        oracle.param_groups[0]["lr"] = rate
        oracle.zero_grad()
        objective(theirs).backward()
        oracle.step()
        for n in params:
            torch.testing.assert_close(params[n], theirs[n].detach(), rtol=rtol, atol=rtol)
    assert all(x.dtype == dtype for x in [*params.values(), *state.values()])


def test_cases_differ_from_each_other() -> None:
    ends = {}
    for name, (ours, _) in CASES.items():
        params, state = start(), ours.init(start())
        for _ in range(3):
            params, state = ours.update(gradient(params), state, params)
        ends[name] = float(params["w"].sum())
    assert len(set(ends.values())) == len(CASES)


@pytest.mark.parametrize("name", CASES)
def test_stacked_clients_equal_each_alone_also_traced(name) -> None:
    ours, _ = CASES[name]
    alone = [start(key=k) for k in range(3)]
    stacked = {n: torch.stack([a[n] for a in alone]) for n in alone[0]}
    rates = torch.tensor([0.01, 0.02, 0.05], dtype=torch.float64)

    def step(params, state, rate):
        return ours.update(gradient(params), state, params, rate)

    state = torch.vmap(ours.init)(stacked)
    assert all(x.shape[0] == 3 for x in state.values())
    traced = make_fx(torch.vmap(step))(stacked, state, rates)
    graph, graph_state = stacked, state
    states = [ours.init(a) for a in alone]
    for _ in range(4):
        stacked, state = torch.vmap(step)(stacked, state, rates)
        graph, graph_state = traced(graph, graph_state, rates)
        for k in range(3):
            alone[k], states[k] = step(alone[k], states[k], rates[k])
    for k in range(3):
        for tree, own in ((stacked, alone[k]), (graph, alone[k]), (state, states[k])):
            for n, x in own.items():
                torch.testing.assert_close(tree[n][k], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_masked_client_stays_and_then_goes_on(name) -> None:
    """Client 1 pauses for two steps by `where` and ends where it would have without them."""
    ours, _ = CASES[name]
    alone = start(key=1)
    stacked = {n: torch.stack([start()[n], x]) for n, x in alone.items()}
    state, own = torch.vmap(ours.init)(stacked), ours.init(alone)
    for active in ([True, True], [True, False], [True, False], [True, True]):
        new, new_state = torch.vmap(lambda p, s: ours.update(gradient(p), s, p))(stacked, state)
        mask = torch.tensor(active)

        def keep(a: Tree, b: Tree, mask: Tensor = mask) -> Tree:
            return {
                n: torch.where(mask.view(2, *[1] * (x.ndim - 1)), x, b[n]) for n, x in a.items()
            }

        stacked, state = keep(new, stacked), keep(new_state, state)
    for _ in range(2):
        alone, own = ours.update(gradient(alone), own, alone)
    for n, x in alone.items():
        torch.testing.assert_close(stacked[n][1], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_changed_in_place_and_the_rest_passes_through(name) -> None:
    ours, _ = CASES[name]
    params = start()
    state = ours.init(params)
    copies = {n: x.clone() for n, x in (params | state).items()}
    grads = gradient(params)
    new, new_state = ours.update({"w": grads["w"]}, state, params)
    assert all(torch.equal(x, copies[n]) for n, x in (params | state).items())
    assert new["b"] is params["b"] and not torch.equal(new["w"], params["w"])
    assert new.keys() == params.keys() and new_state.keys() == state.keys()


def test_state_is_flat_and_named() -> None:
    assert set(adam().init(start())) == {"step", "m/w", "m/b", "v/w", "v/b"}
    assert set(sgd(momentum=0.9).init(start())) == {"m/w", "m/b"}
    assert sgd().init(start()) == {}


def test_adams_count_survives_bfloat16() -> None:
    ours = adam(lr=0.0)
    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    state = ours.init(params) | {"step": torch.tensor(300.0)}
    new, state = ours.update(params, state, params)
    assert state["step"].item() == 301 and new["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_equals_torch(limit) -> None:
    grads = gradient(start())
    theirs = {n: torch.zeros_like(g).requires_grad_() for n, g in grads.items()}
    for n, x in theirs.items():
        x.grad = grads[n].clone()
    torch.nn.utils.clip_grad_norm_(list(theirs.values()), limit)
    for n, g in clipped(grads, limit).items():
        torch.testing.assert_close(g, theirs[n].grad)
    norm = math.sqrt(sum(float(g.square().sum()) for g in clipped(grads, limit).values()))
    assert norm <= limit * (1 + 1e-9)


def test_clip_is_applied_before_the_step() -> None:
    params, grads = start(), gradient(start())
    a, _ = sgd(0.1, clip=0.5).update(grads, {}, params)
    b, _ = sgd(0.1).update(dict(clipped(grads, 0.5)), {}, params)
    c, _ = sgd(0.1).update(grads, {}, params)
    assert torch.equal(a["w"], b["w"]) and not torch.equal(a["w"], c["w"])


def test_parse_reads_what_the_line_says() -> None:
    one, two = parse("AdamW:lr=5e-2,weight_decay=0.3", lr=9.0), CASES["adamw"][0]
    params, grads = start(), gradient(start())
    assert one.name == "adamw" and one.lr == 0.05
    got, want = (o.update(grads, o.init(params), params)[0]["w"] for o in (one, two))
    assert torch.equal(got, want)
    assert "m/w" in parse("sgd: momentum=0.9, nesterov=true").init(params)
    assert parse("sgd", lr=0.7).lr == 0.7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sdg", "nearest: sgd"),
        ("adam:betas=0.9", "option of adam: betas given"),
        ("adam:lr=fast", "lr: fast given, allowed: a number"),
        ("adam:lr", "lr: nothing given"),
        ("sgd:nesterov=yes,momentum=0.9", "nesterov: yes given, allowed: true, false"),
        ("sgd:nesterov=true", "nesterov: true with momentum 0"),
        ("sgd:momentum=1", "momentum: 1.0 given"),
        ("adam:beta2=1.5", "beta2: 1.5 given"),
        ("sgd:lr=-1", "lr: -1.0 given, allowed: 0 or more"),
        ("sgd:lr=nan", "lr: nan given"),
    ],
)
def test_bad_lines(text, message) -> None:
    with pytest.raises(InputError, match=message):
        parse(text)
