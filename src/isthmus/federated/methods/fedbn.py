"""FedBN: normalisation layers are personal, everything else is shared.

Li, Jiang, Zhang, Kamp, Dou, "FedBN: federated learning on non-IID features via local batch
normalization", ICLR 2021, algorithm 1. Claim: under feature shift it beats FedAvg and FedProx.

    client:  train all;  scales and shifts of its normalisation layers stay
    server:  w <- sum_i (n_i / n) w_i over the other tensors

Running statistics of batch normalisation are the client's own as well: they are recomputed from
its data before it predicts. The paper has batch normalisation; here layer, group and instance
normalisation are kept in the same way. A model without such layers is trained as by FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from isthmus import catalogue
from isthmus.federated import halves
from isthmus.federated.method import Method
from isthmus.models.factors import Places
from isthmus.tasks.contract import Role

OWN = "norm__"

LAYERS = (
    nn.modules.batchnorm._BatchNorm,  # instance normalisation is one of these
    nn.GroupNorm,
    nn.LayerNorm,
)


@catalogue.register("fedbn", place="method", status="verified")
class FedBN(Method):
    """Turns the parameters of normalisation layers into local ones."""

    @classmethod
    def attach(cls, module: nn.Module, knobs: Any, seed: int) -> nn.Module:
        # Roles go by name, layers by type. A second name at the root, which comes before all
        # others, is the one that a tied tensor is listed under.
        for path, layer in list(module.named_modules()):
            if path and isinstance(layer, LAYERS):
                for part, x in list(layer.named_parameters(recurse=False)):
                    module.register_parameter(f"{OWN}{path}.{part}".replace(".", "__"), x)
        return module

    @classmethod
    def roles(cls, given: Mapping[str, Role], places: Places) -> dict[str, Role]:
        return halves.personal(given, lambda name: name.startswith(OWN))
