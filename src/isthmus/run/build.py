"""A configuration, built: the one place where the families meet."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as File
from typing import Any, cast, get_args

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from isthmus import catalogue
from isthmus.contracts import Update
from isthmus.errors import InputError, unknown
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.asynchronous import Asynchronous
from isthmus.federated.cohort import Executor, Ground, Owned
from isthmus.federated.executors.sequential import Sequential
from isthmus.federated.executors.vectorised import Vectorised
from isthmus.federated.fleet import Fleet, hours, slowness
from isthmus.federated.gossip import Gossip
from isthmus.federated.masked import Masked
from isthmus.federated.method import Known, Local, Method, Names
from isthmus.federated.path import MEMORY, Path, is_plain
from isthmus.federated.pooled import Pooled
from isthmus.federated.round import Federation
from isthmus.federated.store import ClientStore
from isthmus.learn.graph import Mode
from isthmus.learn.phase import Carry, Plan, Purpose, Visit
from isthmus.learn.recalibrate import freeze_statistics
from isthmus.learn.visit import batch_statistics, sequential
from isthmus.models import optim
from isthmus.models.bind import bind, tensors_of, trainable
from isthmus.models.dropout import keyed
from isthmus.run import compatibility, pieces
from isthmus.run.clients import Clients, clients_of
from isthmus.run.config import Config, explained
from isthmus.tasks import own
from isthmus.tasks.contract import Batch, Items, Role, Splits, Stage, Task, roles
from isthmus.tree import Tree
from isthmus.wire import codecs
from isthmus.wire.codecs import Chain, Codec, ErrorFeedback, Sign
from isthmus.wire.codecs.randomk import RandomK
from isthmus.wire.codecs.topk import TopK
from isthmus.wire.device import Device, count_flops
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

SMALL = 300_000
"""Models of at most this many trained numbers are worth recording (see `learn.graph`)."""

SIZES = ("tiny", "small", "paper")


@dataclass
class Built:
    """A run, ready to start: the federation, and what it is scored on."""

    config: Config
    task: Task
    splits: Splits
    federation: Federation
    module: nn.Module
    clients: Clients


def build(
    config: Config, ledger: Ledger, store: File | None = None, task: Task | None = None
) -> Built:
    """Make everything that a configuration names; what was `auto` is chosen.

    Raises `InputError` naming the field for anything that does not exist or does not fit.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    task = task if task is not None else _task(config)
    size = config.model if config.model in SIZES else "small"
    splits = (
        task.load(config.data_dir)
        if config.data_dir is not None
        else task.synthesise(config.seed, cast(Any, size))
    )
    config, clients = clients_of(config, task, splits)
    stage = task.stages()[0]
    kind = method_of(config.method)
    settings = _settings(kind, config.settings)
    module = keyed(kind.attach(task.build(cast(Any, size), config.seed), settings, config.seed))
    more: dict[str, Any] = {}
    if issubclass(kind, LoraMethod):
        module, more["places"] = _adapted(module, settings, config)
    freeze_statistics(module)
    if "module" in kind.__dataclass_fields__:  # a server that trains knows the network
        more["module"] = module
    config = _resolved(config, stage, kind, module)
    tensors = {name: x.clone() for name, x in tensors_of(module).items()}
    named = _names(kind, stage, module, tensors, more.get("places"))
    rule = _optimiser(config)
    method = kind(
        local=Local(rule, cast(int, config.batch), config.epochs, config.steps),
        stage=stage,
        names=named,
        knobs=settings,
        population=config.clients,
        **more,
    )
    if config.reducer is not None:
        method.reducer = pieces.make("reducer", config.reducer)
    path = _path(config, method)
    schedule = _schedule(config, task, clients)
    compatibility.refuse(_pieces(config, method, path, schedule))
    base = {name: tensors[name] for name in tensors if name in _base_names(named)}
    kept = method.keep(tensors)
    if path.feedback is not None:
        kept = {**kept, **_memory(config, method, tensors, kept)}
    flops = _flops(stage, module, tensors, named, clients.train)
    ground = Ground(module, base, dict(clients.train.columns), Owned.of(clients.parts))
    ground.cost = _cost(method, ground, tensors, flops)
    engine = Pooled if method.gathers else ENGINES[schedule.kind]
    masked = _masked(config)
    path.late = engine is Federation and masked is None and path.may_be_late(method)
    federation = engine(
        method=method,
        ground=ground,
        path=path,
        executor=_executor(config, method),
        schedule=schedule,
        store=ClientStore(kept, store),
        ledger=ledger,
        link=Link.parse(config.link, config.seed),
        fleet=_fleet(config),
        server=Device.named("server"),
        seed=config.seed,
        flops=flops,
        deadline=config.deadline,
        masked=masked,
        lr=partial(_rate, cast(float, config.lr), config.lr_decay),
        state=method.init(tensors),
        ranks=_ranks(config, settings, method),
        versions=np.zeros(config.clients, np.int64),
        names=clients.names,
    )
    return Built(config, task, splits, federation, module, clients)


ENGINES: dict[str, type[Federation]] = {
    "sync": Federation,
    "async": Asynchronous,
    "gossip": Gossip,
}
"""Who plays a schedule, by its kind."""


def _schedule(config: Config, task: Task, clients: Clients) -> Any:
    """The schedule with what it needs of the run."""
    made = pieces.make(
        "schedule",
        config.schedule,
        population=config.clients,
        cohort=config.cohort or config.clients,
        seed=config.seed,
        sampling=config.sampling,
        histograms=_histograms(task, clients),
        sizes=[len(part) for part in clients.parts],
        rounds=config.rounds,
    )
    gone = {"sync": (), "async": ("sampling", "deadline"), "gossip": UNSERVED}[made.kind]
    for name in gone:
        if getattr(config, name) != Config.model_fields[name].default:
            allowed = f"the default with schedule {config.schedule}"
            raise InputError(name, getattr(config, name), allowed)
    if made.kind == "gossip" and config.cohort != config.clients:
        allowed = f"all {config.clients} with schedule {config.schedule}"
        raise InputError("cohort", config.cohort, allowed)
    return made


UNSERVED = ("sampling", "deadline", "dropout", "awake", "battery")
"""Settings that have no meaning where all peers take part in every round."""


def _histograms(task: Task, clients: Clients) -> np.ndarray:
    """How many items of each class every client has `[n, classes]`; one class without labels.

    Items of a negative class, as unlabelled ones have, are not counted."""
    labels = task.labels(clients.train)
    if labels is None:
        labels = np.zeros(len(clients.train), np.int64)
    classes = int(labels.max(initial=0)) + 1
    held = [labels[part] for part in clients.parts]
    return np.stack([np.bincount(own[own >= 0], minlength=classes) for own in held])


def _fleet(config: Config) -> Fleet:
    return Fleet(
        [Device.named(name) for name in config.devices],
        config.clients,
        config.seed,
        slowness(config.speeds, config.clients, config.seed),
        config.jitter,
        config.dropout,
        hours(config.awake) if config.awake is not None else None,
        config.battery,
    )


def _rate(lr: float, decay: float, round: int) -> float:
    return lr * decay ** (round - 1)


def _task(config: Config) -> Task:
    if config.task == "text" and config.model not in (None, *SIZES):
        return own.find("text", language=config.model)
    if config.model is not None and config.model not in SIZES:
        raise unknown("model", config.model, SIZES)
    return own.find(config.task)


def method_of(name: str) -> type[Method]:
    """The class of a method, or of several joined by `+`: `dbe+fedprox` is DBE over FedProx.

    Each part calls `super()` for what it leaves alone, so the parts are bases of one class whose
    settings are those of all. Raises `InputError` for a first part that is no plug-in.
    """
    plugs = name.split("+") if ".py:" not in name else [name]
    kinds: list[type[Method]] = []
    for part in plugs:
        found = catalogue.find("method", part)
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise InputError("method", part, "a class that derives from Method")
        kinds.append(found)
    for kind, part in zip(kinds[:-1], plugs, strict=False):
        if not kind.plugs_in:
            plain = [n for n in catalogue.names("method") if catalogue.find("method", n).plugs_in]
            raise InputError("method", name, f"{' or '.join(plain)} before the +, not {part}")
    if len(kinds) == 1:
        return kinds[0]
    every = list(dict.fromkeys(k.Settings for k in kinds))
    own = [s for s in every if not any(t is not s and issubclass(t, s) for t in every)]
    settings = type("Settings", tuple(own), {})
    return type("+".join(k.__name__ for k in kinds), tuple(kinds), {"Settings": settings})


def _settings(kind: type[Method], given: dict[str, Any]) -> Any:
    try:
        return kind.Settings(**given)
    except ValidationError as error:
        raise explained(error, kind.Settings, "settings.") from None


def _adapted(module: nn.Module, settings: Any, config: Config) -> tuple[nn.Module, Any]:
    from isthmus.models import adapter

    rank = max([settings.rank, *config.ranks])
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    wider = rank / settings.rank  # the scale stays that of the method's own rank
    alpha = settings.alpha * (wider**0.5 if settings.rslora else wider)
    wrapped = adapter.attach(module, rank, alpha, targets, rslora=settings.rslora, seed=config.seed)
    wrapped.eval()
    return wrapped, adapter.Handle(wrapped).places


def _names(
    kind: type[Method], stage: Stage, module: nn.Module, tensors: Tree, places: Any
) -> Names:
    given: dict[str, Role] = roles(stage, tensors)
    if places is not None:
        learned = set(trainable(module))
        given = {n: "shared" if n in learned else "frozen" for n in given}
    given = kind.roles(given, places or {})
    by = {role: tuple(n for n, r in given.items() if r == role) for role in set(given.values())}
    asks = set(trainable(module))
    moving = [n for n in tensors if given[n] in ("shared", "local") and n in asks]
    return Names(
        shared=by.get("shared", ()),
        local=by.get("local", ()),
        frozen=by.get("frozen", ()),
        trainable=tuple(moving),
        recalibrate=by.get("recalibrate", ()),
        follow=by.get("follow", ()),
    )


def _base_names(named: Names) -> set[str]:
    return {*named.frozen, *named.recalibrate, *named.follow}


def _resolved(config: Config, stage: Stage, kind: type[Method], module: nn.Module) -> Config:
    """Write out everything that was left to choose."""
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    executor = config.executor
    if executor == "auto":
        executor = "vectorised" if kind.vectorise else "sequential"
    compile = config.compile
    if compile == "auto":
        several = executor in ("vectorised", "ray")
        compile = "trace" if several and size <= SMALL else "none"
        # A recording is of one number of clients, which changes where pending visits come together.
        changing = pieces.kind_of("schedule", config.schedule).kind == "async"
        if issubclass(kind, LoraMethod) or changing:
            compile = "none"
    return config.model_copy(
        update={
            "executor": executor,
            "compile": compile,
            "batch": stage.batch_size if config.batch is None else config.batch,
            "optimiser": config.optimiser or stage.optimiser,
            "lr": stage.lr if config.lr is None else config.lr,
            "cohort": min(config.cohort or config.clients, config.clients)
            if config.cohort is None
            else config.cohort,
            "threads": torch.get_num_threads(),
            "workers": config.workers or (os.cpu_count() or 1) * (executor == "ray"),
        }
    )


def _optimiser(config: Config) -> optim.Optimiser:
    text = cast(str, config.optimiser)
    return optim.parse(text, lr=config.lr)


def _executor(config: Config, method: Method) -> Executor:
    if config.executor == "sequential":
        return Sequential()
    if config.executor == "flower":
        from isthmus.federated.executors.flower import InProcess

        return InProcess()
    if config.executor == "ray":
        from isthmus.federated.executors.ray import Ray

        return Ray(config.workers, cast(Mode, config.compile), config.chunk)
    return Vectorised(cast(Mode, config.compile), config.chunk)


def _ranks(config: Config, settings: Any, method: Method) -> np.ndarray:
    if not isinstance(method, LoraMethod):
        if config.ranks:
            raise InputError("ranks", list(config.ranks), "none: the method trains no adapter")
        return np.zeros(config.clients, np.int64)
    ranks = config.ranks or (settings.rank,)
    if method.one_rank and len(set(ranks)) > 1:
        raise InputError("ranks", list(ranks), f"one rank for all with method {config.method}")
    return np.array([ranks[i % len(ranks)] for i in range(config.clients)], np.int64)


def _path(config: Config, method: Method) -> Path:
    codec = codecs.parse(config.codec)
    path = Path(
        codec=codec,
        download=codecs.parse(config.download),
        guard=config.guard,
        axes=method.rank_axes(),
    )
    if config.feedback:
        path.feedback = ErrorFeedback(codec)
    if config.clip is not None:
        from isthmus.privacy.clip import clip_rows

        path.clip = partial(clip_rows, bound=config.clip)
    if config.privacy != "none":
        path = replace(path, **_mechanism(config))
    if config.selector is not None:
        path.selectors = [pieces.make("selector", config.selector)]
    if config.attack is not None:
        path.attack = pieces.make("attack", config.attack)
        if not 1 <= config.attackers < config.clients:
            raise InputError("attackers", config.attackers, f"1 to {config.clients - 1}")
        path.attackers = frozenset(range(config.attackers))
    elif config.attackers:
        raise InputError("attackers", config.attackers, "0 without an attack")
    return path


def _memory(config: Config, method: Method, tensors: Tree, kept: Tree) -> Tree:
    """The codec's error before the first message: zeros for each tensor of an upload."""
    if method.sends_values:
        allowed = f"false with method {config.method}, which sends factors and not changes"
        raise InputError("feedback", True, allowed)
    update = first_upload(method, tensors, kept)
    parts = {"delta": update.delta, "buffers": update.buffers, "scalars": update.scalars}
    return {
        f"{MEMORY}{part}/{name}": torch.zeros_like(x)
        for part, held in parts.items()
        for name, x in held.items()
        if x.is_floating_point()
    }


def first_upload(method: Method, tensors: Tree, kept: Tree, purpose: Purpose = "train") -> Update:
    """What a client that has not trained would send: the names, types and shapes of an upload."""
    visit, down, params, carry = _first_start(method, tensors, kept, purpose)
    return method.finish(visit, params, down, carry, kept)[0]


def _first_start(
    method: Method, tensors: Tree, kept: Tree, purpose: Purpose = "train"
) -> tuple[Visit, Tree, Tree, Carry]:
    """The first client's first visit, to learn from it what is sent and what a step costs."""
    real = next((x.dtype for x in tensors.values() if x.is_floating_point()), torch.float32)
    zero, one = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=real)
    visit = Visit(zero, zero, zero, zero, zero, one, one, one, purpose=purpose)
    down = method.send(method.init(tensors), Known(0, 0, 0))
    return visit, down, *method.start(visit, down, kept)


def _mechanism(config: Config) -> dict[str, Any]:
    if config.clip is None:
        raise InputError("clip", None, f"a bound with privacy {config.privacy}")
    if config.privacy == "local":
        return {
            "local": pieces.make(
                "mechanism", "local-dp", noise_multiplier=config.noise, clip=config.clip
            )
        }
    rate = (config.cohort or config.clients) / config.clients
    sampling = {"poisson": "poisson", "fixed": "without-replacement"}[config.sampling]
    made = pieces.make(
        "mechanism",
        "dp-fedavg",
        noise_multiplier=config.noise,
        clip=config.clip,
        population=config.clients,
        rate=rate,
        sampling=sampling if rate < 1 else "none",
    )
    return {"central": made}


def _masked(config: Config) -> Masked | None:
    if config.mask is None:
        return None
    if config.clip is None:
        raise InputError("clip", None, "a bound with a mask: it is the scale that all share")
    return Masked(pieces.make("mechanism", config.mask), config.clip)


def _kinds(codec: Codec) -> Sequence[str]:
    if isinstance(codec, Chain):
        return [*_kinds(codec.first), *_kinds(codec.then)]
    if isinstance(codec, TopK | RandomK):
        return ["sparse"]
    return ["real"] if codec.floats and not isinstance(codec, Sign) else ["discrete"]


def _pieces(config: Config, method: Method, path: Path, schedule: Any) -> compatibility.Pieces:
    """What this configuration puts on the path, in the words of the rules."""
    if method.stacks:
        reducer = "stack"
        if config.reducer is not None:
            raise InputError("reducer", config.reducer, f"none: {config.method} keeps each upload")
    elif isinstance(method, LoraMethod):
        reducer = "adapter-product" if method.product_space else "adapter-factor"
        if config.reducer is not None:
            raise InputError("reducer", config.reducer, f"none: {config.method} has its own")
    else:
        reducer = "mean" if config.reducer is None else "coordinate"
    kinds = dict.fromkeys(_kinds(path.codec))
    if config.mask is not None and is_plain(path.codec):
        kinds = {"integer-shared-scale": None}  # made by the mask itself
    sends = {"values"} if method.sends_values else {"delta"}
    told = {"scalars"} if getattr(schedule, "needs_loss", False) else set[str]()
    return compatibility.Pieces(
        codec=cast(Any, ("sparse",) if "sparse" in kinds else tuple(kinds)),
        clip=config.clip is not None,
        local_noise=path.local is not None,
        central_noise=path.central is not None,
        server=cast(Any, (*["selector"] * len(path.selectors), reducer)),
        attack=path.attack is not None,
        mask=config.mask is not None,
        individual=config.mask is not None
        and (method.reads_meta or type(method).reduce is not Method.reduce),
        schedule=schedule.kind,
        cache=getattr(schedule, "keeps_cache", False),
        backbone=getattr(method, "keeps_base", False),
        gathers=method.gathers,
        server_half=_server_half(type(method)),
        executor=config.executor,
        weights="fixed" if path.central is not None else "examples",
        sends=frozenset(cast(Any, sends | told)),
        covered=frozenset(cast(Any, sends)) if config.privacy != "none" else frozenset(),
        public=frozenset(cast(Any, config.public)),
        vectorise=method.vectorise,
    )


def _server_half(kind: type[Method]) -> bool:
    """True when the server does more than add the mean change to one model."""
    hooks = ("init", "send", "reduce", "server", "served", "base")
    return any(getattr(kind, hook) is not getattr(Method, hook) for hook in hooks)


def _flops(stage: Stage, module: nn.Module, tensors: Tree, named: Names, items: Items) -> float:
    """FLOPs of one gradient on one example, counted."""
    size = 2 if batch_statistics(module) else 1  # one item has no variance
    columns = items.take([0] * size).columns
    batch = Batch(columns, torch.ones(size), torch.zeros((), dtype=torch.int64))

    def gradient() -> None:
        leaves = {n: tensors[n].detach().requires_grad_() for n in named.trainable}
        loss, _ = stage.loss(bind(module, {**tensors, **leaves}, key=batch.key), batch)
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)

    return count_flops(gradient) / size


def _cost(
    method: Method, ground: Ground, tensors: Tree, flops: float
) -> dict[str, tuple[float, float]]:
    """What a step of each phase costs, and each example in it, in gradients of the stage's loss.

    Counted by taking a step on one example and one on two; empty for a method whose only step is
    that gradient.
    """
    kind = type(method)
    plain = kind.phases is Method.phases and kind.step is Method.step and kind.loss is Method.loss
    if plain or not flops:
        return {}
    least = 2 if ground.exact else 1  # one item has no variance
    _, _, params, carry = _first_start(method, tensors, method.keep(tensors))
    cost: dict[str, tuple[float, float]] = {}
    phases = {phase.name: phase for word in get_args(Purpose) for phase in method.phases(word)}
    for name, phase in phases.items():
        counted: list[int] = []
        for size in (least, least + 1):
            index = torch.zeros(1, size, dtype=torch.int64)
            plan = Plan(index, torch.ones(1, size, dtype=ground.dtype))
            step = partial(
                sequential, phase, ground.module, ground.base, params, carry, ground.columns,
                plan, 0, torch.tensor(1e-3, dtype=ground.dtype),
            )  # fmt: skip
            counted.append(count_flops(step))
        example = counted[1] - counted[0]
        cost[name] = (counted[0] - least * example) / flops, example / flops
    return cost


def environment(command: Sequence[str] = ()) -> dict[str, Any]:
    """What the run was started by and ran on: command, versions, number of threads."""
    import isthmus

    return {
        "isthmus": isthmus.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"command": list(command)} if command else {}),
    }
