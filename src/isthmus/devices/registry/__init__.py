"""Which models fit this device, which devices can run this model: a graph of both, and queries."""

from __future__ import annotations

from isthmus.devices.registry.registry import EXAMPLE, Fit, Registry

__all__ = ["EXAMPLE", "Fit", "Registry"]
