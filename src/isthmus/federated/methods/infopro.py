"""InfoPro: local modules that keep what the picture needs, by decoding it from their features.

Wang, Ni, Song, Yang and Huang, "Revisiting locally supervised learning: an alternative to
end-to-end training", ICLR 2021, arXiv:2101.10832. Claim: matches end-to-end training of
convolution nets with less than 40 % of the memory.

    loss_k = l1(k) BCE(dec_k(h_k), x) + l2(k) CE(aux_k(h_k), y),  no gradient crosses a border

Here on tokens (InfoPro-Transformer): dec_k gives the pixels of each patch. As in the authors' code
the pixels are not normalised and are compared by cross-entropy, so they lie in [0, 1]. The rest is
that of `local-learning`, which reconstructs features instead.
"""

from __future__ import annotations

from typing import Literal

from isthmus import catalogue
from isthmus.federated.methods import local_learning
from isthmus.federated.methods.local_learning import LocalLearning


class Settings(local_learning.Settings):
    """As those of `local-learning`."""

    target: Literal["features", "pixels", "none"] = "pixels"


@catalogue.register("infopro", place="method", status="reconstructed")
class InfoPro(LocalLearning):
    """Differs in the target alone."""

    Settings = Settings
