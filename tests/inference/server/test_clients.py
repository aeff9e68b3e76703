"""The stock OpenAI client against a real server, and clients that go away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.inference.server.served import served

from isthmus.inference.server.service import Service
from isthmus.models.language import Language

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

SAID: Any = [{"role": "user", "content": "If the file"}]
TOKEN = "sixteen-or-more-signs"


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_whole_and_streamed(client: Any) -> None:
    asked = {"model": "embedded", "messages": SAID, "seed": 4, "max_tokens": 30}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *told, last, counted = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in told)
    assert text == whole.choices[0].message.content and text
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert counted.usage == whole.usage and whole.usage.completion_tokens <= 30
    own = client.chat.completions.create(**asked, extra_body={"isthmus": {"method": "cloud-only"}})
    assert {by for _, by in own.model_extra["isthmus"]["spans"]} == {"target"}


def test_completions_and_models(client: Any) -> None:
    asked = {"model": "embedded", "prompt": "If the file", "seed": 4, "max_tokens": 30}
    whole = client.completions.create(**asked)
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    stop = whole.choices[0].text[5:9]
    cut = client.completions.create(**asked, stop=[stop])
    assert cut.choices[0].text == whole.choices[0].text.partition(stop)[0]
    assert [model.id for model in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").owned_by == "isthmus"


def test_errors_are_the_clients_own(client: Any, address: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="embedded", messages=SAID, n=2)
    assert error.value.param == "n" and error.value.code == "unsupported_parameter"
    with pytest.raises(openai.NotFoundError, match="embedded"):
        client.chat.completions.create(model="another", messages=SAID)
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(default_headers={"Origin": "http://evil.example"}).models.list()


def test_the_token_is_the_clients_key(pair: tuple[Language, Language]) -> None:
    from isthmus.inference.server.app import make_app

    with served(make_app(Service(*pair, at_once=1), TOKEN)) as address:
        keyed = openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0)
        assert keyed.completions.create(model="embedded:target", prompt="If", max_tokens=2).choices
        with pytest.raises(openai.AuthenticationError):
            keyed.with_options(api_key="another").models.list()


def test_clients_at_once_get_their_solo_texts(client: Any) -> None:
    def say(seed: int) -> str:
        asked = {"model": "embedded", "messages": SAID, "seed": seed, "max_tokens": 24}
        if seed % 2:
            return client.chat.completions.create(**asked).choices[0].message.content
        streamed = client.chat.completions.create(**asked, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in streamed)

    alone = [say(seed) for seed in range(8)]
    told: dict[int, str] = {}

    def store(seed: int) -> None:
        told[seed] = say(seed)

    threads = [threading.Thread(target=store, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [told[seed] for seed in range(8)] == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_session(
    stream: bool, pair: tuple[Language, Language]
) -> None:
    from isthmus.inference.server.app import make_app

    service = Service(*pair, at_once=2)
    forwards: list[Callable[..., Any]] = []
    extend = service.judging.memory.extend

    def slowly(*args: Any) -> Any:
        time.sleep(0.05)
        forwards.append(extend)
        return extend(*args)

    service.judging.memory.extend = slowly  # type: ignore[method-assign]
    body = {"messages": SAID, "max_tokens": 400, "stream": stream, "seed": 8, "temperature": 1.2}
    with served(make_app(service)) as address:
        url = f"{address}/v1/chat/completions"
        if stream:
            with httpx.stream("POST", url, json=body) as answer:
                lines = answer.iter_lines()
                assert all(next(lines) is not None for _ in range(6))
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.4)
        for _ in range(400):
            gauges = service.gauges()
            if gauges["isthmus_sessions_active"] == 0:
                break
            time.sleep(0.01)
        assert gauges["isthmus_sessions_active"] == gauges["isthmus_sessions_waiting"] == 0
        assert not service.judging.memory._lengths and not service.drafting.memory._lengths
        text = httpx.get(f"{address}/metrics").text
        assert 'isthmus_texts_total{finish="cancelled"} 1' in text
        came_to = len(forwards)
        assert httpx.post(url, json=body | {"max_tokens": 1, "stream": False}).status_code == 200
        assert 0 < came_to < 60


def test_closing_the_server_ends_its_streams(pair: tuple[Language, Language]) -> None:
    from isthmus.inference.server.app import make_app

    service = Service(*pair, at_once=1)
    with served(make_app(service)) as address:
        assert httpx.get(f"{address}/health").json()["status"] == "ok"
    assert not service.alive
