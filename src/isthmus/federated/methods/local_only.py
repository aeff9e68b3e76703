"""Local only: every client trains alone and nothing crosses; the floor of every comparison.

    client:  w_i <- w_i - lr * grad l(w_i; b)

The model a client starts from is the common first one, and it keeps its own from then on.
"""

from __future__ import annotations

from collections.abc import Mapping

from isthmus import catalogue
from isthmus.federated.method import Method
from isthmus.models.factors import Places
from isthmus.tasks.contract import Role


@catalogue.register("local-only", place="method", status="verified")
class LocalOnly(Method):
    """Turns every shared tensor into a local one."""

    communicates = False

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return {name: "local" if role == "shared" else role for name, role in given.items()}
