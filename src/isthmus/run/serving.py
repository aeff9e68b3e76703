"""Serving a run's model in two parts, kept beside the run: who said which token when.

`RUN/serving/<method>/` holds one method's answers to the same prompts:

    serving.json     how it was served: method and settings, models, law, link, devices, seed
    ledger.jsonl     what crossed and what it cost
    texts.jsonl      one answer a line: owner, prompt, tokens (text, origin, time), rounds

`serving.json` is written last: a method without it is being served, or was interrupted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from isthmus.errors import InputError
from isthmus.inference.method import Method, method_of
from isthmus.inference.server.spelling import Spelling
from isthmus.inference.session import Token
from isthmus.inference.together import Reply, decode
from isthmus.models.decode import Law
from isthmus.models.language import Language
from isthmus.run import checkpoint
from isthmus.run.folder import LEDGER
from isthmus.wire.ledger import Ledger

SERVING, ABOUT, TEXTS = "serving", "serving.json", "texts.jsonl"
END = "¶"


class Prompt(NamedTuple):
    """How a text begins (ids), and whose it is."""

    ids: Sequence[int] | Tensor
    owner: str = ""


def serve(
    folder: Path | str,
    target: Language,
    draft: Language,
    prompts: Sequence[Prompt],
    *,
    method: Method | type[Method] | str = "dssd",
    settings: Mapping[str, Any] | None = None,
    law: Law = Law(),  # noqa: B008
    max_new_tokens: int = 64,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    link: str = "ideal",
    device: str = "phone",
    edge: str = "edge-server",
    listen: Callable[[int, Token], None] | None = None,
) -> list[Reply]:
    """Answer prompts as `isthmus.inference.together.decode` does, and keep it all in `folder`.

    Raises `InputError` as that does, and when `folder` has answers of this method already.
    """
    method = method_of(method, target.model.config.vocab_size, settings)
    place = Path(folder) / SERVING / method.catalogue_name
    if place.exists():
        raise InputError("out", place, "a method that has not been served here yet")
    place.mkdir(parents=True)
    ledger = Ledger(place / LEDGER)
    try:
        replies = decode(
            target, draft, [prompt.ids for prompt in prompts], method=method, law=law,
            max_new_tokens=max_new_tokens, seed=seed, stop=stop, link=link, device=device,
            edge=edge, ledger=ledger, listen=listen,
        )  # fmt: skip
    except InputError:
        ledger.close()
        (place / LEDGER).unlink()
        place.rmdir()
        raise
    ledger.close()
    texts = [
        _row(prompt.owner, reply, target) for prompt, reply in zip(prompts, replies, strict=True)
    ]
    about = {
        "number": len(list(place.parent.glob(f"*/{ABOUT}"))),
        "method": method.catalogue_name,
        "settings": method.knobs.model_dump(),
        "lossless": method.lossless,
        "target": target.name,
        "draft": draft.name,
        "law": dataclasses.asdict(law),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "link": link,
        "device": device,
        "edge": edge,
    }
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    checkpoint.replace_file(place / TEXTS, lines.encode())
    checkpoint.replace_file(place / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
    return replies


def _row(owner: str, reply: Reply, language: Language) -> dict[str, Any]:
    """One answer as a line: each token with the text that it completes, an end of text as ¶."""
    spelling = Spelling(language.decode, reply.prompt)
    tokens = [
        {**token._asdict(), "text": spelling.add(token.id) + END * (token.id in language.stop)}
        for token in reply.tokens
    ]
    if tokens:
        tokens[-1]["text"] += spelling.rest()
    return {
        "owner": owner,
        "prompt": language.decode(reply.prompt),
        "finished": reply.finished,
        "problem": reply.problem,
        "seconds": reply.seconds,
        "tokens": tokens,
        "rounds": [round._asdict() for round in reply.rounds],
    }
