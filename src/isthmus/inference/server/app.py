"""The HTTP face of a `Service`: OpenAI's endpoints, the page, health and metrics.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{id}
    GET /                       GET /isthmus/about     GET /health      GET /metrics

Whole and streamed answers are made of the same pieces, so they are the same text. A client that
goes away ends its session.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from isthmus.errors import InputError, need
from isthmus.inference.messages import TEXT
from isthmus.inference.server import page, prompts
from isthmus.inference.server.guard import Guard, Receive, Scope, Send
from isthmus.inference.server.openai import (
    Answer,
    ChatRequest,
    CompletionRequest,
    Own,
    Refused,
    Request,
    read,
    usage,
)
from isthmus.inference.server.service import Busy, Service
from isthmus.inference.server.text import Ask, Piece, Text
from isthmus.models.decode import Law

if TYPE_CHECKING:
    from starlette.requests import Request as Http

LIMIT = 4 << 20
"""The most bytes of a request's body."""

T = TypeVar("T")


def make_app(service: Service, token: str | None = None, version: str = "0") -> Any:
    """The application (FastAPI) that serves `service`; with a `token`, only to who has it.
    `version` is what it says of itself.

    Closing the application closes the service. Raises `MissingExtra` without the extra `serve`.
    """
    fastapi = need("fastapi", "serve")
    responses = need("fastapi.responses", "serve")
    index, policy = page.page()

    async def chat(http: Http) -> Any:
        request = read(ChatRequest, await _body(http))
        own = request.isthmus or Own()
        room = service.context - (request.most or 1)
        if own.fit:
            ids, _ = prompts.fitting(service.language, request.messages, room)
        else:
            ids = prompts.of_chat(service.language, request.messages)
        return await respond(http, request, ids, chat=True)

    async def complete(http: Http) -> Any:
        request = read(CompletionRequest, await _body(http))
        ids = _prompt(service, request)
        return await respond(http, request, ids, chat=False)

    async def respond(http: Http, request: Request, ids: list[int], chat: bool) -> Any:
        ask = _ask(service, request, ids, chat)
        answer = Answer(
            chat=chat,
            id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            created=int(time.time()),
            model=service.name,
        )
        queue: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        text = service.start(ask, lambda one: loop.call_soon_threadsafe(queue.put_nowait, one))
        if request.stream:
            return Events(_chunks(request, answer, ask, queue), text)
        try:
            whole = await _unless_left(_whole(request, answer, ask, queue), http.receive)
        finally:
            text.cancel()
        return responses.JSONResponse(whole or {})

    async def models(http: Http) -> Any:
        name = http.path_params.get("name")
        card = {"id": service.name, "object": "model", "created": service.created}
        card |= {"owned_by": "isthmus"}
        if name is None:
            return responses.JSONResponse({"object": "list", "data": [card]})
        _known(service, name)
        return responses.JSONResponse(card)

    async def about(http: Http) -> Any:
        return responses.JSONResponse(page.about(service))

    async def home(http: Http) -> Any:
        return responses.HTMLResponse(index, headers={"content-security-policy": policy})

    async def health(http: Http) -> Any:
        alive = service.alive
        told = {"status": "ok" if alive else "stopped", "version": version}
        return responses.JSONResponse(told, 200 if alive else 503)

    async def metrics(http: Http) -> Any:
        text = service.metrics.text(service.gauges())
        return responses.PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def refused(http: Http, error: Exception) -> Any:
        if isinstance(error, InputError):
            error = Refused(400, str(error), param=error.field)
        elif isinstance(error, Busy):
            error = Refused(429, str(error), code="rate_limit_exceeded")
        elif not isinstance(error, Refused):
            status = getattr(error, "status_code", 500)
            error = Refused(status, getattr(error, "detail", "a defect of the server"))
        headers = {"retry-after": "1"} if error.status == 429 else None
        return responses.JSONResponse(error.body(), error.status, headers)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        service.close()

    app = fastapi.FastAPI(
        title="isthmus",
        lifespan=lifespan,
        version=version,
        docs_url=None,  # their page would load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
        exception_handlers={
            kind: refused
            for kind in (Refused, InputError, Busy, fastapi.HTTPException, 404, 405, Exception)
        },
    )
    for path, endpoint, method in (
        ("/v1/chat/completions", chat, "POST"),
        ("/v1/completions", complete, "POST"),
        ("/v1/models", models, "GET"),
        ("/v1/models/{name:path}", models, "GET"),
        ("/isthmus/about", about, "GET"),
        ("/", home, "GET"),
        ("/health", health, "GET"),
        ("/metrics", metrics, "GET"),
    ):
        app.add_route(path, endpoint, methods=[method])
    known = {route.path for route in app.routes}

    def seen(path: str, status: int) -> None:
        shown = path if path in known else "other"
        service.metrics.add("isthmus_requests_total", path=shown, status=str(status))

    app.add_middleware(Guard, token=token, seen=seen)
    return app


class Events:
    """A streamed answer: server-sent events, until the text or the client ends."""

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], text: Text) -> None:
        self.chunks, self.text = chunks, text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await _unless_left(self._send(send), receive)
        finally:
            self.text.cancel()

    async def _send(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for chunk in self.chunks:
            body = f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _chunks(
    request: Request, answer: Answer, ask: Ask, queue: asyncio.Queue[Piece]
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream; of a text that failed, the last one is an error."""
    count = request.stream_options is not None and bool(request.stream_options.include_usage)
    null = {"usage": None} if count else {}
    if answer.chat:
        yield answer.chunk("", first=True) | null
    while True:
        piece = await queue.get()
        own = {} if request.isthmus is None else {"isthmus": piece.told()}
        said = "".join(span.text for span in piece.spans)
        if said or (own and not piece.finish):
            yield answer.chunk(said) | own | null
            own = {}
        if failed := _failed(piece):
            yield failed.body()
            return
        if piece.finish:
            yield answer.chunk(None, piece.finish) | own | null
            if count:
                yield answer.counted(usage(len(ask.ids), piece.figures.tokens))
            return


async def _whole(
    request: Request, answer: Answer, ask: Ask, queue: asyncio.Queue[Piece]
) -> dict[str, Any]:
    """The answer in one piece. Raises `Refused` (502, 503) for a text that failed."""
    pieces = [await queue.get()]
    while not pieces[-1].finish:
        pieces.append(await queue.get())
    last = pieces[-1]
    if failed := _failed(last):
        raise failed
    spans = [span for piece in pieces for span in piece.spans]
    text = "".join(span.text for span in spans)
    whole = answer.whole(text, last.finish, usage(len(ask.ids), last.figures.tokens))
    if request.isthmus is not None:
        whole["isthmus"] = last.told() | {"spans": spans, "seed": ask.seed}
    return whole


def _failed(last: Piece) -> Refused | None:
    """What to say of a text that did not come to its end."""
    if last.finish == "error":
        return Refused(502, last.problem)
    return Refused(503, "the server is closing") if last.finish == "cancelled" else None


async def _unless_left(doing: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """What `doing` gives; None, and it is cancelled, when the client goes away first."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    done, gone = asyncio.ensure_future(doing), asyncio.ensure_future(left())
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        return done.result() if done.done() else None
    finally:
        done.cancel()
        gone.cancel()


async def _body(http: Http) -> bytes:
    """The body of a request. Raises `Refused` (413) for more than `LIMIT` bytes."""
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > LIMIT:
            raise Refused(413, f"a body of at most {LIMIT} bytes")
    return bytes(body)


def _known(service: Service, name: str) -> None:
    if name != service.name:
        told = f"the model {name!r} is not served here; {service.name!r} is"
        raise Refused(404, told, param="model", code="model_not_found")


def _prompt(service: Service, request: CompletionRequest) -> list[int]:
    """The ids of a completion's one prompt. Raises `Refused` for several or for foreign ids."""
    prompt: Any = request.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise Refused(400, "prompt: one prompt a request", param="prompt")
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompts.of_text(service.language, prompt)
    if not prompt or max(prompt) >= service.vocab:
        raise Refused(400, f"prompt: ids from 0 to {service.vocab - 1}", param="prompt")
    return prompt


def _ask(service: Service, request: Request, ids: list[int], chat: bool) -> Ask:
    """What the service is asked. Raises `Refused` or `InputError` for what it cannot do."""
    if request.model is not None:
        _known(service, request.model)
    room = min(service.context - len(ids), TEXT)
    most = request.most
    if room < 1 or (most or 0) > room:
        told = f"the model's context is {service.context} tokens; the prompt has {len(ids)}"
        told += f" and {most} more are asked for" if most else ""
        raise Refused(400, told, param="max_tokens", code="context_length_exceeded")
    if most is None:
        most = room if chat else min(room, 16)
    own = request.isthmus or Own()
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else max(request.top_p, 1e-9)
    return Ask(
        ids=tuple(ids),
        max_new_tokens=most,
        law=Law(temperature, own.top_k, top_p),
        seed=secrets.randbits(32) if request.seed is None else request.seed,
        stop=request.stops,
        method=own.method,
        link=own.link,
        settings=own.settings,
    )
