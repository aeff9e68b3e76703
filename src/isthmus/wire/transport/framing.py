"""Frames on a stream, and the greeting in which both ends prove that they know a token."""

from __future__ import annotations

import hmac
import ipaddress
import socket
import struct

HEADER = struct.Struct(">I")
GREETING = 4096


def proof_of(token: str | None, nonce: str, name: str) -> str:
    """HMAC-SHA256 of the other end's nonce and one's own name; empty without a token."""
    if token is None:
        return ""
    return hmac.digest(token.encode(), f"{nonce} {name}".encode(), "sha256").hex()


def frame(data: bytes) -> bytes:
    """A message with its length before it."""
    return HEADER.pack(len(data)) + data


def read_greeting(sock: socket.socket) -> bytes:
    """One greeting from a blocking socket."""
    (length,) = HEADER.unpack(_exactly(sock, HEADER.size))
    if length > GREETING:
        raise ValueError(f"a greeting of {length} bytes")
    return _exactly(sock, length)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise ValueError("refused")
        data += chunk
    return data


def is_loopback(host: str) -> bool:
    """True when only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
