from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from isthmus import tree
from isthmus.errors import InputError
from isthmus.models import factors as pure
from isthmus.models.adapter import Handle, attach, load
from isthmus.models.bind import bind, tensors_of
from isthmus.models.factors import Factors, Place


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 5))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
    return model


def gpt2(dtype: torch.dtype = torch.float64) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).to(dtype).eval()


def randomise(handle: Handle, seed: int = 0) -> dict[str, Factors]:
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, at in handle.places.items():
        B = torch.randn(at.shape[0], at.rank, generator=g, dtype=torch.float64)
        A = torch.randn(at.rank, at.shape[1], generator=g, dtype=torch.float64)
        made[name] = Factors(B, A, at.scale)
        handle.set_factors(name, made[name])
    return made


X = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(3, 7)
TOKENS = torch.tensor([[1, 5, 3, 19], [0, 2, 2, 7]])


def test_attaching_changes_no_output_and_no_global_randomness() -> None:
    model = mlp()
    before, random = model(X), torch.get_rng_state()
    wrapped = attach(model, 3, 6, seed=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(wrapped(X), before)
    handle = Handle(wrapped)
    assert handle.layers == ["0", "2"]
    for layer in handle.layers:
        B, A, s = handle.factors(layer)
        assert s == 2.0 and (B == 0).all() and A.dtype == torch.float64
        bound = handle.places[layer].shape[1] ** -0.5
        assert 0.5 * bound < float(A.abs().max()) <= bound
    again, other = Handle(attach(mlp(), 3, 6, seed=4)), Handle(attach(mlp(), 3, 6, seed=5))
    assert torch.equal(again.factors("0").A, handle.factors("0").A)
    assert not torch.equal(other.factors("0").A, handle.factors("0").A)
    assert not any(isinstance(m, nn.Dropout) for m in wrapped.modules())
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(n for layer in handle.layers for n in handle.names(layer))


@pytest.mark.parametrize(
    ("more", "scale", "rank"),
    [
        ({}, 6 / 4, 4),
        ({"rslora": True}, 6 / 4**0.5, 4),
        ({"alpha_pattern": {"2": 10}}, 10 / 4, 4),
        ({"rank_pattern": {"2": 2}}, 6 / 2, 2),
        ({"rank_pattern": {"2": 2}, "alpha_pattern": {"2": 5}, "rslora": True}, 5 / 2**0.5, 2),
    ],
)
def test_scales_and_ranks_are_those_the_forward_uses(
    more: dict[str, Any], scale: float, rank: int
) -> None:
    model = attach(mlp(), 4, 6, **more)
    handle = Handle(model)
    made = randomise(handle)
    assert (handle.places["2"].rank, handle.factors("2").rank) == (rank, rank)
    assert handle.places["2"].scale == pytest.approx(scale, rel=1e-15)
    plain = mlp()
    plain[0].weight.data += handle.delta("0")
    plain[2].weight.data += scale * made["2"].B @ made["2"].A
    assert torch.allclose(model(X), plain(X), rtol=1e-12)


@pytest.mark.parametrize("build", [mlp, gpt2])
def test_delta_has_the_layout_of_the_weight(build: Any) -> None:
    model = attach(build(), 2, 6)
    handle = Handle(model)
    randomise(handle)
    core = model.base_model.model
    assert any(at.transposed for at in handle.places.values()) == (build is gpt2)
    for layer in handle.layers:
        module = core.get_submodule(layer)
        assert handle.delta(layer).shape == module.get_base_layer().weight.shape
        assert torch.allclose(handle.delta(layer), module.get_delta_weight("default"), rtol=1e-12)
        d, k = handle.places[layer].shape
        assert handle.factors(layer).B.shape == (d, 2) and handle.factors(layer).A.shape == (2, k)


@pytest.mark.parametrize("build", [mlp, gpt2])
def test_merging_the_adapter_as_a_pair_and_removing_it_serves_the_same(build: Any) -> None:
    model = attach(build(), 2, 6)
    handle = Handle(model)
    randomise(handle)
    given = X if build is mlp else TOKENS

    def out() -> Tensor:
        with torch.no_grad():
            y = model(given)
        return y if isinstance(y, Tensor) else y.logits

    before = out()
    for layer in handle.layers:
        B, A, s = handle.factors(layer)
        handle.merge(layer, s * B, A.clone())
        handle.set_factors(layer, Factors(0 * B, A, s))
    assert torch.allclose(out(), before, rtol=1e-10)
    assert not torch.allclose(out(), build()(given)[0] if build is gpt2 else build()(given))


def test_a_merge_into_bfloat16_is_added_in_float32_and_cast_once() -> None:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(30, 20, generator=g).bfloat16()
    L, R = torch.randn(30, 4, generator=g), torch.randn(4, 20, generator=g)
    once = (weight.double() + L.double() @ R.double()).bfloat16()
    got = pure.add_pair(weight, (L, R))
    assert got.dtype == torch.bfloat16 and float((got != once).float().mean()) < 0.01
    early = weight + (L.bfloat16() @ R.bfloat16())
    assert float((early != once).float().mean()) > 0.1
    kept = pure.add_pair(weight.mT.contiguous(), (L, R), transposed=True)
    assert torch.equal(kept, got.mT)
    with pytest.raises(InputError, match=r"merge: torch\.int8 given"):
        pure.add_pair(torch.ones(30, 20, dtype=torch.int8), (L, R))


def test_named_tensors_there_and_back_also_stacked() -> None:
    model = attach(mlp(), 3, 6)
    handle = Handle(model)
    made = randomise(handle)
    named = tensors_of(model)
    read = pure.read(named, handle.places)
    for layer in handle.layers:
        B, A = handle.names(layer)
        assert torch.equal(named[B], made[layer].B) and torch.equal(named[A], made[layer].A)
        assert torch.equal(read[layer].B, made[layer].B)
    written = pure.write(read, handle.places)
    assert tree.equal(written, {name: named[name] for name in written}) and len(written) == 4
    two = pure.read(tree.stack([named, tree.scale(named, 2.0)]), handle.places)
    assert two["0"].B.shape == (2, 12, 3) and two["0"].rank == 3
    assert torch.allclose(two["0"].delta()[1], 4 * made["0"].delta())

    scaled = {layer: Factors(x.B, x.A, 5.0) for layer, x in made.items()}
    moved = named | pure.write(scaled, handle.places)
    plain = mlp()
    for layer in handle.layers:
        plain.get_submodule(layer).weight.data += 5.0 * made[layer].B @ made[layer].A
    assert torch.allclose(bind(model, moved)(X), plain(X), rtol=1e-12)
    changed = pure.merged(named, handle.places, {"2": [(made["2"].B, made["2"].A)] * 2, "0": []})
    assert list(changed) == [handle.places["2"].weight]
    expected = named[handle.places["2"].weight] + 2 * made["2"].B @ made["2"].A
    assert torch.allclose(changed[handle.places["2"].weight], expected, rtol=1e-12)


class Inside(nn.Module):
    """A task's module around an adapted one."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = attach(mlp(), 2, 4)
        self.head = nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_an_adapted_model_inside_another_is_found() -> None:
    model = Inside()
    handle = Handle(model)
    named = dict(model.named_parameters())
    assert handle.layers == ["0", "2"]
    for layer in handle.layers:
        at = handle.places[layer]
        assert at.B.startswith("backbone.base_model.model.") and at.weight in named
        assert named[at.B].data_ptr() == handle.factors(layer).B.data_ptr()
    with pytest.raises(InputError, match="model: 0 adapted models given"):
        Handle(mlp())
    with pytest.raises(InputError, match="layer: 1 given, allowed: 0, 2"):
        handle.names("1")


def test_a_tied_weight_with_one_side_targeted_refuses_the_merge_alone() -> None:
    handle = Handle(attach(gpt2(), 2, 4, ["lm_head"]))
    B, A, s = handle.factors("lm_head")
    handle.set_factors("lm_head", Factors(B + 1, A, s))
    before = handle.peft.get_parameter(handle.places["lm_head"].weight).clone()
    with pytest.raises(InputError, match=r"targets: lm_head given.*transformer\.wte\.weight"):
        handle.merge("lm_head", B + 1, A)
    assert torch.equal(before, handle.peft.get_parameter(handle.places["lm_head"].weight))


class Twice(nn.Module):
    """Two modules that hold one weight, or one module under two names."""

    def __init__(self, same_module: bool) -> None:
        super().__init__()
        block = mlp()
        self.a = nn.Linear(7, 7, dtype=torch.float64)
        self.b = self.a if same_module else nn.Linear(7, 7, dtype=torch.float64)
        self.a.weight.data = torch.arange(49.0, dtype=torch.float64).reshape(7, 7) / 49
        if not same_module:
            self.b.weight = self.a.weight
        self.tail = nn.ModuleList([block, block])

    def forward(self, x: Tensor) -> Tensor:
        return self.tail[0](self.b(self.a(x))) + self.tail[1](x)


def test_a_weight_both_of_whose_modules_are_targeted_is_merged_once() -> None:
    model = attach(Twice(same_module=False), 2, 4, ["a", "b"])
    handle = Handle(model)
    assert handle.layers == ["a"] and handle.places["a"].tied == ()
    randomise(handle)
    before = model(X)
    B, A, s = handle.factors("a")
    handle.merge("a", s * B, A.clone())
    handle.set_factors("a", Factors(0 * B, A, s))
    assert torch.allclose(model(X), before, rtol=1e-12)
    core = model.base_model.model
    assert core.a.base_layer.weight is core.b.base_layer.weight
    named = tensors_of(model)
    assert all(name in named for name in handle.names("a"))


def test_a_block_used_twice_is_one_layer_and_a_bare_second_use_is_seen() -> None:
    handle = Handle(attach(Twice(same_module=False), 2, 4, ["tail.0.0", "tail.0.2"]))
    assert handle.layers == ["tail.0.0", "tail.0.2"]
    assert all(at.tied == () for at in handle.places.values())
    bare = Handle(attach(Twice(same_module=True), 2, 4, ["a"]))
    with pytest.raises(InputError, match=r"targets: a given.*b\.weight"):
        bare.merge("a", torch.ones(7, 1), torch.ones(1, 7))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_dora": True}, "use_dora: True given, allowed: plain LoRA"),
        ({"kasa_config": peft.KasaConfig()}, "kasa_config: .* given, allowed: plain LoRA"),
        ({"lora_bias": True}, "lora_bias: True given, allowed: plain LoRA"),
        ({"target_parameters": ["0.weight"]}, "target_parameters: .* given, allowed: plain LoRA"),
        ({"rank_patern": {}}, "nearest: rank_pattern"),
        ({"lora_dropout": 0.1}, "LoraConfig: lora_dropout given"),
        ({"targets": ["query"]}, "targets: .*query"),
        ({"rank": 0}, "rank, alpha: 0, 4 given"),
    ],
)
def test_what_is_not_plain_lora_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attach(mlp(), **{"rank": 2, "alpha": 4, **more})


def test_a_variant_put_there_by_hand_is_refused_too() -> None:
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    with pytest.raises(InputError, match="use_dora"):
        Handle(peft.get_peft_model(mlp(), config))
    model = attach(mlp(), 2, 4)
    model.merge_adapter()
    with pytest.raises(InputError, match="adapter: merged given"):
        Handle(model)
    with pytest.raises(InputError, match="adapter: other given, allowed: default"):
        Handle(attach(mlp(), 2, 4), "other")


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        (nn.Conv2d(3, 4, 3), "0"),
        (nn.Embedding(9, 4), "0"),
        (nn.MultiheadAttention(4, 2), "0"),
        (nn.MultiheadAttention(4, 2), "out_proj"),
    ],
)
def test_layers_that_are_not_linear_are_refused(layer: nn.Module, target: str) -> None:
    with pytest.raises(InputError, match=r"targets: 0"):
        attach(nn.Sequential(layer), 2, 4, [target])


def test_set_factors_copies_rescales_and_refuses_another_rank() -> None:
    handle = Handle(attach(mlp(), 2, 4))
    given = Factors(torch.ones(12, 2), torch.full((2, 7), 0.5), 3.0)
    handle.set_factors("0", given)
    assert torch.allclose(handle.delta("0"), torch.full((12, 7), 3.0, dtype=torch.float64))
    given.B.zero_()
    assert float(handle.delta("0")[0, 0]) == 3.0
    with pytest.raises(InputError, match=r"0: B \[12, 3\] and A \[3, 7\] given"):
        handle.set_factors("0", Factors(torch.ones(12, 3), torch.ones(3, 7), 2.0))


def test_a_saved_adapter_is_read_by_peft_and_the_other_way_round(tmp_path: Path) -> None:
    more = {"rank_pattern": {"2": 2}, "alpha_pattern": {"0": 9}, "rslora": True}
    model = attach(mlp(), 3, 6, ["0", "2"], **more)
    handle = Handle(model)
    randomise(handle)
    handle.save(tmp_path / "ours")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    theirs = peft.PeftModel.from_pretrained(mlp(), str(tmp_path / "ours"))
    assert torch.equal(theirs(X), model(X))
    model.save_pretrained(str(tmp_path / "theirs"))
    ours = load(mlp(), tmp_path / "theirs")
    assert torch.equal(ours(X), model(X)) and Handle(ours).places == handle.places
    assert all(ours.get_parameter(n).requires_grad for n in handle.names("0"))
    assert tree.equal(Handle(ours).state(), handle.state())
    assert "base_model.model.0.lora_A.weight" in handle.state()


def test_modules_trained_beside_the_adapter_travel_with_it(tmp_path: Path) -> None:
    model = attach(mlp(), 3, 6, ["0"], modules_to_save=["2"])
    model.base_model.model[2].modules_to_save["default"].weight.data += 1.0
    Handle(model).save(tmp_path)
    assert torch.equal(load(mlp(), tmp_path)(X), model(X))


def test_what_does_not_fit_is_not_loaded(tmp_path: Path) -> None:
    handle = Handle(attach(mlp(), 3, 6))
    before = handle.state()
    Handle(attach(mlp(), 2, 6)).save(tmp_path)
    with pytest.raises(InputError, match="r: 2 given, allowed: 3"):
        handle.load(tmp_path)
    with pytest.raises(InputError, match=r"lora_A.weight: \[2, 7\] given, allowed: \[3, 7\]"):
        handle.load_state({**before, "base_model.model.0.lora_A.weight": torch.ones(2, 7)})
    with pytest.raises(InputError, match="nothing given"):
        handle.load_state({n: x for n, x in before.items() if "2.lora_B" not in n})
    with pytest.raises(InputError, match="no such tensor"):
        handle.load_state({**before, "base_model.model.9.lora_A.weight": torch.ones(3, 7)})
    assert tree.equal(handle.state(), before)

    handle.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["use_dora"] = True
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="use_dora"):
        load(mlp(), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        handle.load(tmp_path)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        load(mlp(), tmp_path / "nowhere")


def test_padding_masks_and_slices_for_unequal_ranks() -> None:
    g = torch.Generator().manual_seed(0)

    def pair(rank: int) -> Factors:
        return Factors(torch.randn(6, rank, generator=g), torch.randn(rank, 4, generator=g), 2.0)

    clients, down = [pair(1), pair(3), pair(2)], pair(3)
    wide = pure.stack(clients, down)
    mask = pure.prefix_mask([1, 3, 2], 3)
    for i, x in enumerate(clients):
        assert int(mask[i].sum()) == x.rank and torch.equal(wide.B[i][:, mask[i]], x.B)
        assert torch.equal(wide.A[i][~mask[i]], down.A[x.rank :])
    for x, y in zip(clients, pure.unstack(wide, [1, 3, 2]), strict=True):
        assert torch.equal(x.B, y.B) and torch.equal(x.A, y.A) and x.scale == y.scale
    blank = pure.pad(clients[0], 3)
    assert torch.allclose(blank.delta(), clients[0].delta())
    assert pure.dead(blank).tolist() == [False, True, True]
    half = Factors(torch.zeros(6, 2), torch.ones(2, 4), 1.0)
    assert pure.dead(half).tolist() == [False, False]
    assert pure.dead(Factors(torch.zeros(5, 6, 2), torch.zeros(5, 2, 4), 1.0)).shape == (5, 2)
    with pytest.raises(InputError, match="rank: 2 given, allowed: 3 or more"):
        pure.pad(clients[1], 2)
    other = clients[1].at(0.25)
    assert torch.equal(other.A, clients[1].A)
    assert torch.allclose(other.delta(), clients[1].delta())


def test_gradients_of_masked_directions_keep_the_tail_frozen() -> None:
    """One masked step under vmap moves the prefix of each client and nothing behind it."""
    at = {"w": Place("B", "A", "W", 2.0, 3, (6, 4))}
    g = torch.Generator().manual_seed(2)
    down = Factors(torch.randn(6, 3, generator=g), torch.randn(3, 4, generator=g), 2.0)
    ranks = [1, 3, 2]
    wide = pure.stack([down.prefix(r) for r in ranks], down)
    mask = pure.prefix_mask(ranks, 3)
    x = torch.randn(3, 5, 4, generator=g)

    def loss(named: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ pure.read(named, at)["w"].delta().mT).square().sum()

    named = pure.write({"w": wide}, at)
    grad = torch.func.vmap(torch.func.grad(loss))(named, x)
    B = named["B"] - 0.1 * grad["B"] * mask[:, None, :]
    A = named["A"] - 0.1 * grad["A"] * mask[:, :, None]
    for i, r in enumerate(ranks):
        assert torch.equal(B[i][:, r:], down.B[:, r:]) and torch.equal(A[i][r:], down.A[r:])
        assert (B[i][:, :r] != down.B[:, :r]).all() and (A[i][:r] != down.A[:r]).all()


def test_a_copy_of_an_adapted_model_is_its_own() -> None:
    model = attach(mlp(), 2, 4)
    other = deepcopy(model)
    randomise(Handle(other))
    assert not torch.equal(other(X), model(X))
