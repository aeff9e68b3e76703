"""`isthmus generate`: continue a text with a language model."""

from __future__ import annotations

import io
import sys
from json import dumps
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from isthmus import seeds
from isthmus.cli.serving import Voice, closing, few_threads, token_of
from isthmus.errors import InputError

if TYPE_CHECKING:
    from isthmus.inference.together import Reply
    from isthmus.models.decode import Law
    from isthmus.models.language import Language


def command(
    prompt: Annotated[Positional[str], arg(metavar="TEXT")] = "",
    model: Annotated[str, arg(metavar="NAME", aliases=["-m"])] = "embedded",
    max_tokens: Annotated[int, arg(metavar="N", aliases=["-n"])] = 100,
    temperature: Annotated[float, arg(metavar="X")] = 0.8,
    top_k: Annotated[int, arg(metavar="K")] = 0,
    top_p: Annotated[float, arg(metavar="P")] = 1.0,
    seed: Annotated[int, arg(metavar="N")] = 0,
    edge: Annotated[str, arg(metavar="HOST:PORT", help_behavior_hint="")] = "",
    token: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None,
    draft: Annotated[str, arg(metavar="NAME")] = "embedded:draft",
    method: Annotated[str, arg(metavar="NAME")] = "dssd",
    fallback: Literal["none", "device"] = "none",
    json: bool = False,
) -> int:
    """Continue a text with a language model: in one process, or with its target at an edge.

    Args:
        prompt: How the text begins; `-` reads it from standard input.
        model: embedded, embedded:draft, the folder of a tuned run, a Hugging Face folder or id,
            or a llama2.c .bin file.
        max_tokens: The most tokens to add.
        temperature: 0 always takes the likeliest token.
        top_k: Only among the k likeliest tokens; 0: all.
        top_p: Only among the likeliest tokens that reach this probability.
        seed: Of the draws; the same seed gives the same text.
        edge: Where the target is served (isthmus serve --role edge); the draft runs here.
        token: What the edge asks for; better in $ISTHMUS_TOKEN.
        draft: With --edge: the small model on this side, with the same tokenizer.
        method: With --edge: how the two work together.
        fallback: With --edge: what becomes of a text whose edge is lost.
        json: With --edge: print one JSON object with every token, round and byte instead.
    """
    from isthmus.models.decode import Law
    from isthmus.run.saved import language_of

    if max_tokens < 1:
        raise InputError("max-tokens", max_tokens, "1 or more")
    if edge and model != "embedded":
        raise InputError("model", model, "none beside --edge, which has its own")
    for name, given, usual in (
        ("draft", draft, "embedded:draft"), ("method", method, "dssd"),
        ("fallback", fallback, "none"), ("json", json, False), ("token", bool(token), False),
    ):  # fmt: skip
        if not edge and given != usual:
            raise InputError(name, given, "only with --edge")
    law = Law(temperature=temperature, top_k=top_k, top_p=top_p)
    language = language_of(draft if edge else model)
    few_threads(language)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = language.encode(text).tolist() or [language.tokenizer.eos_token_id]
    room = language.context - len(ids)
    if room < 1:
        raise InputError("prompt", f"{len(ids)} tokens", f"fewer than {language.context} tokens")
    count = min(max_tokens, room)
    if not edge:
        return _alone(language, text, ids, count, law, seed)
    from isthmus.inference.apart import decode_at

    voice = Voice(language, ids, io.StringIO() if json else None)
    if not json:
        sys.stdout.write(text)
    (reply,) = decode_at(
        edge, language, [ids], method=method, law=law, max_new_tokens=count, seed=seed,
        token=token_of(token), fallback=fallback, listen=voice.hear,
    )  # fmt: skip
    whole = voice.end()
    print(_told(text, whole, reply) if json else "")
    if reply.problem:
        print(f"isthmus: {reply.problem}", file=sys.stderr)
    elif not json:
        print(closing(reply, "real"), file=sys.stderr)
    return 2 if reply.finished == "error" else 0


def _told(prompt: str, text: str, reply: Reply) -> str:
    """A reply as one line of JSON."""
    told = {
        "prompt": prompt,
        "text": text,
        "tokens": [token._asdict() for token in reply.tokens],
        "rounds": [round._asdict() for round in reply.rounds],
        "seconds": reply.seconds,
        "finished": reply.finished,
        "problem": reply.problem,
    }
    return dumps(told, ensure_ascii=False)


def _alone(language: Language, text: str, ids: list[int], count: int, law: Law, seed: int) -> int:
    """Plain decoding in this process."""
    from isthmus.models.decode import stream

    sys.stdout.write(text)
    shown, tokens = "", list[int]()
    steps = stream(language.model, [ids], count, law, seeds.key(seed), stop=language.stop)
    for step in steps:
        tokens.append(int(step.tokens[0]))
        whole = language.decode(tokens)
        if not whole.endswith("\ufffd"):  # a character whose bytes are not all there yet
            sys.stdout.write(whole[len(shown) :])
            sys.stdout.flush()
            shown = whole
    sys.stdout.write("\n")
    return 0
