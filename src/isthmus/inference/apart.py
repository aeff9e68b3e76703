"""Device and edge as real processes: the parties of `together`, over sockets.

The same objects, so with the same seed the same tokens. Frames are not encrypted, and a token is
asked for wherever more than this machine can reach the edge.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from isthmus.errors import InputError
from isthmus.inference.drafting import PLAIN
from isthmus.inference.edge import Edge
from isthmus.inference.engine import Engine
from isthmus.inference.messages import OPEN, fingerprint, kinds
from isthmus.inference.method import Method, method_of
from isthmus.inference.session import Fallback, Session
from isthmus.inference.together import Listen, Reply, heard_by, keys_of
from isthmus.inference.work import declared
from isthmus.models.decode import Law
from isthmus.models.language import Language
from isthmus.wire.clock import Event
from isthmus.wire.device import Device
from isthmus.wire.errors import WireError
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link
from isthmus.wire.transport import InProcess, Socket, Transport, drive

PORT = 7341


def serve_edge(
    edge: Edge,
    host: str = "127.0.0.1",
    port: int = PORT,
    token: str | None = None,
    *,
    ledger: Ledger | None = None,
    ready: Callable[[str, int], None] | None = None,
    until: Callable[[], bool] = lambda: False,
    seconds: float = math.inf,
) -> None:
    """Serve an edge at `host:port` (0: any free port) for so many seconds, or until `until()`,
    which is asked after each event. `ready` hears the address.

    Raises `InputError` for a host other than the loopback without a token of 16 characters.
    """
    vocab = edge.target.vocab
    # The largest message of any method: 64 rows of float64, each with its id.
    most = max(OPEN.max_bytes, 64 * (8 * vocab + 8) + 64)
    socket = Socket.listen(edge.name, host, port, token=token, limit=most)
    try:
        if ready is not None:
            ready(*socket.address)
        names = kinds(edge.methods.values(), vocab)
        drive(edge, socket, until=until, ledger=ledger, kinds=names, seconds=seconds)
    finally:
        socket.close()
        edge.close()


def decode_at(
    address: str | tuple[str, int],
    draft: Language | None,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    method: Method | type[Method] | str = "dssd",
    settings: Mapping[str, Any] | None = None,
    law: Law = PLAIN,
    max_new_tokens: int = 64,
    seed: int = 0,
    link: Link | str | None = None,
    device: str = "phone",
    stop: Sequence[int] | None = None,
    fallback: Fallback = "none",
    ledger: Ledger | None = None,
    listen: Listen | None = None,
    token: str | None = None,
    timeout: float = 30.0,
    tries: int = 3,
    name: str | None = None,
    tokenizer: Any = None,
    vocab: int | None = None,
) -> list[Reply]:
    """Answer prompts (ids), one after the other, by the edge at `address` (`host:port`).

    As `together.decode`, in real seconds: `device` and `link` only say what a method that adapts
    is to expect. `name` is the device's at the edge, a random one unless given. A device without
    a draft names the `tokenizer` and the size of the vocabulary (that of the tokenizer unless
    given). An edge that cannot be reached or leaves ends in the fallback or in `Reply.problem`.
    """
    drafting = Engine(draft.model) if draft is not None else None
    tokenizer = draft.tokenizer if draft is not None else tokenizer
    if drafting is not None:
        vocab = drafting.vocab
    elif vocab is None:
        if tokenizer is None:
            raise InputError("tokenizer", "none", "a tokenizer, where there is no draft")
        vocab = len(tokenizer)
    if stop is None:
        end = getattr(tokenizer, "eos_token_id", None)
        stop = draft.stop if draft is not None else () if end is None else (end,)
    method = method_of(method, vocab, settings)
    link = Link.parse(link) if isinstance(link, str) else link or Link()
    mark, weak = fingerprint(tokenizer, vocab), Device.named(device)
    transport, problem = _connected(
        name or f"device/{secrets.token_hex(4)}", address, token, timeout
    )
    there = next(iter(transport.parties()), "edge")
    replies: list[Reply] = []
    try:
        for i, (prompt, key) in enumerate(zip(prompts, keys_of(seed, len(prompts)), strict=True)):
            session = Session(
                method, prompt, draft=drafting, name=transport.name, edge=there, number=i + 1,
                law=law, key=key, max_new_tokens=max_new_tokens, stop=stop, fingerprint=mark,
                costs=declared(drafting, weak, link, len(prompt)), fallback=fallback,
                timeout=timeout, tries=tries, eager=True, listen=heard_by(listen, i),
            )  # fmt: skip
            replies.append(_driven(session, transport, method, ledger, problem))
    finally:
        transport.close()
    return replies


def _driven(
    session: Session, transport: Transport, method: Method, ledger: Ledger | None, problem: str
) -> Reply:
    """Run one session to its end."""
    start = [Event("begin")]
    if problem:
        start.append(Event("gone", session.edge, fields={"problem": problem}))
    names = {method.down.number: method.down.kind} if method.edge else {}
    began = transport.now()
    drive(
        session, transport, until=lambda: bool(session.finished), ledger=ledger, kinds=names,
        start=start,
    )  # fmt: skip
    return Reply.of(session, began)


def _connected(
    name: str, address: str | tuple[str, int], token: str | None, timeout: float
) -> tuple[Transport, str]:
    """A connection to the edge, or to nobody with what went wrong."""
    if isinstance(address, str):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise InputError("address", address, "host:port")
        address = (host.strip("[]"), int(port))
    try:
        return Socket.connect(name, *address, token=token, timeout=timeout), ""
    except WireError as error:
        return InProcess(name, {}), f"at {error}"
