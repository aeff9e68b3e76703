"""The one handle on LoRA: puts factors on a model through peft, reads, writes, merges, saves.

This is the only file that knows peft's names, the transposed weight of `Conv1D` and the
scale `alpha / r` or `alpha / sqrt(r)`; the mathematics of a pair is in `isthmus.models.factors`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from isthmus import seeds
from isthmus.errors import InputError, unknown
from isthmus.models.factors import Factors, Pair, Place, Places, fresh, merged
from isthmus.tree import Tree

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_REFUSED = (
    *("use_dora", "kasa_config", "lora_bias", "target_parameters", "velora_config"),
    *("monteclora_config", "use_qalora", "use_bdlora", "arrow_config"),
    *("alora_invocation_tokens", "layer_replication", "trainable_token_indices"),
)
_OURS = ("r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "init_lora_weights")
_SAME_ON_DISK = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_HELD = "residual"


def check_config(settings: Mapping[str, Any]) -> None:
    """Refuse the variants whose weight is not `W + s B A`, naming the first one set."""
    for field in _REFUSED:
        if settings.get(field):
            raise InputError(field, settings[field], "plain LoRA (leave it unset)")


def attach(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    targets: str | Sequence[str] = "all-linear",
    *,
    rslora: bool = False,
    seed: int = 0,
    **more: Any,
) -> PeftModel:
    """Wrap `model` with LoRA: B = 0, A drawn from (seed, layer), no dropout, backbone frozen.

    `targets`: "all-linear" or endings of module paths. `more`: other fields of
    `peft.LoraConfig` (`rank_pattern`, `alpha_pattern`, `exclude_modules`, `modules_to_save`).
    Raises `InputError` for DoRA, KaSA, LoRA bias, `target_parameters` and the other variants,
    for unknown fields and for targets that match nothing.
    """
    import peft

    if rank < 1 or alpha <= 0:
        raise InputError("rank, alpha", f"{rank}, {alpha}", "a rank of 1 or more, alpha above 0")
    check_config(more)
    open_fields = [name for name in peft.LoraConfig.__dataclass_fields__ if name not in _OURS]
    for field in more:
        if field not in open_fields:
            raise unknown("LoraConfig", field, open_fields)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # any number works
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=rslora,
        lora_dropout=0.0,
        **more,
    )
    wrapped = _wrap(model, config)
    handle = Handle(wrapped)
    for name, at in handle.places.items():
        own = fresh(seeds.key(seed, "lora", name), at.rank, at.shape[1])
        handle.set_factors(name, Factors(torch.zeros(at.shape[0], at.rank), own, at.scale))
    return wrapped


def load(model: nn.Module, folder: str | Path) -> PeftModel:
    """Wrap `model` with the adapter that lies in `folder` in peft's format, ready to train on."""
    config = _config_of(folder)
    wrapped = _wrap(model, config)
    Handle(wrapped).load(folder)
    return wrapped


def _config_of(folder: str | Path) -> LoraConfig:
    import peft

    if not (Path(folder) / "adapter_config.json").is_file():
        raise InputError("adapter", folder, "a folder with adapter_config.json")
    config = peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, peft.LoraConfig):
        raise InputError("adapter", config.peft_type, "LORA")
    config.inference_mode = False
    return config


def _wrap(model: nn.Module, config: LoraConfig) -> PeftModel:
    import peft

    check_config(vars(config))
    # peft draws its start from the global generator; every draw is replaced or loaded over.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        try:
            wrapped = peft.get_peft_model(model, config)
        except ValueError as error:
            raise InputError("targets", config.target_modules, str(error)) from error
    _tie(wrapped)
    return wrapped


def _linears(core: nn.Module, adapter: str) -> dict[str, Any]:
    """Adapted layers by path, every path of a module that is used twice included.

    Raises `InputError` for a layer of another kind, and for one whose forward never runs.
    """
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = {}
    for path, module in core.named_modules(remove_duplicate=False):
        if not isinstance(module, LoraLayer) or adapter not in module.r:
            continue
        base = cast(nn.Module, module.get_base_layer())
        kind = type(base).__name__
        if not isinstance(base, nn.Linear) and kind != "Conv1D":
            raise InputError("targets", f"{path} ({kind})", "Linear and Conv1D layers")
        if isinstance(core.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
            raise InputError("targets", path, "no projection of MultiheadAttention: it is bypassed")
        found[path] = module
    return found


def _tie(wrapped: PeftModel, adapter: str = "default") -> None:
    """Give modules that share one weight one pair of factors, so that they stay equal."""
    first: dict[int, Any] = {}
    for module in _linears(cast(nn.Module, wrapped.base_model.model), adapter).values():
        owner = first.setdefault(id(module.get_base_layer().weight), module)
        if all(
            getattr(owner, field)[adapter] == getattr(module, field)[adapter]
            for field in ("r", "scaling")
        ) and (owner.fan_in_fan_out == module.fan_in_fan_out):
            module.lora_A[adapter].weight = owner.lora_A[adapter].weight
            module.lora_B[adapter].weight = owner.lora_B[adapter].weight


class Handle:
    """Reads and writes the LoRA factors of `model`, or of the one peft model inside it.

    `places` maps each adapted layer (its path in the unwrapped model) to its `Place`.
    Raises `InputError` for layers that are not linear, and for adapters peft has merged.
    """

    def __init__(self, model: nn.Module, adapter: str = "default") -> None:
        import peft

        found = [(path, m) for path, m in model.named_modules() if isinstance(m, peft.PeftModel)]
        if len(found) != 1:
            raise InputError("model", f"{len(found)} adapted models", "one from adapter.attach()")
        outer, self.peft = found[0]
        if adapter not in self.peft.peft_config:
            raise unknown("adapter", adapter, self.peft.peft_config)
        self.adapter = adapter
        check_config(vars(self.config))
        core = cast(nn.Module, self.peft.base_model.model)
        self._modules = _linears(core, adapter)
        prefix = f"{outer}.base_model.model." if outer else "base_model.model."
        self.places = self._find(core, prefix)

    @property
    def config(self) -> LoraConfig:
        return cast("LoraConfig", self.peft.peft_config[self.adapter])

    @property
    def layers(self) -> list[str]:
        return list(self.places)

    def _find(self, core: nn.Module, prefix: str) -> Places:
        names: dict[int, list[str]] = {}
        for name, tensor in core.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        places: Places = {}
        seen: set[tuple[int, int]] = set()
        for path, module in self._modules.items():
            base = module.get_base_layer()
            if module.merged:
                raise InputError(
                    "adapter", "merged", "an unmerged adapter: unmerge_adapter() first"
                )
            B, A = module.lora_B[self.adapter].weight, module.lora_A[self.adapter].weight
            mark = (id(base.weight), id(B))
            if mark in seen:
                continue
            seen.add(mark)
            followers = {
                f"{other}.base_layer.weight"
                for other, another in self._modules.items()
                if another.lora_B[self.adapter].weight is B
            }
            places[path] = Place(
                f"{prefix}{path}.lora_B.{self.adapter}.weight",
                f"{prefix}{path}.lora_A.{self.adapter}.weight",
                prefix + names[id(base.weight)][0],
                float(module.scaling[self.adapter]),
                A.shape[0],
                (B.shape[0], A.shape[1]),
                bool(module.fan_in_fan_out),
                tuple(name for name in names[id(base.weight)] if name not in followers),
            )
        return places

    def _module(self, layer: str) -> Any:
        if layer not in self.places:
            raise unknown("layer", layer, self.places)
        return self._modules[layer]

    def names(self, layer: str) -> tuple[str, str]:
        """The names of B and A among the model's named tensors."""
        self._module(layer)
        return self.places[layer].B, self.places[layer].A

    def factors(self, layer: str) -> Factors:
        """The layer's own tensors (not copies)."""
        module = self._module(layer)
        B, A = module.lora_B[self.adapter].weight, module.lora_A[self.adapter].weight
        return Factors(B.detach(), A.detach(), self.places[layer].scale)

    def set_factors(self, layer: str, factors: Factors) -> None:
        """Copy `factors` in, brought to the layer's scale; the rank must be the layer's own."""
        own = self.factors(layer)
        if (given := (factors.B.shape, factors.A.shape)) != (own.B.shape, own.A.shape):
            shapes = f"B {list(own.B.shape)} and A {list(own.A.shape)}"
            raise InputError(layer, f"B {list(given[0])} and A {list(given[1])}", shapes)
        scaled = factors.at(own.scale)
        own.B.copy_(scaled.B)
        own.A.copy_(scaled.A)

    def delta(self, layer: str) -> Tensor:
        """What the adapter adds to the weight, dense and in the weight's own layout."""
        delta = self.factors(layer).delta()
        return delta.mT if self.places[layer].transposed else delta

    def merge(self, layer: str, L: Tensor, R: Tensor) -> None:
        """W += L R, in place; refused where the weight is tied to a module not targeted."""
        weight = self._module(layer).get_base_layer().weight
        at = self.places[layer]
        weight.data = merged({at.weight: weight}, self.places, {layer: [(L, R)]})[at.weight]

    def hold(self, deltas: Mapping[str, Pair]) -> None:
        """Keep `deltas` as a second, frozen adapter of scale 1: for a backbone that would round.

        Replaces what was held before. Its factors become named tensors of the model.
        """
        import peft

        if _HELD in self.peft.peft_config:
            self.peft.delete_adapter(_HELD)
        ranks = {name: pair[0].shape[1] for name, pair in deltas.items() if pair[0].shape[1]}
        if not ranks:
            return
        pattern = {re.escape(name): rank for name, rank in ranks.items()}
        config = peft.LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules=list(ranks),
            rank_pattern=pattern,
            alpha_pattern=dict(pattern),
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            self.peft.add_adapter(_HELD, config)
        for name in ranks:
            module = self._module(name)
            for factor, value in zip(("lora_B", "lora_A"), deltas[name], strict=True):
                getattr(module, factor)[_HELD].weight.data.copy_(value)
        cast(Any, self.peft.base_model).set_adapter([self.adapter, _HELD])
        for name, tensor in self.peft.named_parameters():
            if f".{_HELD}." in name:
                tensor.requires_grad_(False)

    def state(self) -> Tree:
        """The adapter's tensors under peft's on-disk names (`modules_to_save` included)."""
        import peft

        state = peft.get_peft_model_state_dict(
            self.peft, adapter_name=self.adapter, save_embedding_layers=False
        )
        return {name: x.detach().clone().contiguous() for name, x in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; every name and shape must be the model's own."""
        import peft

        own = self.state()
        for name in own.keys() | state.keys():
            have = list(own[name].shape) if name in own else "no such tensor"
            given = list(state[name].shape) if name in state else "nothing"
            if have != given:
                raise InputError(name, given, str(have))
        peft.set_peft_model_state_dict(self.peft, dict(state), adapter_name=self.adapter)

    def save(self, folder: str | Path) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`, as peft reads them."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state(), str(Path(folder) / "adapter_model.safetensors"), {"format": "pt"})
        config = deepcopy(self.config)
        config.inference_mode = True
        config.save_pretrained(str(folder))

    def load(self, folder: str | Path) -> None:
        """Read what `save` or peft wrote; ranks, alphas and scaling rule must be the model's."""
        from safetensors.torch import load_file

        disk = _config_of(folder)
        for field in _SAME_ON_DISK:
            given, own = getattr(disk, field), getattr(self.config, field)
            if given != own:
                raise InputError(field, given, str(own))
        path = Path(folder) / "adapter_model.safetensors"
        if not path.is_file():
            raise InputError("adapter", folder, "a folder with adapter_model.safetensors")
        self.load_state(load_file(str(path)))
