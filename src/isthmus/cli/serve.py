"""`isthmus serve`: an OpenAI-compatible server in two parts, or the edge alone."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from isthmus import __version__
from isthmus.cli.serving import few_threads, optional, token_of
from isthmus.errors import InputError, need

if TYPE_CHECKING:
    from isthmus.inference.server.service import Service


def command(
    model: Annotated[str, arg(metavar="NAME", aliases=["-m"])] = "embedded",
    draft: Annotated[str, arg(metavar="NAME")] = "embedded:draft",
    method: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    link: Annotated[str, arg(metavar="NAME")] = "wifi",
    device: Annotated[str, arg(metavar="NAME")] = "phone",
    edge: Annotated[str, arg(metavar="NAME")] = "edge-server",
    fallback: Literal["none", "device"] = "none",
    role: Literal["all", "edge"] = "all",
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None,
    token: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None,
    at_once: Annotated[int, arg(metavar="N")] = 16,
) -> int:
    """Serve a language model in two parts, over OpenAI's API and on a page of its own.

    The draft runs on a modelled device, the model at a modelled edge; every message between
    them is really encoded, crosses a modelled link and is counted. With --role edge only the
    edge is served, to devices that are processes of their own (isthmus chat --edge HOST:PORT).

    Args:
        model: The target: embedded, the folder of a tuned run, a Hugging Face folder or id, or a
            llama2.c .bin file.
        draft: The small model on the device, with the same tokenizer; none: the target alone.
        method: How the two work together, unless a request says: dssd, tk-slt, full-row,
            cloud-only or device-only (default: dssd; cloud-only without a draft).
        link: What is between them, unless a request says: wifi, 5g, lte, ... or up=1e6,down=1e7.
        device: What the draft is declared to run on.
        edge: What the target is declared to run on.
        fallback: What a text does whose link gave up: end with an error, or go on by the draft.
        role: The whole server, or the edge alone for devices elsewhere.
        host: Where to listen; beyond this machine only with a token.
        port: Where to listen (default: 8000, of an edge alone 7341); 0: any that is free.
        token: What callers must know (16 characters or more); better in $ISTHMUS_TOKEN.
        at_once: How many texts are in the making at once.
    """
    from isthmus.inference.server.guard import check_token

    secret = check_token(token_of(token), host)
    if port is not None and not 0 <= port < 65536:
        raise InputError("port", port, "0 to 65535")
    with suppress(KeyboardInterrupt):  # what Ctrl-C may end a server with
        if role == "edge":
            _edge(model, edge, host, port, secret)
        else:
            uvicorn = need("uvicorn", "serve")  # said before a model is loaded
            from isthmus.inference.server.service import Service
            from isthmus.run.saved import language_of

            target, small = language_of(model), optional(draft)
            few_threads(target, small)
            service = Service(
                target, small, name=_name(model),
                method=method or ("cloud-only" if small is None else "dssd"), link=link,
                device=device, edge=edge, fallback=fallback, at_once=at_once,
            )  # fmt: skip
            _whole(uvicorn, service, host, port, secret)
    print("stopped")
    return 0


def _whole(uvicorn: Any, service: Service, host: str, port: int | None, secret: str | None) -> None:
    from isthmus.inference.server.app import make_app

    app = make_app(service, secret, __version__)
    with _listening(host, 8000 if port is None else port) as sock:
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=2, server_header=False
        )
        at = _shown(*sock.getsockname()[:2])
        print(
            f"{service.name} at http://{at} by {service.method} over {service.link}; Ctrl-C stops"
        )
        print(f"OpenAI's API: http://{at}/v1, counters: http://{at}/metrics", flush=True)
        uvicorn.Server(config).run(sockets=[sock])


def _edge(model: str, device: str, host: str, port: int | None, secret: str | None) -> None:
    from isthmus.inference.apart import PORT, serve_edge
    from isthmus.inference.edge import Edge
    from isthmus.inference.engine import Engine
    from isthmus.inference.messages import fingerprint
    from isthmus.run.saved import language_of

    target = language_of(model)
    few_threads(target)
    engine = Engine(target.model)
    edge = Edge(engine, device=device, fingerprint=fingerprint(target.tokenizer, engine.vocab))

    def ready(host: str, port: int) -> None:
        print(f"the edge of {_name(model)} is at {_shown(host, port)}; Ctrl-C stops")
        print(f"talk to it: isthmus chat --edge {_shown(host, port)}", flush=True)

    port = PORT if port is None else port
    _listening(host, port).close()  # one line for an address that cannot be had
    serve_edge(edge, host, port, secret, ready=ready)


def _listening(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `InputError` for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        said = os.strerror(number) if isinstance(number, int) and number > 0 else str(error)
        raise InputError("address", _shown(host, port), f"a free one ({said})") from None


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _name(model: str) -> str:
    """What the API calls a model: a folder or file by its last word."""
    from pathlib import Path

    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model
