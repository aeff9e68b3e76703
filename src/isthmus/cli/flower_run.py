"""`isthmus flower-run`: an unmodified Flower app in this process, every message counted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from isthmus.federated.flower import QUIET, ready


def command(
    app: Annotated[Positional[Path], arg(metavar="APP")],
    num_supernodes: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None,
    run_config: Annotated[str, arg(metavar="'K=V ...'", help_behavior_hint="")] = "",
    link: Annotated[str, arg(metavar="LINK")] = "wifi",
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    seed: Annotated[int, arg(metavar="N")] = 0,
) -> int:
    """Run a Flower app (a folder with [tool.flwr.app]) in this process, without Ray.

    Args:
        app: The app's folder.
        num_supernodes: Clients; what the app's default federation says without it, or 10.
        run_config: Over the app's own configuration, as with `flwr run -c`.
        link: Each client's link: a name, or up=5e6,down=20e6,latency=0.02.
        out: Write the ledger, one row a message, to this new file.
        seed: Of the node ids, losses, and the global generators that the app draws from.
    """
    print(said(ready()))
    from isthmus.federated.flower.app import run
    from isthmus.wire.ledger import Ledger
    from isthmus.wire.link import Link

    parsed, ledger = Link.parse(link, seed), Ledger(out)
    try:
        ran = run(app, run_config, count=num_supernodes, link=parsed, ledger=ledger, seed=seed)
    finally:
        ledger.close()
    print(
        f"{ran.name}: {ran.nodes} clients, {ran.messages} messages, {ran.failed} failed, "
        f"{ran.bytes_down:,} bytes down, {ran.bytes_up:,} up, {ran.seconds:.4g} virtual seconds"
    )
    if out is not None:
        print(f"ledger: {out}")
    return 0


def said(mine: list[str]) -> str:
    """One line on what was turned off.

    >>> said(["RAY_USAGE_STATS_ENABLED"])
    'Flower and Ray call home unless told not to; set here: RAY_USAGE_STATS_ENABLED=0'
    >>> said([])
    'Flower and Ray call home as the environment says'
    """
    if not mine:
        return "Flower and Ray call home as the environment says"
    words = " ".join(f"{name}={QUIET[name]}" for name in mine)
    return f"Flower and Ray call home unless told not to; set here: {words}"
