"""A deployment's two halves over the grid in this process, and the run that they must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.federated import tiny

from isthmus.federated.flower.app import play
from isthmus.federated.round import Federation
from isthmus.run import deployment
from isthmus.run.build import Built, build
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

SMALL = f"{Path(__file__).parent / 'small.py'}:task"


def keys_of(method: str, **more: Any) -> dict[str, Any]:
    given = tiny.config(method, **more).model_dump(mode="json", exclude_defaults=True)
    settings = {f"settings.{key}": value for key, value in given.pop("settings", {}).items()}
    return {**given, **settings, "task": SMALL, "clients": 3, "rounds": 4, "evaluate": 0}


def flat(keys: dict[str, Any]) -> dict[str, Any]:
    """As an app's configuration, which has no lists."""
    return {k: str(v) if isinstance(v, list | tuple) else v for k, v in keys.items()}


def deployed(keys: dict[str, Any], client: Any = None) -> Built:
    """Both halves over our grid."""
    ended: list[Built] = []

    def server(grid: Any, context: Any) -> None:
        own, source = deployment._parted(context.run_config)
        ended.append(deployment.serve(grid, deployment.config_of(own), source=source))

    node = deployment.node_app()
    play(server, client(node) if client else node, flat(keys), 3, Link(), Ledger())
    return ended[0]


def reference(keys: dict[str, Any]) -> Federation:
    config = deployment.config_of(flat({**keys, "executor": "sequential"}))
    fed = build(config, Ledger()).federation
    for _ in range(config.rounds):
        fed.step()
    return fed


class Flaky:
    """A client's half that fails at some of its calls, or forgets what its node kept."""

    def __init__(self, app: Any, fails: set[int], forgets: int = 0) -> None:
        self.app, self.fails, self.forgets, self.calls = app, fails, forgets, 0

    def __call__(self, message: Any, context: Any) -> Any:
        self.calls += message.metadata.message_type == "train"
        if self.calls == self.forgets:
            context.state.clear()
        if self.calls in self.fails:
            self.app(message, context)  # the work is done, and then its process dies
            raise MemoryError("no room")
        return self.app(message, context)
