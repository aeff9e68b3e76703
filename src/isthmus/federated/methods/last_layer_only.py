"""Last layer only: the features stay as they were drawn (or trained), the head learns.

The floor of every method that trains features in another way than backpropagation, and the
cheapest personalisation of a trained net. Frozen tensors do not travel.

    client:  head <- head - lr * grad_head l;   features: as given
"""

from __future__ import annotations

from collections.abc import Mapping

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.federated.method import Method
from isthmus.models.factors import Places
from isthmus.tasks.contract import Role


@catalogue.register("last-layer-only", place="method", status="verified")
class LastLayerOnly(Method):
    """Turns what is shared outside of `head` into frozen."""

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        if not any(name.startswith("head.") for name in given):
            raise InputError("method", "last-layer-only", "a model with features and head")
        return {
            name: "frozen" if role == "shared" and not name.startswith("head.") else role
            for name, role in given.items()
        }
