"""Who may speak to the server: this machine's own pages and programs, or whoever has the token.

A web page of another origin can make a browser send requests to a loopback server, and can give
its own name this machine's address. So a request that names an `Origin` must name the server's
own, and without a token the `Host` must be a name of this machine. There is no CORS: no other
page can read an answer.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from isthmus.errors import InputError
from isthmus.inference.server.openai import Refused
from isthmus.wire.transport.framing import is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health")
"""What is answered without a token: the page, which asks for it, and whether the server lives."""

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def check_token(token: str | None, host: str) -> str | None:
    """The token to serve with at `host`, or None where none is needed.

    Raises `InputError` (which does not repeat the token) for one that is too short or not plain
    ASCII, and for none where others than this machine can reach the address.
    """
    if not token:
        if is_loopback(host):
            return None
        raise InputError("token", "none", f"16 characters or more, to listen at {host}")
    if len(token) < 16 or not (token.isascii() and token.isprintable()) or " " in token:
        allowed = "16 or more letters, digits and signs, without spaces"
        raise InputError("token", f"one of {len(token)} characters", allowed)
    return token


class Guard:
    """Stands before `app` and answers itself whoever may not pass; `seen(path, status)` is told
    of every answer."""

    def __init__(self, app: Asgi, token: str | None, seen: Callable[[str, int], None]) -> None:
        self.app, self.token, self.seen = app, token, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def told(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.seen(scope["path"], message["status"])
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        try:
            self._check(scope["path"], _headers(scope))
        except Refused as refused:
            return await self._refuse(refused, told)
        await self.app(scope, receive, told)

    def _check(self, path: str, headers: Mapping[str, str]) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            raise Refused(403, "a page of another origin may not use this server")
        if self.token is None:
            if not is_loopback(_machine(host)):
                raise Refused(403, "without a token the server answers only at this machine's name")
        elif path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())
            if scheme.lower() != "bearer" or not known:
                raise Refused(401, "the token is missing or wrong", code="invalid_api_key")

    async def _refuse(self, refused: Refused, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        if refused.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(refused.body()).encode()})


def _place(origin: str) -> str:
    """Machine and port of an origin; nothing for what is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _machine(host: str) -> str:
    """The machine's name in a `Host`; nothing for what has none.

    >>> _machine("LocalHost:80"), _machine("[::1]:80"), _machine("[::1")
    ('localhost', '::1', '')
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _headers(scope: Scope) -> dict[str, str]:
    """The headers by name; of one given twice, the first (a second `Host` cannot slip in)."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return found
