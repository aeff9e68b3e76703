"""The edge of `test_apart`. Run as: python remote_edge.py TOKEN LEDGER. Prints its port."""

from __future__ import annotations

import sys

import torch
from tests.inference import tiny

from isthmus.inference.apart import serve_edge
from isthmus.inference.edge import Edge
from isthmus.inference.engine import Engine
from isthmus.inference.messages import fingerprint
from isthmus.wire.ledger import Ledger


def main(token: str, ledger: str) -> None:
    torch.set_num_threads(1)
    edge = Edge(Engine(tiny.fresh()), fingerprint=fingerprint(None, tiny.VOCAB))
    serve_edge(
        edge, port=0, token=token, ledger=Ledger(ledger) if ledger else None, seconds=120.0,
        ready=lambda host, port: print(port, flush=True),
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
