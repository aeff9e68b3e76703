"""`isthmus chat`: talk to a served model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from isthmus.cli.serving import Voice, closing, few_threads, optional, token_of
from isthmus.errors import InputError

if TYPE_CHECKING:
    from isthmus.inference.together import Reply


def command(
    message: Annotated[Positional[str], arg(metavar="TEXT")] = "",
    model: Annotated[str, arg(metavar="NAME", aliases=["-m"])] = "embedded",
    draft: Annotated[str, arg(metavar="NAME")] = "embedded:draft",
    edge: Annotated[str, arg(metavar="HOST:PORT", help_behavior_hint="")] = "",
    token: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None,
    method: Annotated[str, arg(metavar="NAME")] = "dssd",
    link: Annotated[str, arg(metavar="NAME")] = "wifi",
    fallback: Literal["none", "device"] = "none",
    max_tokens: Annotated[int, arg(metavar="N", aliases=["-n"])] = 96,
    temperature: Annotated[float, arg(metavar="X")] = 0.8,
    top_p: Annotated[float, arg(metavar="P")] = 1.0,
    seed: Annotated[int, arg(metavar="N")] = 0,
) -> int:
    """Talk to a model in two parts: a draft here, its target here too or at an edge elsewhere.

    A line is a message, and the end of input ends the talk. On a terminal the colour of a token
    says who produced it: drafted and accepted (cyan), corrected by the edge (yellow), its bonus
    (green), the target alone (magenta), the device alone (blue). A line after each answer says
    what it cost. Models that were taught no chat template go on with the text.

    Args:
        message: One message; without it, one for each line of input.
        model: The target, when there is no --edge.
        draft: The small model on this side; none: the target alone (--method cloud-only).
        edge: Where an edge is served (isthmus serve --role edge).
        token: What the edge asks for; better in $ISTHMUS_TOKEN.
        method: How the two work together: dssd, tk-slt, full-row, cloud-only or device-only.
        link: What is between them; with --edge only what an adapting method expects.
        fallback: What becomes of a text whose edge is lost: an error, or the draft goes on.
        max_tokens: The most tokens of an answer.
        temperature: 0 always takes the likeliest token.
        top_p: Only among the likeliest tokens that reach this probability.
        seed: Of the draws.
    """
    from isthmus.inference import apart, together
    from isthmus.inference.server import prompts
    from isthmus.inference.server.openai import Message
    from isthmus.models.decode import Law
    from isthmus.run.saved import language_of

    if max_tokens < 1:
        raise InputError("max-tokens", max_tokens, "1 or more")
    if edge and model != "embedded":
        raise InputError("model", model, "none beside --edge, which has its own")
    small = optional(draft)
    if edge and small is None:
        raise InputError("draft", draft, "a model beside --edge: it also has the tokenizer")
    target = None if edge else language_of(model)
    few_threads(target, small)
    ours: Any = target or small
    context = min(one.context for one in (target, small) if one is not None)
    options: dict[str, Any] = {
        "method": method, "law": Law(temperature, 0, top_p), "max_new_tokens": max_tokens,
        "seed": seed, "link": link, "fallback": fallback,
    }  # fmt: skip

    def answer(ids: list[int], voice: Voice) -> Reply:
        if edge:
            (reply,) = apart.decode_at(
                edge, small, [ids], token=token_of(token), listen=voice.hear, **options
            )
        else:
            (reply,) = together.decode(target, small, [ids], listen=voice.hear, **options)
        return reply

    said: list[Message] = []
    status = 0
    for line in _lines(message):
        said.append(Message(role="user", content=line))
        ids, left = prompts.fitting(ours, said, max(context - max_tokens, 1))
        said = list(left)
        voice = Voice(ours, ids)
        try:
            reply = answer(ids, voice)
        except KeyboardInterrupt:
            if message:
                raise
            said.append(Message(role="assistant", content=voice.end()))
            print()
            continue
        said.append(Message(role="assistant", content=voice.end()))
        print()
        if reply.problem:
            print(f"isthmus: {reply.problem}", file=sys.stderr)
        status = 2 if reply.finished == "error" else status
        if reply.tokens:
            _aside(closing(reply, "real" if edge else "virtual"))
    return status


def _lines(message: str) -> Iterator[str]:
    """The one message, or those that are typed or piped in."""
    if message:
        yield message
        return
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and repeated
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def _aside(line: str) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(line, style="dim")
