"""Local learning: whose gradient reaches what, what a module reconstructs, and how much is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.federated import tiny
from tests.federated.methods import local
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import tree
from isthmus.claims.local_learning import Saved
from isthmus.errors import InputError
from isthmus.federated.methods import local_learning as ll
from isthmus.federated.methods.local_learning import LocalLearning, Settings
from isthmus.learn import modules
from isthmus.models.bind import bind
from isthmus.models.nets import cnn, mlp
from isthmus.models.vit import Block, Patches, vit
from isthmus.tasks.contract import Batch
from isthmus.tree import Tree

VARIANTS: list[dict[str, Any]] = [
    {},
    {"target": "none"},
    {"target": "pixels", "decoder": "linear"},
    {"decoder": "conv", "normalise": False},
    {"decoder": "transformer", "auxiliary": "contrastive", "tau": 0.5},
]


def picture(seed: int) -> Any:
    return vit(4, 2, 8, 3, 4, seed, heads=2)


def given(n: int = 7) -> Batch:
    batch = local.batch(1, 4, 4, n=n)
    return Batch({"x": batch.x.sigmoid(), "y": batch.y}, batch.weight, batch.key)


def pictures() -> Any:
    """Clients of 3, 9 and 1 pictures."""
    batch = given(13)
    module = lambda seed: picture(seed).double()  # noqa: E731
    return tiny.task((3, 9, 1), module=module, data=(batch.x, batch.y))


def built(**settings: Any) -> tuple[LocalLearning, Any]:
    method = local.method("local-learning", **settings)
    assert isinstance(method, LocalLearning)
    return method, ll.with_auxiliary(picture(1).double(), method.knobs, 1)


def by_hand(method: LocalLearning, module: Any, batch: Batch) -> list[Tensor]:
    """The losses of three modules of one block each, in one graph with detached borders."""
    k, x, y, f = method.knobs, batch.x, batch.y, module.features
    borders = [f.embed(x)]
    losses: list[Tensor] = []
    for i, (l1, l2) in enumerate((k.first, k.last)):
        h = getattr(f, f"block{i}")(borders[-1] if i == 0 else borders[-1].detach())
        own = (module.auxiliary.common if k.share else module.auxiliary.own)[i]
        said = own.head(h.mean(1))
        if k.auxiliary == "contrastive":
            value = local.mean(contrastive(said, batch, k.tau), batch)
        else:
            value = local.mean(F.cross_entropy(said, y, reduction="none"), batch)
        value = l2 * value
        if k.target == "features":
            goal = borders[-1].detach()
            goal = F.layer_norm(goal, (8,)) if k.normalise else goal
            value = value + l1 * local.mean((own.decoder(h) - goal).square().mean((1, 2)), batch)
        if k.target == "pixels":
            real = x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(x), 4, 4)
            each = F.binary_cross_entropy_with_logits(own.decoder(h), real, reduction="none")
            value = value + l1 * local.mean(each.mean((1, 2)), batch)
        losses.append(value)
        borders.append(h)
    logits = module.head(f.norm(f.block2(borders[-1].detach())).mean(1))
    return [*losses, local.mean(F.cross_entropy(logits, y, reduction="none"), batch)]


def contrastive(z: Tensor, batch: Batch, tau: float) -> Tensor:
    """By loops: minus the mean log-share of an item's partners among all others."""
    z = z / z.norm(dim=1, keepdim=True)
    out = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        total = torch.stack([batch.weight[j] * torch.exp(z[i] @ z[j] / tau) for j in others]).sum()
        same = [j for j in others if batch.y[j] == batch.y[i]]
        logs = [batch.weight[j] * (z[i] @ z[j] / tau - torch.log(total)) for j in same]
        many = sum(batch.weight[j] for j in same)
        out.append(-torch.stack(logs).sum() / many if same else z.sum() * 0.0)
    return torch.stack(out)


def parts_of(module: nn.Module, method: LocalLearning) -> list[list[str]]:
    return modules.names_of(module, modules.parts(module, method.knobs.K), method.prefix)


@pytest.mark.parametrize("settings", VARIANTS)
def test_each_module_learns_from_its_own_loss_alone(settings: dict[str, Any]) -> None:
    method, module = built(**settings)
    batch, names = given(), parts_of(module, method)
    assert sorted(n for part in names for n in part) == sorted(
        n for n, _ in module.named_parameters()
    )
    leaves = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    losses = by_hand(method, bind(module, leaves), batch)
    expected: Tree = {}
    for k, loss in enumerate(losses):
        for j, part in enumerate(names):
            mine = [leaves[n] for n in part]
            got = torch.autograd.grad(loss, mine, allow_unused=True, retain_graph=True)
            if j != k:
                assert got == (None,) * len(part)  # the target carries no gradient either
            else:
                expected |= dict(zip(part, got, strict=True))
    for gradient in (modules.functional, modules.plain):
        value, _, grads = method.learn(module, batch, gradient)
        assert tiny.apart(expected, grads) < 1e-11
        assert float(value) == pytest.approx(float(losses[-1].detach()), rel=1e-13)
    assert tiny.apart(expected, local.grads(method, module, batch)) < 1e-11


def test_one_module_is_end_to_end_to_the_bit() -> None:
    task = pictures()
    for executor in ("sequential", "vectorised"):
        keys = {"executor": executor, "optimiser": "adamw", "lr": 0.01}
        a = tiny.play("local-learning", task, 1, settings={"K": 1}, **keys)
        b = tiny.play("fedavg", task, 1, **keys)
        assert tree.equal(a.state["shared"], b.state["shared"])
        c = tiny.play("local-learning", task, 1, settings={"K": 2}, **keys)
        shared = c.state["shared"]
        assert tiny.apart(b.state["shared"], shared) > 1e-3


def test_one_graph_is_alive_at_a_time() -> None:
    """When a module begins, nothing that another saved is held any more."""
    method, module = built()
    leaves = [p for p in module.parameters()]
    saved, seen = Saved(leaves), []
    for i in range(3):
        block = getattr(module.features, f"block{i}")
        block.register_forward_pre_hook(lambda m, x: seen.append(saved.now))
    with saved.watch():
        method.learn(module, given(), modules.plain)
    embedded = given().x.nbytes  # the first module's graph holds its cut pixels
    assert seen[1:] == [0, 0] and 0 < seen[0] <= embedded and saved.peak > 5 * embedded
    end, net = built(K=1)
    whole, seen = Saved(net.parameters()), []
    for i in range(3):
        getattr(net.features, f"block{i}").register_forward_pre_hook(
            lambda m, x: seen.append(whole.now)
        )
    with whole.watch():
        end.learn(net, given(), modules.plain)
    assert 0 < seen[0] < seen[1] < seen[2] and whole.peak > 2 * saved.peak
    assert saved.now == whole.now == 0


@pytest.mark.parametrize("settings", [{}, VARIANTS[4], {"share": True}])
def test_vectorised_equals_sequential(settings: dict[str, Any]) -> None:
    task = pictures()
    a, b = (
        tiny.play("local-learning", task, 2, executor=how, settings=settings)
        for how in ("sequential", "vectorised")
    )
    assert tiny.apart(tiny.state(a), tiny.state(b)) < 1e-12
    assert tiny.apart(tiny.kept(a), tiny.kept(b)) < 1e-12
    helpers = {n for n in a.method.names.trainable if n.startswith("auxiliary.")}
    shared = helpers & set(a.state["shared"])
    assert shared == (helpers if settings.get("share") else set()) and helpers
    assert set(tiny.kept(a)) == helpers - shared


def test_coefficients_go_linearly_from_the_first_to_the_last_but_one() -> None:
    method, _ = built(first=(5.0, 0.0), last=(1.0, 2.0))
    assert [method.coefficients(k, 5) for k in range(4)] == [
        (5.0, 0.0),
        pytest.approx((5 - 4 / 3, 2 / 3)),
        pytest.approx((5 - 8 / 3, 4 / 3)),
        (1.0, 2.0),
    ]
    assert method.coefficients(0, 2) == (5.0, 0.0)


def test_prediction_is_that_of_the_plain_network() -> None:
    method, module = built()
    plain = picture(1).double()
    assert torch.equal(module(given().x), plain(given().x))
    said = method.predict(pictures(), module, {"x": given().x}, None, {})
    assert torch.equal(said, plain(given().x))


def test_padding_counts_nothing() -> None:
    for settings in VARIANTS:
        method, module = built(**settings)
        some, more = given(5), given(8)
        columns = {n: torch.cat([some[n], more[n][5:]]) for n in ("x", "y")}
        weight = torch.cat([some.weight, torch.zeros(3, dtype=local.F64)])
        a = method.learn(module, some)[2]
        b = method.learn(module, Batch(columns, weight, some.key))[2]
        assert tiny.apart(a, b) < 1e-12


def test_infopro_decodes_pixels_and_is_that_choice() -> None:
    method, module = built(target="pixels")
    other = local.method("infopro")
    assert isinstance(other, LocalLearning) and other.knobs.target == "pixels"
    a, b = method.learn(module, given())[2], other.learn(module, given())[2]
    assert tree.equal(a, b)
    assert module.auxiliary.own[0].decoder[-1].out_features == 4


def test_dense_nets_have_modules_too() -> None:
    net = mlp([6, 5, 8, 7, 4], "tanh", 1).double()
    method = local.method("local-learning", K=3)
    assert isinstance(method, LocalLearning)
    module: Any = ll.with_auxiliary(net, method.knobs, 1)
    assert [part.body for part in modules.parts(module, 3)] == [
        ("linear0", "tanh0"),
        ("linear1", "tanh1"),
        ("linear2", "tanh2"),
    ]
    batch = local.batch(6)
    grads = method.learn(module, batch)[2]
    own, f = module.auxiliary.own[0], module.features
    h = torch.tanh(f.linear0(batch.x))
    missed = (own.decoder(h) - F.layer_norm(batch.x, (6,))).square().mean(1)
    loss = 5.0 * local.mean(missed, batch) + 0.5 * local.mean(
        F.cross_entropy(own.head(h), batch.y, reduction="none"), batch
    )
    expected = torch.autograd.grad(loss, [f.linear0.weight, own.decoder[0].weight])
    names = ("features.linear0.weight", "auxiliary.own.0.decoder.0.weight")
    assert tiny.apart(dict(zip(names, expected, strict=True)), {n: grads[n] for n in names}) < 1e-12


def test_bad_input_is_one_line() -> None:
    with pytest.raises(InputError, match="a Transformer or a dense net"):
        ll.with_auxiliary(cnn([4, 6], 3), Settings(), 0)
    with pytest.raises(InputError, match=r"settings\.decoder: conv given, allowed: linear, mlp"):
        ll.with_auxiliary(mlp([6, 5, 5, 4]), Settings(decoder="conv"), 0)
    with pytest.raises(InputError, match="a divisor of the side, 8"):
        vit(8, 3, 8, 1, 4)
    with pytest.raises(InputError, match="a divisor of the width, 10"):
        vit(8, 2, 10, 1, 4)


def test_the_transformer_by_hand() -> None:
    """Patches in rows, and attention as torch's own layer has it."""
    patches = Patches(2, 4, 2, 6).double()
    x = torch.arange(64, dtype=local.F64).view(2, 2, 4, 4)
    cut = patches.cut(x)
    assert cut[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # second patch of the first row
    assert cut[1, 2].tolist() == [40, 41, 44, 45, 56, 57, 60, 61]
    block = Block(8, 2).double()
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(block.qkv.weight)
        theirs.in_proj_bias.copy_(block.qkv.bias)
        theirs.out_proj.weight.copy_(block.out.weight)
        theirs.out_proj.bias.copy_(block.out.bias)
        h = local.batch(5, 8).x
        y = block.before_attention(h)
        mixed = h + theirs(y, y, y, need_weights=False)[0]
        fed = mixed + block.down(F.gelu(block.up(block.before_feed(mixed))))
        assert torch.allclose(block(h), fed, atol=1e-12)
