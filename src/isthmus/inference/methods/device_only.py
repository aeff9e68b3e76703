"""Device only: the draft decodes alone, and nothing crosses.

The baseline without an edge, and what a session falls back to. Its text follows the draft's law
and not the target's: that of `isthmus.models.decode.generate` with the draft under the same key.
"""

from __future__ import annotations

from pydantic import Field as Knob

from isthmus import catalogue
from isthmus.inference.method import Knobs, Method


class Settings(Knobs):
    """gamma: 0, as there is nobody to draft for."""

    gamma: int = Knob(0, ge=0, le=0)


@catalogue.register("device-only", place="serving", status="verified")
class DeviceOnly(Method):
    """No offer, no verdict."""

    Settings = Settings
    edge = False
    lossless = False
