"""What a run ends in: a model on disk that can be loaded, served and trained further.

`model/` holds safetensors of all tensors, or for adapters peft's own format beside
`backbone.safetensors`, the weights of the backbone that the run has changed (if any).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import nn

from isthmus.errors import InputError
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.models.bind import tensors_of, write
from isthmus.run.build import SIZES, Built, method_of
from isthmus.run.config import Config
from isthmus.tasks import own
from isthmus.tasks.contract import Task
from isthmus.tree import Tree

WEIGHTS, BACKBONE, ADAPTER = "model.safetensors", "backbone.safetensors", "adapter_config.json"


def save(folder: Path, built: Built, model: nn.Module) -> None:
    """Write `model/`."""
    target = folder / "model"
    target.mkdir(exist_ok=True)
    method = built.federation.method
    if isinstance(method, LoraMethod):
        from isthmus.models.adapter import Handle

        Handle(model).save(target)
        changed = method.base(built.federation.state)
        if changed:
            _write(target / BACKBONE, changed)
        return
    _write(target / WEIGHTS, tensors_of(model))


def _write(path: Path, tensors: Tree) -> None:
    save_file({name: x.detach().contiguous() for name, x in tensors.items()}, str(path))


def load(folder: Path, config: Config | None = None, task: Task | None = None) -> nn.Module:
    """The model of the run in `folder`; `task` is that of a run that was given one of its own.

    Raises `InputError` for a run that has not finished.
    """
    target = folder / "model"
    if not target.is_dir():
        raise InputError("run", folder, "the folder of a finished run, with model/ in it")
    if config is None:
        config = Config.make(Config.read(folder / "config.yaml"))
    language = (
        config.model if config.task == "text" and config.model not in (None, *SIZES) else None
    )
    if task is None:
        task = own.find(config.task, language=language) if language else own.find(config.task)
    size = config.model if config.model in SIZES else "small"
    kind = method_of(config.method)
    settings = kind.Settings(**config.settings)
    module = kind.attach(task.build(cast(Any, size), config.seed), settings, config.seed)
    if (target / ADAPTER).exists():
        from isthmus.models import adapter

        wrapped = adapter.load(module, target)
        if (target / BACKBONE).exists():
            write(wrapped, load_file(str(target / BACKBONE)))
        return wrapped.eval()
    return write(module, load_file(str(target / WEIGHTS))).eval()


def language_of(name: str) -> Any:
    """The language model called `name`, which may be the folder of a run of task `text`.

    Raises `InputError` as `models.language.load` does, and for a run of another task.
    """
    from dataclasses import replace

    from isthmus.models import language

    folder = Path(name).expanduser()
    if not (folder / "config.yaml").is_file():
        return language.load(name)
    config = Config.make(Config.read(folder / "config.yaml"))
    if config.task != "text":
        raise InputError("model", f"{name} (a run of task {config.task})", "a run of task text")
    base = config.model if config.model not in (None, *SIZES) else "embedded"
    model: Any = load(folder, config)
    return replace(language.load(cast(str, base)), model=model, name=str(name))
