"""`serve`, `chat` and `generate --edge`: real processes, the same tokens, one line for errors."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import isthmus
from isthmus import cli, seeds
from isthmus.cli.serving import Voice, closing
from isthmus.inference import together
from isthmus.inference.session import Round, Token
from isthmus.models import language
from isthmus.models.decode import Law, generate

TOKEN = "sixteen-or-more-signs"
PROMPT = "If the file"


@contextmanager
def started(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`isthmus serve` as a process, and the address that it prints."""
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(isthmus.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "ISTHMUS_TOKEN": TOKEN,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "isthmus", "serve", "--port", "0", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"127\.0\.0\.1:\d+", line)
        assert found, line + process.stdout.read()
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[Any, Any]]:
    """The whole server, and an edge alone."""
    pytest.importorskip("uvicorn")
    with started("--link", "lte") as whole, started("--role", "edge") as edge:
        yield whole, edge


@pytest.fixture
def edge(processes: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ISTHMUS_TOKEN", TOKEN)
    return processes[1][1]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return language.load("embedded"), language.load("embedded:draft")


def say(pair: tuple[Any, Any], method: str = "dssd", **more: Any) -> str:
    target, draft = pair
    options = {"law": Law(0.8), "max_new_tokens": 16, "seed": 2, "link": None} | more
    (reply,) = together.decode(target, draft, [target.encode(PROMPT)], method=method, **options)
    return target.decode([*target.encode(PROMPT), *reply.ids])


def run(capsys: Any, *words: str) -> tuple[int, str, str]:
    status = cli.main([*words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_whole_server_answers_and_ctrl_c_stops_it(processes: tuple[Any, Any]) -> None:
    httpx = pytest.importorskip("httpx")
    process, address = processes[0]
    ours = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"http://{address}/health").json()["status"] == "ok"
    assert httpx.get(f"http://{address}/v1/models").status_code == 401
    assert httpx.get(f"http://{address}/isthmus/about", headers=ours).json()["link"] == "lte"
    body = {"model": "embedded", "prompt": PROMPT, "max_tokens": 8, "seed": 1}
    answer = httpx.post(f"http://{address}/v1/completions", json=body, headers=ours, timeout=60)
    assert answer.json()["choices"][0]["text"]
    assert "<h1" in httpx.get(f"http://{address}/").text
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and out.endswith("stopped\n") and "Traceback" not in out


@pytest.mark.parametrize("method", ["dssd", "tk-slt", "full-row", "cloud-only", "device-only"])
def test_generate_at_an_edge_is_the_same_text_as_in_one_process(
    method: str, edge: str, pair: tuple[Any, Any], capsys: Any
) -> None:
    words = ["generate", PROMPT, "--edge", edge, "--method", method, "-n", "16", "--seed", "2"]
    status, out, err = run(capsys, *words)
    assert (status, out) == (0, say(pair, method) + "\n")
    assert re.match(r"\d+ tokens? in .* real", err) and err.count("\n") == 1
    assert ("per token" in err) == (method != "device-only")


def test_generate_as_json(edge: str, pair: tuple[Any, Any], capsys: Any) -> None:
    words = ["generate", PROMPT, "--edge", edge, "--json", "-n", "16", "--seed", "2"]
    status, out, err = run(capsys, *words)
    told = json.loads(out)
    assert status == 0 and err == "" and out.count("\n") == 1
    assert told["prompt"] + told["text"] == say(pair)
    assert sum(round["accepted"] for round in told["rounds"]) >= sum(
        token["origin"] == "accepted" for token in told["tokens"]
    )
    assert told["finished"] in ("stop", "length") and told["problem"] == ""


def test_an_edge_that_is_not_there(capsys: Any, pair: tuple[Any, Any]) -> None:
    words = ["generate", PROMPT, "--edge", "127.0.0.1:9", "-n", "16", "--seed", "2"]
    status, out, err = run(capsys, *words)
    assert status == 2 and out == PROMPT + "\n"
    assert err.startswith("isthmus: ") and err.count("\n") == 1 and "127.0.0.1:9" in err
    status, out, _ = run(capsys, *words, "--fallback", "device")
    assert (status, out) == (0, say(pair, "device-only") + "\n")
    status, out, err = run(capsys, "chat", PROMPT, "--edge", "127.0.0.1:9")
    assert status == 2 and "127.0.0.1:9" in err


def test_a_wrong_token_is_refused(edge: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("ISTHMUS_TOKEN")
    for words in ([], ["--token", "another-of-16-signs"]):
        status, _, err = run(capsys, "generate", PROMPT, "--edge", edge, *words)
        assert status == 2 and err.count("\n") == 1 and "another" not in err
    assert run(capsys, "generate", PROMPT, "--edge", edge, "--token", TOKEN, "-n", "2")[0] == 0


def test_generate_alone_is_plain_decoding(pair: tuple[Any, Any], capsys: Any) -> None:
    target = pair[0]
    ids = generate(target.model, [target.encode(PROMPT)], 16, Law(0.8), seeds.key(2))[0]
    status, out, err = run(capsys, "generate", PROMPT, "-n", "16", "--seed", "2")
    assert (status, err) == (0, "") and out == target.decode(ids) + "\n"


@pytest.mark.parametrize("words", [[], ["--method", "cloud-only", "--draft", "none"]])
def test_chat_with_a_local_pair(words: list[str], pair: tuple[Any, Any], capsys: Any) -> None:
    wanted = say(pair, words[1] if words else "dssd", link="wifi")
    status, out, err = run(capsys, "chat", PROMPT, "-n", "16", "--seed", "2", *words)
    text, line, end = out.rsplit("\n", 2)
    assert status == 0 and err == "" and end == "" and PROMPT + text == wanted
    assert re.fullmatch(
        r"\d+ tokens? in .* virtual, [\d.]+ k?B up and [\d.]+ k?B down per token"
        + ("" if words else r", \d+% of \d+ judged drafts accepted"), line,
    )  # fmt: skip


def test_chat_at_an_edge_goes_on_over_several_lines(
    edge: str, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n\nThis function\n"))
    here = run(capsys, "chat", "-n", "16", "--seed", "2")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n\nThis function\n"))
    there = run(capsys, "chat", "-n", "16", "--seed", "2", "--edge", edge)
    strip = lambda said: re.sub(r"\d+ tokens? in .*", "", said[1])  # noqa: E731
    assert here[0] == there[0] == 0 and strip(here) == strip(there)
    assert here[1].startswith(say(pair).removeprefix(PROMPT))
    assert len(re.findall(r"\d+ tokens? in .* virtual", here[1])) == 2
    assert len(re.findall(r"\d+ tokens? in .* real", there[1])) == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_who_produced_a_token(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    target = pair[0]
    ids = target.encode(" one two three four five").tolist()[1:]
    shown, plain = Terminal(), io.StringIO()
    for out in (shown, plain):
        voice = Voice(target, [], out)
        for i, (id, origin) in enumerate(zip(ids, isthmus.cli.serving.STYLES, strict=False)):
            voice.hear(i, Token(id, origin, 0.0))
        voice.end()
    codes = re.findall(r"\x1b\[([\d;]+)m[^\x1b]", shown.getvalue())
    assert len(set(codes)) == 5
    assert re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue()) == plain.getvalue() == voice.text
    assert "\x1b" not in plain.getvalue()


def test_a_models_text_does_not_steer_the_terminal(pair: tuple[Any, Any]) -> None:
    target = pair[0]
    ids = target.tokenizer.encode("a\x1b[2Jb\x9bc\td", add_special_tokens=False)
    out = Terminal()
    voice = Voice(target, [], out)
    for id in ids:
        voice.hear(0, Token(id, "accepted", 0.0))
    voice.end()
    assert "\x1b[2J" not in out.getvalue() and "\x9b" not in out.getvalue()
    assert voice.text == "a\x1b[2Jb\x9bc\td"


def test_the_closing_line_counts() -> None:
    tokens = [Token(5, "accepted", 0.1)] * 8
    rounds = [Round(3, 4, 4, 0.1, 100, 20), Round(8, 4, 2, 0.2, 60, 4020)]
    reply = together.Reply([1], tokens, rounds, 0.25, "length", "")
    assert closing(reply, "virtual") == (
        "8 tokens in 250 ms virtual, 20 B up and 505 B down per token, "
        "86% of 7 judged drafts accepted"
    )
    assert closing(together.Reply([1], tokens[:1], [], 0.25, "length", ""), "real") == (
        "1 token in 250 ms real"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "--host", "0.0.0.0"], "token"),
        (["serve", "--host", "0.0.0.0", "--role", "edge"], "token"),
        (["serve", "--token", "short"], "token: one of 5 characters"),
        (["serve", "--port", "70000"], "port"),
        (["serve", "--host", "203.0.113.1", "--token", TOKEN], "203.0.113.1:8000"),
        (["serve", "--role", "everything"], "role"),
        (["serve", "--method", "dsdd"], "nearest: dssd"),
        (["serve", "--draft", "none", "--method", "tk-slt"], "cloud-only"),
        (["serve", "--model", "./nowhere"], "model"),
        (["serve", "--link", "wify"], "nearest: wifi"),
        (["chat", "x", "--edge", "nonsense"], "host:port"),
        (["chat", "x", "--draft", "none", "--edge", "127.0.0.1:9"], "draft"),
        (["chat", "x", "--model", "other", "--edge", "127.0.0.1:9"], "model"),
        (["chat", "x", "-n", "0"], "max-tokens"),
        (["chat", "x", "--draft", "none"], "draft"),
        (["generate", "x", "--json"], "only with --edge"),
        (["generate", "x", "--method", "tk-slt"], "only with --edge"),
        (["generate", "x", "--edge", "a:b"], "host:port"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: Any) -> None:
    status, _, err = run(capsys, *words)
    assert status == 2 and err.count("\n") == 1 and said in err
    assert "short" not in err and TOKEN not in err
