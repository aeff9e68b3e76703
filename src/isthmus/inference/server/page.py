"""The page, put together into one file that loads nothing, and what it asks about the server."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from isthmus import catalogue
from isthmus.inference.method import Method
from isthmus.wire.link import PROFILES

if TYPE_CHECKING:
    from isthmus.inference.server.service import Service


@cache
def page() -> tuple[str, str]:
    """The page and its policy: it speaks to this server only, and runs only its own script."""
    html, style, script = (_asset(f"page.{kind}") for kind in ("html", "css", "js"))
    html = html.replace("/*style*/", style).replace("/*script*/", script)
    code = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{code}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return html, policy


def about(service: Service) -> dict[str, Any]:
    """What the page offers: models, methods and links by name, each with a line about it."""
    titles = {system.name: system.title for system in catalogue.systems(all=True)}
    return {
        "model": service.name,
        "draft": None if service.draft is None else service.draft.name,
        "chat": bool(service.language.tokenizer.chat_template),
        "device": service.device,
        "edge": service.edge,
        "context": service.context,
        "method": service.method,
        "link": service.link,
        "methods": [
            {"name": name, "told": titles.get(name, ""), "edge": kind.edge, "gamma": _gamma(kind)}
            for name, kind in service.methods.items()
        ],
        "links": [{"name": name, "told": _told(name)} for name in service.links],
    }


def _gamma(kind: type[Method]) -> int | None:
    """The draft length of a method unless told otherwise; None where nothing is drafted."""
    try:
        kind.Settings(gamma=1)
    except ValidationError:
        return None
    return kind.Settings().gamma


def _told(link: str) -> str:
    """A link in a few words.

    >>> _told("wifi"), _told("ideal"), _told("lora,loss=0.1")
    ('50 Mbit/s up, 100 Mbit/s down, 3 ms', 'no time, no loss', '')
    """
    profile = PROFILES.get(link)
    if profile is None:
        return ""
    if not profile:
        return "no time, no loss"
    return (
        f"{_rate(profile['up'])} up, {_rate(profile['down'])} down, {1e3 * profile['latency']:g} ms"
    )


def _rate(bits: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if bits >= size:
            return f"{bits / size:.3g} {unit}bit/s"
    return f"{bits:.3g} bit/s"


@cache
def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")
