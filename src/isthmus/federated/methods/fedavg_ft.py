"""FedAvg with fine-tuning: each client trains the global model a little before it predicts.

The baseline that every personalised method has to beat (Yu, Bagdasaryan and Shmatikov, "Salvaging
federated learning by local adaptation", arXiv:2002.04758). Training is FedAvg's, to the bit.

    predict:  w_i <- w;  E epochs of  w_i <- w_i - lr * grad l(w_i; b)
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from isthmus import catalogue
from isthmus.federated.method import Knobs, Method
from isthmus.learn.phase import Phase


class Settings(Knobs):
    """epochs: passes over the client's own data before it predicts."""

    epochs: int = Field(1, ge=1)


@catalogue.register("fedavg-ft", place="method", status="verified")
class FedAvgFT(Method):
    """Overrides F, for the purpose `score` alone."""

    Settings = Settings

    def phases(self, purpose: str) -> list[Phase]:
        if purpose != "score":
            return super().phases(purpose)
        tune = replace(self.local, epochs=self.knobs.epochs, steps=None).plans
        return [replace(phase, name="tune", plans=tune) for phase in super().phases("train")]
