"""Flower: its apps run here in process, and methods from here run as a Flower app.

`flwr` is imported only when one of these functions is called, after `ready`.
"""

from __future__ import annotations

import os

from isthmus.errors import need

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What keeps Flower and Ray from calling home; Flower reads the first when it is imported."""


def quiet() -> list[str]:
    """Turn off what calls home, unless the environment says something; the variables set here."""
    mine = [name for name in QUIET if name not in os.environ]
    os.environ.update({name: QUIET[name] for name in mine})
    return mine


def ready() -> list[str]:
    """`quiet`, and Flower imported. Raises `MissingExtra` without the extra `flower`."""
    mine = quiet()
    need("flwr", "flower")
    return mine
