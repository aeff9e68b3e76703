"""Local adapters only: every client tunes its own pair and nothing crosses.

The floor (and with very different clients often the ceiling) of federated LoRA: what a device
can do with its own text alone.

    client:  (B_i, A_i) <- (B_i, A_i) - lr * grad l(W + s B_i A_i; b)
"""

from __future__ import annotations

from collections.abc import Mapping

from isthmus import catalogue
from isthmus.federated.adapters.lora import LoraMethod
from isthmus.federated.adapters.product import Lora
from isthmus.models.factors import Places
from isthmus.tasks.contract import Role


@catalogue.register("local-lora", place="method", status="verified")
class LocalLora(LoraMethod):
    """Turns every shared tensor into a local one."""

    Settings = Lora
    communicates = False
    sends_values = False

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return {name: "local" if role == "shared" else role for name, role in given.items()}
