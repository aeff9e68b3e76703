from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus import catalogue, seeds
from isthmus.attacks.random_update import RandomUpdate
from isthmus.attacks.sign_flip import SignFlip
from isthmus.contracts import Attack, Meta, OutsideThreatModel, ThreatModel, Updates, View
from isthmus.errors import InputError

SEEN = (
    "own_update",
    "benign_updates",
    "aggregate",
    "model_history",
    "aggregator_name",
    "root_data",
)


def updates(clients=(3, 8, 4)):
    n = len(clients)
    return Updates(
        delta={"w": seeds.normal(1, (n, 4, 3)) + 2.0, "b": seeds.normal(2, (n, 5)) * 3.0},
        values={"prototype": seeds.normal(3, (n, 2))},
        buffers={"mean": seeds.normal(4, (n, 6))},
        scalars={"loss": torch.rand(n, generator=torch.Generator().manual_seed(1))},
        meta=[Meta(client=c, round=2, version=1, n_examples=10.0 * c) for c in clients],
    )


class Watched(View):
    """A view that remembers what was read."""

    def __init__(self, model: ThreatModel, key: int, **facts: Any) -> None:
        super().__init__(model, key, **facts)
        self.read: list[str] = []

    def __getitem__(self, fact: str) -> Any:
        self.read.append(fact)
        return super().__getitem__(fact)


ATTACKS = pytest.mark.parametrize(
    "attack", [SignFlip(), RandomUpdate()], ids=lambda a: type(a).__name__
)


@ATTACKS
def test_reading_outside_the_declared_threat_model_raises(attack):
    own = updates()
    view = View(attack.threat, key=5, **{name: own for name in SEEN})
    assert view["own_update"] is own
    for fact in SEEN[1:]:
        with pytest.raises(OutsideThreatModel, match=f"{fact}: .* only own_update"):
            view[fact]


@ATTACKS
def test_an_attack_reads_no_more_than_it_declares_and_changes_no_input(attack):
    own, before = updates(), updates()
    crowd = updates(clients=(0, 1, 2))
    view = Watched(attack.threat, 5, own_update=own, benign_updates=crowd, aggregate=crowd)
    crafted = attack.craft(own, view)
    assert set(view.read) <= attack.threat.sees
    for name in own.delta:
        assert torch.equal(own.delta[name], before.delta[name])
        assert crafted.delta[name].shape == own.delta[name].shape
        assert not torch.equal(crafted.delta[name], own.delta[name])
    for place in ("values", "buffers", "scalars"):
        for name, x in getattr(own, place).items():
            assert torch.equal(getattr(crafted, place)[name], x)
    assert crafted.meta == own.meta and len(crafted) == len(own)


@ATTACKS
def test_the_card_is_complete_and_the_contract_kept(attack):
    assert isinstance(attack, Attack)
    card = attack.threat
    assert (card.role, card.sees, card.controls) == ("client", {"own_update"}, {"update"})
    assert not card.colluding


def test_sign_flip_is_the_negative_multiple():
    own = updates()
    crafted = SignFlip(scale=2.5).craft(own, View(SignFlip().threat, 1))
    assert torch.equal(crafted.matrix(), -2.5 * own.matrix())
    assert torch.equal(
        SignFlip(1.0).craft(crafted, View(SignFlip().threat, 1)).matrix(), -crafted.matrix()
    )


def test_a_flipping_minority_turns_the_mean_at_the_named_scale():
    """f of n equal clients: the mean keeps (n - f - s f) / n of its step."""
    n, f = 20, 5
    own = updates(clients=(0,) * n).with_delta({"w": torch.ones(n, 3)})
    for scale in (1.0, 2.0, 3.0, 4.0):
        bad = SignFlip(scale).craft(own.take(range(f)), View(SignFlip().threat, 1))
        mean = torch.cat([bad.matrix(), own.matrix()[f:]]).mean(dim=0)
        assert torch.allclose(mean, torch.full((3,), (n - f - scale * f) / n), atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_random_updates_have_the_length_of_honest_ones_and_no_direction(scale):
    own = updates(clients=tuple(range(400)))
    crafted = RandomUpdate(scale).craft(own, View(RandomUpdate().threat, key=9)).matrix()
    honest = own.matrix()
    assert torch.allclose(crafted.norm(dim=1), scale * honest.norm(dim=1), rtol=1e-5)
    if scale:
        cosine = torch.cosine_similarity(crafted, honest, dim=1)
        d = honest.shape[1]
        assert abs(float(cosine.mean())) < 4 / (400 * d) ** 0.5
        assert float(cosine.square().mean()) == pytest.approx(1 / d, rel=0.25)


def test_random_updates_depend_on_key_and_client_alone():
    attack = RandomUpdate()
    some = attack.craft(updates((3, 8, 4)), View(attack.threat, key=9)).matrix()
    assert torch.equal(some, attack.craft(updates((3, 8, 4)), View(attack.threat, key=9)).matrix())
    assert not torch.equal(
        some, attack.craft(updates((3, 8, 4)), View(attack.threat, key=10)).matrix()
    )
    alone = attack.craft(updates((3, 8, 4)).take([1]), View(attack.threat, key=9)).matrix()
    assert torch.allclose(alone[0], some[1], rtol=1e-6)
    assert not torch.allclose(some[0] / some[0].norm(), some[2] / some[2].norm(), atol=0.1)


def test_what_cannot_be_attacked_is_refused():
    factors = updates()
    factors.delta = {}
    for attack in (SignFlip(), RandomUpdate()):
        with pytest.raises(InputError, match="deltas"):
            attack.craft(factors, View(attack.threat, 1))
    with pytest.raises(InputError, match=r"sign-flip\.scale"):
        SignFlip(0.0)
    with pytest.raises(InputError, match=r"gaussian\.scale"):
        RandomUpdate(-1.0)


def test_they_are_found_by_name():
    assert catalogue.find("attack", "sign-flip") is SignFlip
    assert catalogue.find("attack", "gaussian") is RandomUpdate
