"""What every test stands on: one thread of arithmetic, and examples that do not change."""

from __future__ import annotations

import gc

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # matrices this small only wait for each other on several threads
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """What has been imported stays; the collector need not look at it again for every test."""
    gc.collect()
    gc.freeze()
