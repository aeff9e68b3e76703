"""Serving kept in files: what is written is what was decoded, token by token and byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import InputError
from isthmus.inference.together import decode
from isthmus.models import language
from isthmus.models.decode import Law
from isthmus.models.language import Language
from isthmus.report import serving as told
from isthmus.run.serving import END, Prompt, serve

TEXTS = ("Return the number of", "A list of all")
OPTIONS: dict[str, Any] = {
    "law": Law(temperature=0.7), "max_new_tokens": 12, "seed": 5, "stop": (), "link": "lte",
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> tuple[Language, Language]:
    return language.load("embedded"), language.load("embedded:draft")


@pytest.fixture(scope="module")
def prompts(models: tuple[Language, Language]) -> list[Prompt]:
    return [Prompt(models[0].encode(text), f"owner {i}") for i, text in enumerate(TEXTS)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", ["dssd", "cloud-only", "device-only"])
def test_the_files_hold_what_was_decoded(
    tmp_path: Path, models: tuple[Language, Language], prompts: list[Prompt], method: str
) -> None:
    heard: list[tuple[int, Any]] = []
    replies = serve(
        tmp_path, *models, prompts, method=method, listen=lambda i, t: heard.append((i, t)),
        **OPTIONS,
    )  # fmt: skip
    assert replies == decode(*models, [prompt.ids for prompt in prompts], method=method, **OPTIONS)
    assert sorted(heard, key=lambda each: each[0]) == [
        (i, t) for i, reply in enumerate(replies) for t in reply.tokens
    ]
    place = tmp_path / "serving" / method
    rows = _lines(place / "texts.jsonl")
    for prompt, text, reply, row in zip(prompts, TEXTS, replies, rows, strict=True):
        assert (row["owner"], row["prompt"]) == (prompt.owner, text)
        assert (row["seconds"], row["finished"]) == (reply.seconds, "length")
        tokens = [(token["id"], token["origin"], token["t"]) for token in row["tokens"]]
        assert tokens == [tuple(token) for token in reply.tokens] and len(tokens) == 12
        assert [(r["at"], r["drafted"], r["accepted"]) for r in row["rounds"]] == [
            tuple(round)[:3] for round in reply.rounds
        ]
        spelt = "".join(token["text"] for token in row["tokens"]).replace(END, "")
        assert text + spelt == models[0].decode([*reply.prompt, *reply.ids])
    ledger = _lines(place / "ledger.jsonl")
    for device, reply in enumerate(replies):
        sent = [r for r in ledger if r["from"] == f"device/{device}" and r["to"] == "edge"]
        got = [r for r in ledger if r["to"] == f"device/{device}" and r["kind"] == "verdict"]
        up = sum(r["bytes"] for r in sent if r["kind"] != "close")
        assert up == sum(round.up for round in reply.rounds)
        assert sum(r["bytes"] for r in got) == sum(round.down for round in reply.rounds)
    assert bool(sum(r["bytes"] for r in ledger)) == (method != "device-only")


def test_what_was_written_is_read_in_the_order_of_serving(
    tmp_path: Path, models: tuple[Language, Language], prompts: list[Prompt]
) -> None:
    replies = {
        method: serve(tmp_path, *models, prompts, method=method, settings=settings, **OPTIONS)
        for method, settings in (("tk-slt", {"K": 5}), ("full-row", {"gamma": 2}))
    }
    found = told.read(tmp_path)
    assert [one.method for one in found] == ["tk-slt", "full-row"]
    for one, row in zip(found, told.closing_table(found), strict=True):
        answered = replies[one.method]
        assert row.tokens == sum(len(reply.tokens) for reply in answered) == 24
        assert row.per_second == 24 / sum(reply.seconds for reply in answered)
        assert row.accepted == sum(r.accepted for reply in answered for r in reply.rounds)
        origins = [token.origin for answer in one.answers for token in answer.tokens]
        assert origins.count("accepted") == row.accepted and row.lossless
        assert row.target_calls == sum(len(reply.rounds) for reply in answered) / 24
        assert row.joules > 0 and row.joules_source == "modelled"
    assert found[0].about["settings"]["K"] == 5 and found[1].about["settings"]["gamma"] == 2
    assert found[0].about["law"] == {"temperature": 0.7, "top_k": 0, "top_p": 1.0}
    assert (found[0].about["target"], found[0].about["draft"]) == (
        "embedded:target", "embedded:draft",
    )  # fmt: skip


def test_the_end_of_a_text_is_marked(
    tmp_path: Path, models: tuple[Language, Language], prompts: list[Prompt]
) -> None:
    end = models[0].stop[0]
    options = OPTIONS | {"max_new_tokens": 40}
    (reply,) = serve(tmp_path, *models, prompts[:1], method="cloud-only", **options)
    (row,) = _lines(tmp_path / "serving" / "cloud-only" / "texts.jsonl")
    marked = [END in token["text"] for token in row["tokens"]]
    assert marked == [id == end for id in reply.ids] and any(marked)


def test_a_method_is_served_once_and_a_bad_link_leaves_nothing(
    tmp_path: Path, models: tuple[Language, Language], prompts: list[Prompt]
) -> None:
    options = OPTIONS | {"max_new_tokens": 1}
    with pytest.raises(InputError, match="nearest: lte"):
        serve(tmp_path, *models, prompts, **(options | {"link": "lt"}))
    with pytest.raises(InputError, match="nearest: dssd"):
        serve(tmp_path, *models, prompts, method="dsd", **options)
    assert not list(tmp_path.glob("serving/*"))
    serve(tmp_path, *models, prompts, **options)
    with pytest.raises(InputError, match="not been served here yet"):
        serve(tmp_path, *models, prompts, **options)
