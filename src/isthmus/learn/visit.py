"""One phase of local work, for one client or for a cohort at once.

`sequential` is the reference: one client, `torch.autograd.grad`. `vectorised` maps the same
step over n clients with `torch.vmap(torch.func.grad)`, and may record or compile it (see
`learn.graph`). Frozen tensors are not stacked, so a frozen backbone sees all clients as one
batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus import seeds
from isthmus.learn.graph import Graphs, Nest
from isthmus.learn.phase import Carry, Opt, Phase, Plan, Work
from isthmus.models.bind import bind
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

UNROLLED = 4
"""Visits of at most this many steps are recorded as one piece."""


def _one_step(
    phase: Phase,
    module: nn.Module,
    functional: bool,
    fixed: Mapping[str, Tensor],
    params: Tree,
    state: Tree,
    carry: Carry,
    lr: Tensor,
    batch: Batch,
) -> tuple[Tree, Tree, Carry, Tensor, dict[str, Tensor], int]:
    """One call of the phase's step: new params, optimiser state, carry, first loss, aux, grads."""
    seen: list[tuple[Tensor, dict[str, Tensor]]] = []

    def loss(params: Tree) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        value, aux = phase.loss(bind(module, {**fixed, **params}, key=batch.key), batch, carry)
        return value, (value, aux)

    def grad(params: Tree) -> tuple[Tree, dict[str, Tensor]]:
        if functional:
            grads, (_, (value, aux)) = torch.func.grad_and_value(loss, has_aux=True)(params)
        else:
            leaves = {name: x.detach().requires_grad_() for name, x in params.items()}
            with torch.enable_grad():
                total, (value, aux) = loss(leaves)
                got = torch.autograd.grad(
                    total, list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            grads = dict(zip(leaves, got, strict=True))
            value, aux = value.detach(), {name: x.detach() for name, x in aux.items()}
        seen.append((value, aux))
        return grads, aux

    params, opt, carry = phase.step(grad, params, Opt(phase.optimiser, state, lr), carry, batch)
    value, aux = seen[0] if seen else (torch.zeros(()), {})
    return params, opt.state, carry, value, aux, len(seen)


def sequential(
    phase: Phase,
    module: nn.Module,
    base: Mapping[str, Tensor],
    params: Tree,
    carry: Carry,
    columns: Mapping[str, Tensor],
    plan: Plan,
    key: int,
    lr: Tensor,
) -> Work:
    """The phase for one client; `plan.index` points into the rows of `columns`.

    `base` are tensors that every client has alike, `params` all tensors of this client that
    may differ from them. Padded rows are left out, so batch statistics are the real ones.
    """
    mine = {name: params[name] for name in phase.trainable}
    fixed = {**base, **{name: x for name, x in params.items() if name not in mine}}
    state = phase.optimiser.init(mine)
    losses: list[Tensor] = []
    logged: list[dict[str, Tensor]] = []
    examples, grads = 0.0, 0
    for t in range(plan.index.shape[0]):
        live = plan.weight[t] > 0
        if not bool(live.any()):
            continue
        rows, weight = plan.index[t][live], plan.weight[t][live]
        step_key = torch.tensor(seeds.fold(key, t), dtype=torch.int64)
        batch = Batch({name: x[rows] for name, x in columns.items()}, weight, step_key)
        with torch.no_grad():
            mine, state, carry, value, aux, grads = _one_step(
                phase, module, False, fixed, mine, state, carry, lr, batch
            )
            if phase.follow is not None:
                followed = phase.follow({**fixed, **mine})
                fixed.update(followed)
                params = {**params, **followed}
        losses.append(value)
        logged.append(aux)
        examples += float(weight.numel())
        if phase.until is not None and bool(phase.until(mine, carry, value)):
            break
    steps = len(losses)
    mean = torch.stack(losses).mean() if losses else torch.zeros(())
    aux = (
        {name: torch.stack([a[name] for a in logged]).mean() for name in logged[0]}
        if logged
        else {}
    )
    return Work(
        {**params, **mine},
        carry,
        mean,
        aux,
        torch.tensor(float(steps)),
        torch.tensor(examples),
        grads,
    )


def vectorised(
    phase: Phase,
    module: nn.Module,
    base: Mapping[str, Tensor],
    params: Tree,
    carry: Carry,
    columns: Mapping[str, Tensor],
    plan: Plan,
    keys: np.ndarray,
    lr: Tensor,
    graphs: Graphs,
    exact: bool | None = None,
) -> Work:
    """The phase for n clients: `params` and `carry` stacked `[n, ...]`, plan `[n, T, b]`.

    A tensor of `params` that is the same for all clients may come expanded (stride 0): it is
    then read once. Rows of weight 0 are padding; a client whose steps are used up, or whom
    `until` has stopped, keeps its tensors. Clients of a model with batch statistics must have
    plans of one shape, because a padded row would count in those; `exact` says whether it is
    one, if the caller knows.
    """
    n, planned, _ = plan.index.shape
    if planned == 0:
        nothing = torch.zeros(n)
        return Work(params, carry, nothing, {}, nothing, nothing, 0)
    exact = batch_statistics(module) if exact is None else exact
    live = plan.weight.amax(-1) > 0
    ragged = phase.until is not None or not bool(live.all())
    step_keys = keys_of_steps(keys, planned)
    if short(plan, exact):
        function = Whole(phase, module, ragged)
        sequence = {"index": plan.index, "weight": plan.weight, "key": step_keys, "live": live}
        out, grads = graphs.call(
            function.tag, function, dict(base), params, carry, dict(columns), sequence, lr
        )
        return Work(**out, grads=grads)
    mine, rest = parted(phase, params)
    state: Tree | None = None
    done = torch.zeros(n, dtype=torch.bool)
    losses, logged, active = [], [], []
    grads = 0
    for t in range(planned):
        part = slice(t, t + 1)
        width = int((plan.weight[:, part] > 0).sum(-1).max()) if exact else None
        index, weight = plan.index[:, part, :width], plan.weight[:, part, :width]
        sequence = {
            "columns": {name: x[index] for name, x in columns.items()},
            "weight": weight,
            "key": step_keys[:, part],
            "live": live[:, part],
        }
        function = Steps(phase, module, ragged, state is None, _shared(mine))
        held = {name: x[0] for name, x in mine.items()} if function.shared else mine
        alike, apart = _alike(rest)
        given = ({**base, **alike}, apart, held, state or {}, carry, sequence, done, lr)
        out, grads = graphs.call(function.tag, function, *given)
        mine, state, carry, done = out["params"], out["state"], out["carry"], out["done"]
        rest.update(out["followed"])
        losses.append(out["loss"])
        logged.append(out["aux"])
        active.append(out["active"])
        if phase.until is not None and bool(done.all()):
            break
    weight = plan.weight[:, : len(losses)]
    sums = _summed(
        torch.cat(losses, dim=1),
        {name: torch.cat([a[name] for a in logged], dim=1) for name in logged[0]},
        torch.cat(active, dim=1),
        weight,
    )
    return Work({**rest, **mine}, carry, **sums, grads=grads)


def short(plan: Plan, exact: bool) -> bool:
    """True for a plan that is worth recording as one piece."""
    return 0 < plan.index.shape[-2] <= UNROLLED and not exact


def keys_of_steps(keys: np.ndarray, steps: int) -> Tensor:
    """The keys of the steps of n visits: int64 `[n, T]`."""
    return torch.from_numpy(seeds.keys_grid(keys, steps))


def keys_within(keys: Tensor, steps: int) -> Tensor:
    """`keys_of_steps` as operations on tensors, which a recording drops where no step draws."""
    return seeds.fold(keys[:, None], torch.arange(steps))


def parted(phase: Phase, params: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
    """The tensors that a phase trains, and the others."""
    mine = {name: params[name] for name in phase.trainable}
    return mine, {name: x for name, x in params.items() if name not in mine}


def _alike(stacked: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
    """The tensors that all clients have alike (unstacked), and the others."""
    alike = {name: x[0] for name, x in stacked.items() if x.shape[0] > 1 and x.stride(0) == 0}
    return alike, {name: x for name, x in stacked.items() if name not in alike}


def _summed(loss: Tensor, aux: Tree, active: Tensor, weight: Tensor) -> dict[str, Any]:
    """Means over the steps that were taken, per client, and how many there were."""
    taken = active.to(loss.dtype)
    steps = taken.sum(1)
    many = steps.clamp_min(1.0)
    return {
        "loss": torch.where(active, loss, 0.0).sum(1) / many,
        "aux": {name: torch.where(active, x, 0.0).sum(1) / many for name, x in aux.items()},
        "steps": steps,
        "examples": ((weight > 0).sum(-1) * taken).sum(1),
    }


class Whole:
    """All steps of a short phase as one function of tensors, from the pool of data on."""

    def __init__(self, phase: Phase, module: nn.Module, ragged: bool) -> None:
        self.phase, self.module, self.ragged = phase, module, ragged
        self.tag = (phase, id(module), ragged)

    def __call__(
        self, base: Tree, params: Tree, carry: Carry, columns: Tree, sequence: Tree, lr: Tensor
    ) -> tuple[Nest, int]:
        mine, rest = parted(self.phase, params)
        shared = _shared(mine)
        held = {name: x[0] for name, x in mine.items()} if shared else mine
        alike, apart = _alike(rest)
        batches = {name: x[sequence["index"]] for name, x in columns.items()}
        done = torch.zeros_like(sequence["live"][:, 0])
        out, grads = Steps(self.phase, self.module, self.ragged, True, shared)(
            {**base, **alike}, apart, held, {}, carry, {**sequence, "columns": batches}, done, lr
        )
        sums = _summed(out["loss"], out["aux"], out["active"], sequence["weight"])
        params = {**rest, **out["followed"], **out["params"]}
        return {"params": params, "carry": out["carry"], **sums}, grads


class Steps:
    """Some consecutive steps of a phase as one function of tensors."""

    def __init__(
        self, phase: Phase, module: nn.Module, ragged: bool, first: bool, shared: bool
    ) -> None:
        self.phase, self.module, self.ragged = phase, module, ragged
        self.first, self.shared = first, shared
        self.tag = (phase, id(module), ragged, first, shared)

    def __call__(
        self,
        base: Tree,
        apart: Tree,
        params: Tree,
        state: Tree,
        carry: Carry,
        sequence: Nest,
        done: Tensor,
        lr: Tensor,
    ) -> tuple[Nest, int]:
        losses, logged, active, followed = [], [], [], {}
        dims: int | None = None if self.shared else 0
        grads = 0
        for t in range(sequence["weight"].shape[1]):
            first = self.first and t == 0

            def step(
                apart: Tree,
                params: Tree,
                state: Tree,
                carry: Carry,
                columns: Tree,
                weight: Tensor,
                key: Tensor,
                live: Tensor,
                done: Tensor,
                first: bool = first,
            ) -> dict[str, Any]:
                nonlocal grads
                if first:
                    state = self.phase.optimiser.init(params)
                fixed = {**base, **apart}
                new, after, later, loss, aux, grads = _one_step(
                    self.phase,
                    self.module,
                    True,
                    fixed,
                    params,
                    state,
                    carry,
                    lr,
                    Batch(columns, weight, key),
                )
                moved = {}
                if self.phase.follow is not None:
                    moved = self.phase.follow({**fixed, **new})
                out: dict[str, Any] = {"loss": loss, "aux": aux, "active": live & ~done}
                if self.ragged:
                    keep = out["active"]
                    new = _where(keep, new, params)
                    after = _where(keep, after, state)
                    later = _where(keep, later, carry)
                    moved = _where(keep, moved, {name: fixed[name] for name in moved})
                    if self.phase.until is not None:
                        done = done | (keep & self.phase.until(new, later, loss))
                return {
                    **out,
                    "params": new,
                    "state": after,
                    "carry": later,
                    "followed": moved,
                    "done": done,
                }

            columns = {name: x[:, t] for name, x in sequence["columns"].items()}
            out = torch.vmap(step, in_dims=(0, dims, 0, 0, 0, 0, 0, 0, 0))(
                apart,
                params,
                state,
                carry,
                columns,
                sequence["weight"][:, t],
                sequence["key"][:, t],
                sequence["live"][:, t],
                done,
            )
            params, state, carry, done = out["params"], out["state"], out["carry"], out["done"]
            apart = {**apart, **out["followed"]}
            followed = out["followed"]
            dims = 0
            losses.append(out["loss"])
            logged.append(out["aux"])
            active.append(out["active"])
        return {
            "params": params,
            "state": state,
            "carry": carry,
            "followed": followed,
            "done": done,
            "loss": torch.stack(losses, dim=1),
            "aux": {name: torch.stack([a[name] for a in logged], dim=1) for name in logged[0]},
            "active": torch.stack(active, dim=1),
        }, grads


def batch_statistics(module: nn.Module) -> bool:
    """True when a training step of `module` normalises by statistics of the batch."""
    return any(isinstance(m, BATCH_NORMS) and m.training for m in module.modules())


def _where(keep: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, dict):
        return {name: _where(keep, x, old[name]) for name, x in new.items()}
    return torch.where(keep, new, old)


def _shared(stacked: Mapping[str, Tensor]) -> bool:
    return all(x.stride(0) == 0 and x.shape[0] > 1 for x in stacked.values())


def expand(tensors: Mapping[str, Tensor], n: int) -> Tree:
    """The same tensors for n clients, without a copy: `[n, *shape]` with stride 0."""
    return {name: x.expand(n, *x.shape) for name, x in tensors.items()}


def stack_alike(trees: Sequence[Mapping[str, Tensor]]) -> Tree:
    """`tree.stack`, but tensors that are one object in all trees are expanded, not copied."""
    first, n = trees[0], len(trees)
    out: Tree = {}
    for name, x in first.items():
        alike = n > 1 and all(other[name] is x for other in trees)
        out[name] = x.expand(n, *x.shape) if alike else torch.stack([t[name] for t in trees])
    return out
