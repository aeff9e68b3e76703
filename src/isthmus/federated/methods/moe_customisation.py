"""MoE customisation: a tiny local expert and a gate beside a global network that stays untouched.

Zhang, Davoodi and Hu, "A mixture of expert approach for low-cost customization of deep neural
networks", 2018, arXiv:1811.00056. Claim: LeNet-5 on EMNIST, customised to the handwriting of ten
users: accuracy on a user's data much higher, on generic data almost the same, at about 2.5 % of
the network's energy and size.

    GE: the shipped network, frozen;  f(x): a feature that it computes anyway
    LE: up(down(f)), of rank r:       trained on the m custom items, by the task's loss
    GN: sigmoid(v f + c):             target 1 for custom and 0 for generic items
    predict:  LE(x) where v f + c > 0, else GE(x)       (or soft: g LE + (1 - g) GE, of softmaxes)

(Reconstructed:) LE's form, GN as a logistic unit on the same feature, the first hidden layer as
that feature (a convolution's is its mean over positions), the optimiser. The generic items are a
small replay set that comes with the model. Without one, as in a federation, GN's target is whether
GE is wrong about the item. Both are trained on the device after deployment and nothing of them is
sent: in a federation GE is the global model of FedAvg, and LE and GN are trained in the `score`
phase. `customise` does the same for any trained network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import catalogue
from isthmus.errors import InputError, unknown
from isthmus.federated.method import Knobs, Method
from isthmus.learn import forward
from isthmus.learn.fit import fit
from isthmus.learn.phase import Carry, Grad, Opt, Phase
from isthmus.models import optim
from isthmus.models.bind import bind
from isthmus.models.factors import Places
from isthmus.models.nets import initialise
from isthmus.tasks.contract import Batch, Items, Role, Stage, Task, weighted_mean
from isthmus.tree import Tree
from isthmus.wire.device import count_flops

OWN = ("local_expert.", "gate.")
GENERIC = "generic"
"""The column that marks the replay set: 1 for generic items, 0 for custom ones."""


class Settings(Knobs):
    """rank: of LE; feature: the child of `features` whose output LE and GN read ("": the first
    hidden layer); switch: how their answers are put together; learn_from: the custom items of LE,
    all or those that GE gets wrong; epochs, batch, lr: of Adam.
    """

    rank: int = Field(default=8, ge=1)
    feature: str = ""
    switch: Literal["hard", "soft"] = "hard"
    learn_from: Literal["all", "wrong"] = "all"
    epochs: int = Field(default=60, ge=1)
    batch: int = Field(default=16, ge=0)
    lr: float = Field(default=1e-2, gt=0.0)


@catalogue.register("moe-customisation", place="method", status="miniature")
class MoECustomisation(Method):
    """Overrides F (a phase for `score`) and E; LE and GN are attached, and local."""

    Settings = Settings

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        return with_expert(module, knobs, seed)

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return {name: "local" if name.startswith(OWN) else role for name, role in given.items()}

    def phases(self, purpose: str) -> list[Phase]:
        """F: GE learns in rounds, LE and GN before predicting."""
        own = tuple(name for name in self.names.trainable if name.startswith(OWN))
        if purpose == "train":
            ge = tuple(name for name in self.names.trainable if name not in own)
            return [replace(phase, trainable=ge) for phase in super().phases(purpose)]
        if purpose != "score":
            return super().phases(purpose)
        k = self.knobs
        plans = replace(self.local, batch=k.batch, epochs=k.epochs, steps=None).plans
        return [Phase("customise", own, self.customise, optim.adam(k.lr), own_rate, plans=plans)]

    def customise(self, model: Any, batch: Batch, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        """L of the `score` phase."""
        return objective(self.stage.loss, model, batch, self.knobs)

    def predict(self, task: Any, model: Any, inputs: Tree, context: Any, kept: Tree) -> Any:
        return task.predict(lambda x: mixture(model, x, self.knobs), inputs, context)


def own_rate(
    grad: Grad, params: Tree, opt: Opt, carry: Carry, batch: Batch
) -> tuple[Tree, Opt, Carry]:
    """The plain step at the optimiser's own rate, which is not that of the rounds."""
    grads, _ = grad(params)
    params, state = opt.rule.update(grads, opt.state, params)
    return params, Opt(opt.rule, state, opt.lr), carry


def cut(model: Any, feature: str) -> int:
    """How many children of `features` come before LE and GN branch off."""
    features, head = getattr(model, "features", None), getattr(model, "head", None)
    if not isinstance(features, nn.Sequential) or not isinstance(head, nn.Linear):
        raise InputError("method", type(model).__name__, "a chain `features` and a linear `head`")
    children = dict(features.named_children())
    if feature:
        if feature not in children:
            raise unknown("settings.feature", feature, children)
        return list(children).index(feature) + 1
    heavy = [i for i, x in enumerate(children.values()) if isinstance(x, nn.Linear | nn.Conv2d)]
    return heavy[1] if len(heavy) > 1 else len(children)


def width(model: Any, at: int) -> int:
    """The width of the feature after `at` children; raises `InputError` where it has none."""
    for layer in reversed(list(model.features)[:at]):
        if isinstance(layer, nn.Linear):
            return layer.out_features
        if isinstance(layer, nn.Conv2d):
            return layer.out_channels
    raise InputError("settings.feature", "no such layer", "one after a linear or convolution layer")


def with_expert(module: Any, knobs: Settings, seed: int) -> nn.Module:
    """The module with LE and GN attached, drawn by `seed`; its other parts are as they were."""
    d = width(module, cut(module, knobs.feature))
    with torch.device("meta"):
        down = nn.Linear(d, knobs.rank, bias=False)
        up = nn.Linear(knobs.rank, module.head.out_features)
        expert, gate = nn.Sequential(OrderedDict(down=down, up=up)), nn.Linear(d, 1)
    like = module.head.weight
    for name, part in (("local_expert", expert), ("gate", gate)):
        drawn = initialise(part.to_empty(device=like.device), seed)
        setattr(module, name, drawn.to(like.dtype))
    return module


class Answers(NamedTuple):
    """What is said about a batch: GE and LE (logits `[b, C]`), GN (a logit `[b, 1]`)."""

    ge: Tensor
    le: Tensor
    gate: Tensor


def answers(model: Any, x: Tensor, feature: str) -> Answers:
    """All three; the feature is computed once."""
    at = cut(model, feature)
    h = model.features[:at](x)
    f = h.flatten(2).mean(2) if h.ndim > 2 else h
    ge = model.head(model.features[at:](h))
    return Answers(ge, model.local_expert(f), model.gate(f))


def mixture(model: Any, x: Tensor, knobs: Settings) -> Tensor:
    """The logits that count; with the soft switch they are log-probabilities."""
    ge, le, gate = answers(model, x, knobs.feature)
    if knobs.switch == "hard":
        return torch.where(gate > 0, le, ge)
    from_le = F.logsigmoid(gate) + le.log_softmax(-1)
    return torch.logaddexp(from_le, F.logsigmoid(-gate) + ge.log_softmax(-1))


def objective(
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]], model: Any, batch: Batch, knobs: Settings
) -> tuple[Tensor, dict[str, Tensor]]:
    """LE's loss on custom items and GN's cross-entropy on all; they share no tensor that learns."""
    said: list[Answers] = []

    def net(x: Tensor) -> Tensor:
        said.append(answers(model, x, knobs.feature))
        return said[-1].le

    loss(net, batch)  # for its inputs: which items LE learns from depends on GE's answers
    ge, le, gate = said[0]
    custom = torch.ones_like(batch.weight)
    target = custom
    if GENERIC in batch.columns:
        target = custom = 1.0 - batch[GENERIC].to(custom.dtype)
    if GENERIC not in batch.columns or knobs.learn_from == "wrong":
        wrong = (ge.argmax(-1) != forward.labels(batch)).to(custom.dtype)
        target = target if GENERIC in batch.columns else wrong
        custom = custom * wrong if knobs.learn_from == "wrong" else custom
    expert, aux = loss(lambda x: le, Batch(batch.columns, batch.weight * custom, batch.key))
    each = F.softplus(gate[:, 0]) - target * gate[:, 0]
    return expert + weighted_mean(each, batch.weight), aux


class Customised(nn.Module):
    """A network with its expert and gate; `forward` gives the logits that count."""

    def __init__(self, model: nn.Module, knobs: Settings) -> None:
        super().__init__()
        self.model, self.knobs = model, knobs

    def forward(self, x: Tensor) -> Tensor:
        return mixture(self.model, x, self.knobs)

    def answers(self, x: Tensor) -> Answers:
        """What GE, LE and GN say."""
        return answers(self.model, x, self.knobs.feature)


def customise(
    task: Task,
    model: nn.Module,
    custom: Items,
    generic: Items | None = None,
    knobs: Settings | None = None,
    key: int = 0,
) -> Customised:
    """LE and GN for a trained network from a user's items, with a replay set if there is one.

    The network stays as it is and is shared, not copied. Raises `InputError` for a network
    without a chain `features` and a linear `head`.
    """
    knobs = knobs or Settings()
    twin = with_expert(bind(model, {}), knobs, key)
    items = custom
    if generic is not None:
        flag = torch.cat([torch.zeros(len(custom)), torch.ones(len(generic))])
        columns = {n: torch.cat([x, generic.columns[n]]) for n, x in custom.columns.items()}
        items = Items({**columns, GENERIC: flag})
    loss = task.stages()[0].loss

    def both(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return objective(loss, model, batch, knobs)

    own = [name for name, _ in twin.named_parameters() if name.startswith(OWN)]
    fitted = fit(
        Stage("customise", both), twin, items, optimiser=optim.adam(knobs.lr),
        epochs=knobs.epochs, batch=knobs.batch, key=key, trainable=own,
    )  # fmt: skip
    return Customised(bind(twin, {name: fitted.tensors[name] for name in own}), knobs)


class Overhead(NamedTuple):
    """LE and GN in shares of GE: numbers stored, and multiply-adds of one prediction."""

    parameters: float
    macs: float


def overhead(made: Customised, x: Tensor) -> Overhead:
    """What customisation adds to storing the network and to one forward pass of `x`."""
    ge, own = 0, 0
    for name, p in made.model.named_parameters():
        own, ge = (own + p.numel(), ge) if name.startswith(OWN) else (own, ge + p.numel())
    model: Any = made.model
    with torch.no_grad():
        alone = count_flops(lambda: model.head(model.features(x)))
        together = count_flops(made.answers, x)
    return Overhead(own / ge, (together - alone) / alone)
