"""Parties in processes or machines of their own, over TCP.

A frame is its length (4 bytes, big-endian) and that many bytes. Whoever connects answers a nonce
with its name and, where a token is set, an HMAC-SHA256 of both under it, and gets the same in
return: the token itself never crosses. Frames are not encrypted.
"""

from __future__ import annotations

import hmac
import json
import math
import secrets
import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from isthmus.errors import InputError
from isthmus.wire.errors import WireError
from isthmus.wire.link import Delivery
from isthmus.wire.transport.base import Closed, Received, direct
from isthmus.wire.transport.framing import (
    GREETING,
    HEADER,
    frame,
    is_loopback,
    proof_of,
    read_greeting,
)

STRANGERS = 64
CHUNK = 1 << 18


@dataclass(eq=False)
class _Peer:
    sock: socket.socket
    name: str = ""
    nonce: str = ""
    buffer: bytearray = field(default_factory=bytearray)
    began: float = 0.0
    deadline: float = math.inf


class Socket:
    """One party's end: listening (and knowing all who connected) or connected to a listener.

    `limit` bounds a frame in bytes; `timeout` is the longest that a frame begun, a greeting or a
    send may take in seconds. All work is done inside `send` and `receive`, in the caller's
    thread; while a send waits for its receiver, what arrives is read, so two parties that send
    each other large messages at once do not block.
    """

    framing = HEADER.size

    def __init__(self, name: str, token: str | None, limit: int, timeout: float) -> None:
        if not 0 < len(name) <= 128:
            raise InputError("party", name, "a name of 1 to 128 characters")
        if not 0 < limit < 2**32:
            raise InputError("limit", limit, "1 to 2^32 - 1 bytes")
        self.name, self.limit, self.timeout = name, limit, timeout
        self.address: tuple[str, int] = ("", 0)
        self._token = token
        self._origin = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._strangers: list[_Peer] = []
        self._peers: dict[str, _Peer] = {}
        self._inbox: deque[Received | WireError] = deque()
        self._held = 0

    @classmethod
    def listen(
        cls,
        name: str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str | None = None,
        limit: int = 1 << 26,
        timeout: float = 30.0,
    ) -> Socket:
        """Listen at `host`, at any free port without one (`address` tells). Raises `InputError`
        for a host other than the loopback without a token of 16 characters or more."""
        if not is_loopback(host) and len(token or "") < 16:
            raise InputError("token", token or "none", f"16 characters or more to listen at {host}")
        self = cls(name, token, limit, timeout)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self._listener.setblocking(False)
        self.address = self._listener.getsockname()[:2]
        self._selector.register(self._listener, selectors.EVENT_READ)
        return self

    @classmethod
    def connect(
        cls,
        name: str,
        host: str,
        port: int,
        *,
        token: str | None = None,
        limit: int = 1 << 26,
        timeout: float = 30.0,
    ) -> Socket:
        """Connect to a listener, which may be served only later (it answers when it receives).

        Raises `WireError` when it refuses the name or the token, or does not know the token.
        """
        self = cls(name, token, limit, timeout)
        try:
            sock = socket.create_connection((host, port), timeout)
        except OSError as error:
            self.close()
            raise WireError(f"{host}:{port}", f"cannot be reached ({error})") from None
        try:
            self.address = sock.getsockname()[:2]
            theirs = str(json.loads(read_greeting(sock))["nonce"])
            mine = secrets.token_hex(16)
            hello = {"name": name, "nonce": mine, "proof": proof_of(self._token, theirs, name)}
            sock.sendall(frame(json.dumps(hello).encode()))
            welcome = json.loads(read_greeting(sock))
            their_name, proof = str(welcome["name"]), str(welcome["proof"])
            if not hmac.compare_digest(
                proof.encode(), proof_of(self._token, mine, their_name).encode()
            ):
                raise ValueError("it does not know the token")
        except (OSError, ValueError, KeyError, TypeError) as error:
            sock.close()
            self.close()
            raise WireError(f"{host}:{port}", f"no greeting: {error}") from None
        self._greeted(_Peer(sock), their_name)
        return self

    def now(self) -> float:
        """Seconds since this end was made."""
        return time.monotonic() - self._origin

    def parties(self) -> list[str]:
        """Who is connected."""
        return list(self._peers)

    def send(self, party: str, data: bytes) -> Delivery:
        """Send one frame; `WireError` when it is too large, or the party is not there or slow."""
        sent, peer = self.now(), self._peers.get(party)
        if peer is None:
            raise WireError(party, "is not connected")
        if len(data) > self.limit:
            raise WireError(party, f"a frame of {len(data)} bytes, at most {self.limit}")
        left, deadline = memoryview(frame(data)), sent + self.timeout
        while left:
            try:
                left = left[peer.sock.send(left) :]
            except BlockingIOError:
                self._wait_to_write(peer, deadline)
            except OSError as error:
                self._drop(peer, Closed(party, str(error)))
            if peer.name not in self._peers:
                self._inbox = deque(item for item in self._inbox if not _about(item, party))
                raise WireError(party, f"{len(left)} bytes of a frame were not taken")
        return direct(len(data) + HEADER.size, sent, self.now())

    def _wait_to_write(self, peer: _Peer, deadline: float) -> None:
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        self._selector.modify(peer.sock, both, peer)
        self._poll(deadline - self.now())
        if peer.name in self._peers:
            self._selector.modify(peer.sock, selectors.EVENT_READ, peer)
            if self.now() >= deadline:
                self._drop(peer, WireError(peer.name, "took no bytes in time"))

    def receive(self, timeout: float | None = None) -> Received | None:
        """The next frame; see `Transport.receive`."""
        deadline = math.inf if timeout is None else self.now() + timeout
        while not self._inbox:
            left = deadline - self.now()
            self._poll(max(left, 0.0))
            if left <= 0 and not self._inbox:
                return None
        item = self._inbox.popleft()
        if isinstance(item, WireError):
            raise item
        self._held -= len(item.data)
        return item

    def _poll(self, wait: float) -> None:
        """Wait for something to happen and deal with it."""
        peers = [*self._peers.values(), *self._strangers]
        first = min((peer.deadline for peer in peers), default=math.inf)
        wait = max(min(wait, first - self.now()), 0.0)
        ready = self._selector.select(None if wait == math.inf else wait)
        for key, events in ready:
            if key.data is None:
                self._accept()
            elif events & selectors.EVENT_READ and self._held < 4 * self.limit:
                self._read(key.data)
        for peer in peers:
            if peer.deadline <= self.now() and (
                peer in self._strangers or peer.name in self._peers
            ):
                self._drop(peer, WireError(peer.name or "connection", "a frame not ended in time"))

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it was gone before it was accepted
            return
        if len(self._strangers) >= STRANGERS:
            sock.close()
            return
        peer = _Peer(sock, nonce=secrets.token_hex(16), deadline=self.now() + self.timeout)
        self._strangers.append(peer)
        self._register(peer)
        self._reply(peer, {"nonce": peer.nonce})

    def _register(self, peer: _Peer) -> None:
        peer.sock.setblocking(False)
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(peer.sock, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        who = peer.name or "connection"
        try:
            chunk = peer.sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            return self._drop(peer, WireError(who, str(error)))
        if not chunk:
            inside = f"left inside a frame, after {len(peer.buffer)} bytes"
            error = WireError(who, inside) if peer.buffer else Closed(who, "left")
            return self._drop(peer, error)
        if not peer.buffer:
            peer.began = self.now()
        peer.buffer += chunk
        try:
            while (data := self._take(peer)) is not None:
                if peer.name:
                    self._inbox.append(Received(peer.name, data, self.now() - peer.began))
                    self._held += len(data)
                else:
                    self._greet(peer, data)
                peer.began = self.now()
        except WireError as error:
            return self._drop(peer, error)
        if peer.name:
            peer.deadline = peer.began + self.timeout if peer.buffer else math.inf

    def _take(self, peer: _Peer) -> bytes | None:
        """The next whole frame in the buffer; refuses a length before any of it is stored."""
        if len(peer.buffer) < HEADER.size:
            return None
        (length,) = HEADER.unpack_from(peer.buffer)
        limit = self.limit if peer.name else GREETING
        if length > limit:
            who = peer.name or "connection"
            raise WireError(who, f"a frame of {length} bytes, at most {limit}")
        if len(peer.buffer) < HEADER.size + length:
            return None
        data = bytes(memoryview(peer.buffer)[HEADER.size : HEADER.size + length])
        del peer.buffer[: HEADER.size + length]
        return data

    def _greet(self, peer: _Peer, data: bytes) -> None:
        try:
            hello = json.loads(data)
            name, nonce, proof = (str(hello[part]) for part in ("name", "nonce", "proof"))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise WireError("connection", "a malformed greeting") from None
        if not hmac.compare_digest(
            proof.encode(), proof_of(self._token, peer.nonce, name).encode()
        ):
            raise WireError("connection", "a wrong token")
        if not 0 < len(name) <= 128 or name in self._peers or name == self.name:
            raise WireError("connection", f"the name {name[:128]!r} is not free")
        self._strangers.remove(peer)
        self._selector.unregister(peer.sock)
        self._greeted(peer, name)
        self._reply(peer, {"name": self.name, "proof": proof_of(self._token, nonce, self.name)})

    def _greeted(self, peer: _Peer, name: str) -> None:
        peer.name, peer.deadline = name, math.inf
        self._peers[name] = peer
        self._register(peer)

    def _reply(self, peer: _Peer, fields: dict[str, str]) -> None:
        """Send a greeting, which the empty buffer of a new connection always holds."""
        try:
            peer.sock.send(frame(json.dumps(fields).encode()))
        except OSError as error:
            self._drop(peer, WireError(peer.name or "connection", str(error)))

    def _drop(self, peer: _Peer, error: WireError) -> None:
        self._inbox.append(error)
        self._selector.unregister(peer.sock)
        peer.sock.close()
        if peer in self._strangers:
            self._strangers.remove(peer)
        else:
            self._peers.pop(peer.name, None)

    def close(self) -> None:
        """Close all connections."""
        for peer in [*self._peers.values(), *self._strangers]:
            peer.sock.close()
        if self._listener is not None:
            self._listener.close()
        self._peers, self._strangers, self._listener = {}, [], None
        self._selector.close()


def _about(item: Any, party: str) -> bool:
    return isinstance(item, WireError) and item.field == party
