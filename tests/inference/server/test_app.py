"""The protocol: OpenAI's shapes, streams equal to whole answers, and never a status of 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import InputError
from isthmus.inference.server.guard import check_token
from isthmus.inference.server.prompts import of_chat, plain
from isthmus.inference.server.service import Service

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

T = TypeVar("T")
HOST = "http://127.0.0.1:8000"
SAID = [{"role": "user", "content": "If the file"}]
TOKEN = "sixteen-or-more-signs"


@pytest.fixture(scope="module")
def app(service: Service) -> Any:
    from isthmus.inference.server.app import make_app

    return make_app(service)


def _ask(app: Any, asking: Callable[[Any], Coroutine[Any, Any, T]], base: str = HOST) -> T:
    async def talk() -> T:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=base, timeout=60) as client:
            return await asking(client)

    return asyncio.run(talk())


def post(app: Any, path: str, body: Any, **headers: str) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _ask(app, lambda client: client.post(path, content=raw, headers=headers))


def get(app: Any, path: str, base: str = HOST, **headers: str) -> Any:
    return _ask(app, lambda client: client.get(path, headers=headers), base)


def chat(app: Any, **more: Any) -> Any:
    body = {"model": "embedded", "messages": SAID, "max_tokens": 24, "seed": 3, "temperature": 0.8}
    return post(app, "/v1/chat/completions", body | more)


def events(answer: Any) -> Iterator[dict[str, Any]]:
    *parts, end, rest = answer.text.split("\n\n")
    assert end == "data: [DONE]" and rest == ""
    for part in parts:
        assert part.startswith("data: ")
        yield json.loads(part[6:])


def test_a_chat_in_openais_shape(app: Any, service: Service) -> None:
    answer = chat(app).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "embedded"
    assert answer["id"].startswith("chatcmpl-") and answer["created"] > 1e9
    (choice,) = answer["choices"]
    assert choice["index"] == 0 and choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length") and choice["message"]["content"]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(service.language.encode("If the file"))
    assert 0 < usage["completion_tokens"] <= 24
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert "isthmus" not in answer


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_is_the_whole_answer(app: Any, path: str) -> None:
    body: dict[str, Any] = {"messages": SAID, "prompt": "If the file", "max_tokens": 30, "seed": 3}
    whole = post(app, path, body).json()
    answer = post(app, path, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last, counted = events(answer)
    chat = "chat" in path
    assert {chunk["object"] for chunk in [*chunks, last]} == {
        "chat.completion.chunk" if chat else "text_completion"
    }
    assert len({chunk["id"] for chunk in [*chunks, last, counted]}) == 1
    if chat:
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        told = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        assert (
            told == whole["choices"][0]["message"]["content"] and last["choices"][0]["delta"] == {}
        )
    else:
        told = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert told == whole["choices"][0]["text"] and last["choices"][0]["text"] == ""
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert counted["choices"] == [] and counted["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in [*chunks, last])
    assert all("usage" not in chunk for chunk in events(post(app, path, body | {"stream": True})))


def test_what_is_its_own_is_told_only_when_asked(app: Any) -> None:
    own = {"method": "tk-slt", "link": "3g", "settings": {"gamma": 2}}
    whole = chat(app, isthmus=own).json()
    text = whole["choices"][0]["message"]["content"]
    assert "".join(said for said, _ in whole["isthmus"]["spans"]) == text
    assert {by for _, by in whole["isthmus"]["spans"]} <= {
        "accepted",
        "corrected",
        "bonus",
        "target",
    }
    assert whole["isthmus"]["seed"] == 3
    *chunks, last = events(chat(app, isthmus=own, stream=True))
    told = [chunk["isthmus"] for chunk in chunks if "isthmus" in chunk]
    assert [one["figures"]["tokens"] for one in told] == list(range(1, len(told) + 1))
    assert len(told) == whole["usage"]["completion_tokens"]
    strip = {"wall": 0}
    assert last["isthmus"]["figures"] | strip == whole["isthmus"]["figures"] | strip
    assert all(one["t"] <= whole["isthmus"]["figures"]["seconds"] for one in told)


def test_stop_strings_end_the_text_and_are_never_told(app: Any) -> None:
    whole = chat(app).json()["choices"][0]["message"]["content"]
    cut = whole[len(whole) // 2 :][:4]
    for stop in (cut, [cut], ["~~~~", cut]):
        answer = chat(app, stop=stop).json()["choices"][0]
        assert answer["message"]["content"] == whole[: whole.index(cut)]
        assert answer["finish_reason"] == "stop"
        chunks = list(events(chat(app, stop=stop, stream=True)))
        told = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert told == whole[: whole.index(cut)]


def test_seeds_lengths_and_laws(app: Any) -> None:
    say = lambda **more: chat(app, **more).json()["choices"][0]["message"]["content"]  # noqa: E731
    assert say(seed=3) == say(seed=3) != say(seed=4)
    assert say(seed=None) != say(seed=None)  # two draws of 24 tokens
    assert say(temperature=0, seed=1) == say(temperature=0, seed=2) == say(top_p=0, seed=7)
    assert say(isthmus={"top_k": 1}, seed=1) == say(temperature=0)
    short = chat(app, max_completion_tokens=3).json()
    assert short["usage"]["completion_tokens"] == 3
    assert short["choices"][0]["finish_reason"] == "length"


def test_completions_take_one_prompt_in_four_forms(app: Any, service: Service) -> None:
    ids = service.language.encode("If the file").tolist()
    forms: list[Any] = ["If the file", ["If the file"], ids, [ids]]
    texts = {
        post(app, "/v1/completions", {"prompt": form, "seed": 1}).json()["choices"][0]["text"]
        for form in forms
    }
    assert len(texts) == 1
    answer = post(app, "/v1/completions", {"seed": 1}).json()
    assert answer["usage"]["prompt_tokens"] == 1 and answer["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"n": 2}, "n", "but for 1"),
        ({"n": True}, "n", "but for 1"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "but for 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 600}, "max_tokens", "context is 512"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'user'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "text",
        ),
        ({"isthmus": {"method": "dsdd"}}, "method", "nearest: dssd"),
        ({"isthmus": {"link": "moon"}}, "link", "wifi"),
        ({"isthmus": {"settings": {"gamma": 99}}}, "settings.gamma", "64"),
    ],
)
def test_what_is_refused_is_400_in_openais_shape(
    app: Any, more: dict[str, Any], param: str | None, said: str
) -> None:
    for stream in (False, True):
        answer = chat(app, stream=stream, **more)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
        assert said in error["message"]
        assert param is None or error["param"] == param


def test_neutral_values_and_unknown_fields_change_nothing(app: Any) -> None:
    plain = chat(app).json()["choices"]
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0.0, "frequency_penalty": None}
    more = {"tools": [], "user": "u", "store": True, "made_up": [1], "metadata": {"a": "b"}}
    assert chat(app, **neutral, **more).json()["choices"] == plain
    parts = [{"role": "user", "content": [{"type": "text", "text": "If the"},
                                          {"type": "text", "text": " file"}]}]  # fmt: skip
    assert chat(app, messages=parts).json()["choices"] == plain


def test_other_models_paths_and_verbs(app: Any) -> None:
    assert chat(app, model="gpt-7").status_code == 404
    assert chat(app, model="gpt-7").json()["error"]["code"] == "model_not_found"
    listed = get(app, "/v1/models").json()
    assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == ["embedded"]
    assert get(app, "/v1/models/embedded").json() == listed["data"][0]
    for path, status in (("/v1/models/gpt-7", 404), ("/nowhere", 404), ("/v1/completions", 405)):
        answer = get(app, path)
        assert answer.status_code == status and answer.json()["error"]["type"]
    assert get(app, "/docs").status_code == get(app, "/openapi.json").status_code == 404


def test_a_body_of_any_size_is_not_read_to_its_end(app: Any) -> None:
    answer = post(app, "/v1/completions", b'{"prompt": "' + b"x" * (5 << 20) + b'"}')
    assert answer.status_code == 413 and "bytes" in answer.json()["error"]["message"]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed",
    "stream", "stream_options", "logprobs", "isthmus", "tools", "logit_bias",
]  # fmt: skip
SANE: dict[str, Any] = {"messages": SAID, "prompt": "If", "max_tokens": 2}


@settings(max_examples=100)
@given(
    st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    st.one_of(
        st.binary(max_size=40),
        ANY.map(lambda value: json.dumps(value).encode()),
        st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=4).map(
            lambda odd: json.dumps(SANE | odd).encode()
        ),
        st.sampled_from([
            b"[" * 100_000, b'{"a":' * 50_000, b"NaN", b'{"temperature": NaN, "prompt": ""}',
            b'{"messages":[{"role":"user","content":"\\ud800"}]}',
            b'{"prompt": "\\u0000", "max_tokens": 2}',
            b'{"prompt": [1e999], "max_tokens": 2}', b"\xff\xfe", b"",
            b'{"prompt": [99999999999999999999], "max_tokens": 2}',
        ]),
    ),
)  # fmt: skip
def test_no_body_is_a_defect(app: Any, path: str, body: bytes) -> None:
    answer = post(app, path, body)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


def test_a_text_that_fails_is_an_error_of_its_own(
    app: Any, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.judging.memory, "extend", lambda *args: 1 / 0)
    answer = chat(app)
    assert answer.status_code == 502 and answer.json()["error"]["type"] == "server_error"
    lines = [line for line in chat(app, stream=True).text.split("\n\n") if line]
    assert json.loads(lines[-2][6:])["error"]["message"] and lines[-1] == "data: [DONE]"


def test_chats_that_are_too_long(app: Any, service: Service) -> None:
    long = [
        {"role": role, "content": f"{role} says {n} " * 12}
        for n in range(12) for role in ("user", "assistant")
    ]  # fmt: skip
    answer = chat(app, messages=long + SAID)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    fitted = chat(app, messages=long + SAID, isthmus={"fit": True}).json()
    assert 300 < fitted["usage"]["prompt_tokens"] <= service.context - 24
    assert chat(app, messages=long[:1] * 1 + SAID, isthmus={"fit": True}).status_code == 200


def test_a_template_of_the_model_is_used(pair: Any) -> None:
    from isthmus.inference.server.openai import Message

    target = pair[0]
    said = [Message(role="user", content="hi"), Message(role="assistant", content=" you")]
    assert of_chat(target, said) == target.encode("hi you").tolist()
    assert (
        plain([Message(role="system", content="a"), Message(role="user", content="b")]) == "a\n\nb"
    )
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<|user|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    target.tokenizer.chat_template = template
    try:
        ids = of_chat(target, [Message(role="user", content="hi")])
        encode = target.tokenizer.encode
        assert ids == [2, *encode("hi", add_special_tokens=False), 3]
        with pytest.raises(InputError, match="no system"):
            of_chat(target, [Message(role="system", content="hi")])
    finally:
        target.tokenizer.chat_template = None


# ------------------------------------------------------------------ who may speak


def test_only_this_machines_names_and_pages_without_a_token(app: Any) -> None:
    for base in (HOST, "http://localhost:1", "http://[::1]:8000", "http://LOCALHOST"):
        assert get(app, "/health", base).status_code == 200
    for base in ("http://evil.example:8000", "http://127.0.0.1.evil.example", "http://10.0.0.1"):
        assert get(app, "/health", base).status_code == 403
    assert get(app, "/v1/models", origin=HOST).status_code == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "null", "http://127.0.0.1"):
        answer = get(app, "/v1/models", origin=origin)
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"
        assert "access-control-allow-origin" not in answer.headers
        assert post(app, "/v1/completions", SANE, origin=origin).status_code == 403


LATIN = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=20)


@settings(max_examples=100)
@given(
    LATIN | st.sampled_from(["[::1", "//", "127.0.0.1:x", "[::1]:8000", "localhost", ""]),
    LATIN | st.sampled_from(["http://[::1", "null", "http://[::1]:8000", "http://localhost", "//"]),
)
def test_no_header_is_a_defect(app: Any, host: str, origin: str) -> None:
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": "/health", "raw_path": b"/health", "query_string": b"",
        "headers": [(b"host", host.encode("latin-1")), (b"origin", origin.encode("latin-1"))],
    }  # fmt: skip
    said: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run(app(scope, receive, send))
    assert said[0]["status"] in (200, 403)
    assert said[0]["status"] == 403 or urlsplit(origin).netloc == host.lower() != ""


def test_the_token_opens_everything_but_page_and_health(service: Service) -> None:
    from isthmus.inference.server.app import make_app

    app = make_app(service, TOKEN)
    assert get(app, "/", "http://far.example").status_code == 200
    assert get(app, "/health", "http://far.example").status_code == 200
    paths = ("/v1/models", "/metrics", "/isthmus/about", "/nowhere", "/docs")
    for given_ in (None, TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer "):
        headers = {"authorization": given_} if given_ else {}
        for path in paths:
            answer = get(app, path, **headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key" and TOKEN not in answer.text
    ours = {"authorization": f"bearer {TOKEN}"}
    assert [get(app, path, **ours).status_code for path in paths] == [200, 200, 200, 404, 404]
    assert get(app, "/v1/models", origin="http://evil.example", **ours).status_code == 403
    assert post(app, "/v1/completions", SANE).status_code == 401


@pytest.mark.parametrize(
    ("token", "host", "passes"),
    [
        (None, "127.0.0.1", True), ("", "localhost", True), (None, "::1", True),
        (None, "0.0.0.0", False), ("", "192.168.0.7", False), ("short", "0.0.0.0", False),
        ("short", "127.0.0.1", False), (TOKEN, "0.0.0.0", True), ("späte " * 4, "::1", False),
    ],
)  # fmt: skip
def test_where_a_token_is_needed(token: str | None, host: str, passes: bool) -> None:
    if passes:
        assert check_token(token, host) == (token or None)
        return
    with pytest.raises(InputError, match="token") as error:
        check_token(token, host)
    assert not token or token not in str(error.value)


def test_metrics_count_what_was_done(app: Any, service: Service) -> None:
    def read() -> dict[str, float]:
        text = get(app, "/metrics")
        assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
        rows = [line.rsplit(" ", 1) for line in text.text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in rows}

    before = read()
    told = chat(app, isthmus={}).json()["isthmus"]["figures"]
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    total = lambda start: sum(v for name, v in grown.items() if name.startswith(start))  # noqa: E731
    assert total("isthmus_tokens_total") == told["tokens"]
    assert grown['isthmus_bytes_total{direction="up"}'] == told["up"]
    assert grown['isthmus_bytes_total{direction="down"}'] == told["down"]
    assert total("isthmus_virtual_seconds_total") == pytest.approx(told["seconds"])
    assert total("isthmus_joules_total") == pytest.approx(
        told["device_joules"] + told["edge_joules"]
    )
    assert grown["isthmus_judged_tokens_total"] == told["judged"]
    assert total("isthmus_texts_total") == 1
    assert grown['isthmus_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    get(app, "/some/made/up/path")
    assert 'path="other",status="404"' in get(app, "/metrics").text
    assert after["isthmus_sessions_active"] == after["isthmus_sessions_waiting"] == 0
    assert 0 < after["isthmus_acceptance_ratio"] < 1
