"""Devices: time and energy in closed form, meters, clocks, counted FLOPs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from isthmus.errors import InputError
from isthmus.wire.device import (
    PROFILES,
    Actuator,
    Device,
    Meter,
    Power,
    Profile,
    Tier,
    count_flops,
    spend_each,
)

PROFILE = Profile(
    "box",
    {"float32": 1e9, "float32/decode": 2e8, "int8": 4e9},
    {"ram": Tier(1000.0, 1e6), "disk": Tier(1e6, 1e3)},
    Power(idle=1.0, busy=9.0, tx=2.0),
    battery=100.0,
    awake=((0.0, 10.0), (50.0, 60.0)),
    period=100.0,
)


def test_time_is_that_of_the_slower_of_arithmetic_and_memory() -> None:
    box = Device(PROFILE)
    assert box.spend(3e9) == (3.0, 27.0)
    assert box.spend(3e9, "int8").seconds == 0.75
    assert box.spend(3e9, phase="decode").seconds == 15.0
    assert box.spend(3e9, bytes=5e6) == (5.0, 45.0)
    assert box.spend(3e9, bytes=5e6, tier="disk").seconds == 5e3
    seconds, joules = box.spend(np.array([1e9, 6e9]), bytes=np.array([2e6, 3e6]))
    assert seconds.tolist() == [2.0, 6.0] and joules.tolist() == [18.0, 54.0]


def test_a_slower_clock_takes_longer_and_draws_less() -> None:
    box = Device(PROFILE)
    actuator = Actuator(box)
    with actuator.at(compute=0.5):
        # Half the clock: twice the time, 1 + 8/8 watts.
        assert box.spend(3e9) == (6.0, 12.0)
        with actuator.at(memory=0.25):
            assert box.spend(0.0, bytes=1e6).seconds == 4.0
        assert box.spend(0.0, bytes=1e6).seconds == 1.0
    assert box.spend(3e9) == (3.0, 27.0)
    with pytest.raises(InputError, match="clock"), actuator.at(memory=0.5, compute=1.5):
        pass
    assert box.clocks == {"compute": 1.0, "memory": 1.0}
    with pytest.raises(InputError, match="nearest: compute"):
        actuator.set("compte", 0.5)  # type: ignore[arg-type]


def test_each_of_many_devices() -> None:
    fleet = [Device.named("phone"), Device(PROFILE), Device.named("server")]
    Actuator(fleet[1]).set("compute", 0.5)
    flops = np.array([1e9, 2e9, 3e9])
    spent = spend_each(fleet, flops, "float32", "decode")
    for i, device in enumerate(fleet):
        one = device.spend(float(flops[i]), "float32", "decode")
        assert (spent.seconds[i], spent.joules[i]) == pytest.approx(tuple(one))
    assert spend_each(fleet, 1e9).seconds.shape == (3,)


def test_availability_follows_its_windows() -> None:
    box = Device(PROFILE)
    times = np.array([0.0, 9.9, 10.0, 55.0, 99.0, 105.0, 149.9, 150.0])
    expected = [True, True, False, True, False, True, False, True]
    assert box.available(times).tolist() == expected
    assert [box.available(float(t)) for t in times] == expected
    assert Device.named("phone").available(3.0) is True


def test_a_meter_adds_up() -> None:
    meter = Meter(Device(PROFILE))
    assert meter.spend("train", 3e9) == (3.0, 27.0)
    meter.spend("train", 1e9)
    meter.add("radio", seconds=1.0, joules=4.0, source="rapl")
    assert (meter.spans["train"].count, meter.spans["train"].flops) == (2, 4e9)
    assert meter.spans["train"].seconds == 4.0
    assert meter.joules == {"modelled": 36.0, "rapl": 4.0}
    assert meter.battery == 60.0
    meter.add("radio", seconds=1.0, joules=99.0, source="rapl")
    assert meter.battery == 0.0
    assert Meter(Device.named("server")).battery is None


def test_a_memory_has_an_end() -> None:
    meter = Meter(Device(PROFILE))
    meter.hold("ram", 700)
    meter.hold("ram", -400)
    meter.hold("ram", 600)
    with pytest.raises(InputError, match="0 to 1000 bytes"):
        meter.hold("ram", 101)
    assert meter.held == {"ram": 900.0} and meter.peak == {"ram": 900.0}
    with pytest.raises(InputError, match="box memory"):
        meter.hold("gpu", 1)


def test_unknown_names_are_answered() -> None:
    with pytest.raises(InputError, match="nearest: laptop"):
        Device.named("labtop")
    with pytest.raises(InputError, match="nearest: float32"):
        Device(PROFILE).spend(1.0, "float23")
    for name in PROFILES:
        assert Device.named(name).spend(1e6).seconds > 0


def test_flops_are_counted() -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 3, requires_grad=True)
    assert count_flops(torch.matmul, a, b) == 2 * 5 * 7 * 3
    # Backward: only b needs a gradient, one more product of the same size.
    assert count_flops(lambda: (a @ b).sum().backward()) == 2 * 2 * 5 * 7 * 3


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_counted_on_the_cpu(causal: bool) -> None:
    q = torch.randn(2, 4, 16, 8)

    def attention() -> torch.Tensor:
        return scaled_dot_product_attention(q, q, q, is_causal=causal)

    assert count_flops(attention) == 2 * (2 * 2 * 4 * 16 * 16 * 8)
