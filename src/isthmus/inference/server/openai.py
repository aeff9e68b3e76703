"""Requests and answers in the shapes of OpenAI's API, and what is refused of them.

Fields that are not known are ignored; known ones that would change the text and are not
supported are refused with one clear line, never passed over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

STOPS = 16
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Refused(Exception):
    """An answer that is an error: an HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = kinds.get(self.status, default)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class Lenient(BaseModel):
    """JSON whose unknown fields are ignored and whose known ones have their type."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Message(Lenient):
    """One message; its content is text, or parts that are all text."""

    class Part(Lenient):
        type: Literal["text"]
        text: str

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(Lenient):
    """`include_usage`: a last chunk with the tokens counted."""

    include_usage: bool | None = None


class Own(Lenient):
    """What OpenAI's API has no word for, in the request's object `isthmus`.

    Given (be it empty), answers carry an object `isthmus` as well: who produced which piece, and
    the figures so far. `fit` leaves out the oldest messages of a chat that is too long.
    """

    method: str | None = None
    link: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    top_k: int = Field(default=0, ge=0)
    fit: bool = False


class Request(Lenient):
    """What completions and chat completions share."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    isthmus: Own | None = None

    # Known and, but for the value that changes nothing, refused.
    n: Any = None
    best_of: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    echo: Any = None
    suffix: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    tools: Any = None
    functions: Any = None
    response_format: Any = None
    audio: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most(self) -> int | None:
        """The most tokens to add, if said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)


class CompletionRequest(Request):
    """POST /v1/completions, for one prompt: a text, its ids, or a list of one of these."""

    prompt: str | Ids | list[str] | list[Ids] = ""


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "audio": (),
}
"""The values, beside null, with which an unsupported field changes nothing."""

NAMES = {
    name
    for kind in (ChatRequest, CompletionRequest, Message, Message.Part, StreamOptions, Own)
    for name in kind.model_fields
}
"""Of all fields; what else stands in a place that pydantic names is a type."""

R = TypeVar("R", bound=Request)


def read(kind: type[R], body: bytes) -> R:
    """The request in a body. Raises `Refused` (400), naming the first field that is wrong."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
        # Of a value that may have several types, one error a type is told: the one of its own
        # type says more than that it has not another.
        first = next((one for one in wrong if not one["type"].endswith("_type")), wrong[0])
        known = (str(part) for part in first["loc"] if isinstance(part, int) or part in NAMES)
        where = ".".join(known)
        raise Refused(400, f"{where or 'body'}: {first['msg']}", param=where or None) from None
    for name, values in NEUTRAL.items():
        given = getattr(request, name)
        if given is not None and not any(_same(given, value) for value in values):
            only = " or ".join(json.dumps(value) for value in values)
            told = f"{name}: not supported" + (f" but for {only}" if only else "")
            raise Refused(400, told, param=name, code="unsupported_parameter")
    return request


def _same(given: Any, value: Any) -> bool:
    """Equality of JSON, where 1 is not true."""
    return isinstance(given, bool) == isinstance(value, bool) and given == value


@dataclass(frozen=True)
class Answer:
    """The JSON objects of one answer, whole or as the chunks of a stream."""

    chat: bool
    id: str
    created: int
    model: str

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return self._object("", [self._choice(said, finish)]) | {"usage": usage}

    def chunk(
        self, text: str | None, finish: str | None = None, first: bool = False
    ) -> dict[str, Any]:
        """A chunk with a piece of text; without one, the last, which says how the text ended."""
        said: dict[str, Any] = {"text": text or ""}
        if self.chat:
            delta = {"role": "assistant"} if first else {}
            said = {"delta": delta if text is None else {**delta, "content": text}}
        return self._object(".chunk", [self._choice(said, finish)])

    def counted(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last one, which only counts tokens."""
        return self._object(".chunk", []) | {"usage": usage}

    def _choice(self, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _object(self, chunk: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(prompt: int, told: int) -> dict[str, int]:
    """Tokens of the prompt, of the text, and of both."""
    return {"prompt_tokens": prompt, "completion_tokens": told, "total_tokens": prompt + told}
