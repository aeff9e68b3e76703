"""Optimisers as pure functions on named tensors, equal to those of `torch.optim`.

`init(params) -> state` and `update(grads, state, params, lr) -> (params, state)`. All state is
tensors, step counts included, in one flat dict ("step", "m/<name>", "v/<name>"), so a client
that has finished keeps its state by `torch.where`, and an update works on stacked clients under
`torch.vmap` and in traced graphs. Nothing is changed in place.

SGD with momentum follows Sutskever et al. (ICML 2013) in torch's form, Adam is Kingma and Ba
(ICLR 2015, algorithm 1), AdamW Loshchilov and Hutter (ICLR 2019, algorithm 2).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from isthmus.errors import InputError, unknown
from isthmus.tree import Tree

Rate = float | Tensor


class Update(Protocol):
    """`(grads, state, params, lr) -> (params, state)`; without `lr`, the optimiser's own."""

    def __call__(
        self,
        grads: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        lr: Rate | None = None,
    ) -> tuple[Tree, Tree]: ...


class Optimiser(NamedTuple):
    """A name, its learning rate, and the pair of functions.

    Parameters without a gradient pass through `update` as they are.

    >>> opt = sgd(lr=0.5)
    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> params, state = opt.update({"w": torch.tensor([2.0, 0.0])}, opt.init(params), params)
    >>> params
    {'w': tensor([0., 2.])}
    """

    name: str
    lr: float
    init: Callable[[Mapping[str, Tensor]], Tree]
    update: Update


def sgd(
    lr: float = 0.1,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clip: float = math.inf,
) -> Optimiser:
    """Stochastic gradient descent: m <- momentum * m + g; p <- p - lr * m.

    With `nesterov`, p <- p - lr * (g + momentum * m). `weight_decay` adds weight_decay * p to
    the gradient; `clip` first scales all gradients together to at most this Euclidean norm.
    """
    own_rate = lr
    _within("momentum", momentum, 0.0, 1.0)
    if nesterov and not momentum:
        raise InputError("nesterov", "true with momentum 0", "true with momentum above 0")
    _not_negative(lr=lr, weight_decay=weight_decay, clip=clip)

    def init(params: Mapping[str, Tensor]) -> Tree:
        return _zeros("m", params) if momentum else {}

    def update(
        grads: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        lr: Rate | None = None,
    ) -> tuple[Tree, Tree]:
        rate = own_rate if lr is None else lr
        new, kept = dict(params), dict(state)
        for name, g in clipped(grads, clip).items():
            p = params[name]
            g = g + weight_decay * p if weight_decay else g
            if momentum:
                m = kept[f"m/{name}"] = momentum * state[f"m/{name}"] + g
                g = g + momentum * m if nesterov else m
            new[name] = p - rate * g
        return new, kept

    return Optimiser("sgd", own_rate, init, update)


def adam(
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float = math.inf,
) -> Optimiser:
    """Adam: p <- p - lr * m_hat / (sqrt(v_hat) + eps); `weight_decay` is added to the gradient."""
    return _adam("adam", lr, beta1, beta2, eps, weight_decay, clip, decoupled=False)


def adamw(
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip: float = math.inf,
) -> Optimiser:
    """Adam with decoupled decay: first p <- (1 - lr * weight_decay) * p."""
    return _adam("adamw", lr, beta1, beta2, eps, weight_decay, clip, decoupled=True)


def _adam(
    label: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    decoupled: bool,
) -> Optimiser:
    own_rate = lr
    _within("beta1", beta1, 0.0, 1.0)
    _within("beta2", beta2, 0.0, 1.0)
    _not_negative(lr=lr, eps=eps, weight_decay=weight_decay, clip=clip)

    def init(params: Mapping[str, Tensor]) -> Tree:
        first = next(iter(params.values()))
        # The count is at least float32: in bfloat16 it would stop at 256.
        kind = torch.promote_types(first.dtype, torch.float32)
        step = torch.zeros((), dtype=kind, device=first.device)
        return {"step": step, **_zeros("m", params), **_zeros("v", params)}

    def update(
        grads: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        lr: Rate | None = None,
    ) -> tuple[Tree, Tree]:
        rate = own_rate if lr is None else lr
        step = state["step"] + 1
        # 1 - beta^t without cancellation; beta = 0 leaves 1.
        unbias1, unbias2 = (
            -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)
            for beta in (beta1, beta2)
        )
        new, kept = dict(params), {**state, "step": step}
        for name, g in clipped(grads, clip).items():
            p = params[name]
            if decoupled:
                p = p * (1.0 - rate * weight_decay)
            elif weight_decay:
                g = g + weight_decay * p
            m = kept[f"m/{name}"] = torch.lerp(state[f"m/{name}"], g, 1.0 - beta1)
            v = kept[f"v/{name}"] = beta2 * state[f"v/{name}"] + (1.0 - beta2) * g * g
            scale = v.sqrt() / unbias2.sqrt().to(v.dtype) + eps
            new[name] = p - (rate / unbias1).to(p.dtype) * (m / scale)
        return new, kept

    return Optimiser(label, own_rate, init, update)


def clipped(grads: Mapping[str, Tensor], norm: float) -> Mapping[str, Tensor]:
    """All gradients scaled together to at most this Euclidean norm, as `clip_grad_norm_` does.

    >>> clipped({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 2.5)["a"]
    tensor([1.5000])
    """
    if norm == math.inf or not grads:
        return grads
    first = next(iter(grads.values()))
    kind = torch.promote_types(first.dtype, torch.float32)
    total = torch.stack([g.to(kind).square().sum() for g in grads.values()]).sum().sqrt()
    factor = torch.clamp(norm / (total + 1e-6), max=1.0)
    return {name: g * factor.to(g.dtype) for name, g in grads.items()}


OPTIMISERS: dict[str, Callable[..., Optimiser]] = {"sgd": sgd, "adam": adam, "adamw": adamw}


def parse(text: str, **defaults: Any) -> Optimiser:
    """An optimiser from one line; what the line says goes before `defaults`.

    >>> parse("adamw:lr=3e-4,weight_decay=0.1").lr
    0.0003
    >>> parse("sgd", lr=0.2).lr
    0.2
    """
    name, _, rest = text.strip().lower().partition(":")
    if name not in OPTIMISERS:
        raise unknown("optimiser", name, OPTIMISERS)
    signature = inspect.signature(OPTIMISERS[name]).parameters
    options = dict(defaults)
    for part in filter(None, rest.split(",")):
        key, _, value = (side.strip() for side in part.partition("="))
        if key not in signature:
            raise unknown(f"option of {name}", key, signature)
        options[key] = _value(key, value, signature[key].default)
    return OPTIMISERS[name](**options)


def _value(key: str, value: str, like: float | bool) -> float | bool:
    if isinstance(like, bool):
        if value not in ("true", "false"):
            raise InputError(key, value, "true, false")
        return value == "true"
    try:
        return float(value)
    except ValueError:
        raise InputError(key, value or "nothing", "a number") from None


def _zeros(prefix: str, params: Mapping[str, Tensor]) -> Tree:
    return {f"{prefix}/{name}": torch.zeros_like(p) for name, p in params.items()}


def _within(field: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise InputError(field, value, f"{low} to below {high}")


def _not_negative(**values: float) -> None:
    for field, value in values.items():
        if not value >= 0:
            raise InputError(field, value, "0 or more")
