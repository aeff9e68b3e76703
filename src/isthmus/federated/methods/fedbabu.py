"""FedBABU: the body is trained under a head that nobody trains; each client tunes one at the end.

Oh, Kim, Yun, "FedBABU: toward enhanced representation for federated image classification", ICLR
2022, algorithm 1. Claim: a body learned under a fixed random head is personalised better and
faster than a whole model learned by FedAvg.

    client:   phi_i <- phi_i - lr * grad_phi l(phi_i, h_0);  send phi_i
    server:   phi <- sum_i (n_i / n) phi_i
    predict:  tau_f passes of fine-tuning from (phi, h_0) on the client's own items

h_0 is the first head, the same for all, and never crosses. What is tuned is the head, or the body,
or both (`part`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from isthmus import catalogue
from isthmus.federated import halves
from isthmus.federated.method import Knobs
from isthmus.federated.methods.fedper import FedPer
from isthmus.learn.phase import Phase


class Settings(Knobs):
    """tau_f: passes of fine-tuning before a client predicts; part: what they train."""

    tau_f: int = Field(5, ge=1)
    part: Literal["head", "body", "full"] = "head"


@catalogue.register("fedbabu", place="method", status="verified")
class FedBABU(FedPer):
    """Overrides F: the head is trained for prediction alone, and forgotten."""

    Settings = Settings

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tuning = replace(self.local, epochs=self.knobs.tau_f, steps=None)

    def phases(self, purpose: str) -> list[Phase]:
        if purpose == "warm-up":
            return []
        (both,) = super().phases("train")
        head = tuple(n for n in both.trainable if halves.is_head(n))
        body = tuple(n for n in both.trainable if not halves.is_head(n))
        if purpose == "train":
            return [replace(both, trainable=body)]
        parts = {"head": head, "body": body, "full": both.trainable}
        return [
            replace(both, name="tune", trainable=parts[self.knobs.part], plans=self.tuning.plans)
        ]
