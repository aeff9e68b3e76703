"""`isthmus generate`: continue a text with a language model."""

from __future__ import annotations

import sys
from typing import Annotated

from tyro.conf import Positional, arg

from isthmus import seeds


def command(
    prompt: Annotated[Positional[str], arg(metavar="TEXT")] = "",
    model: Annotated[str, arg(metavar="NAME", aliases=["-m"])] = "embedded",
    max_tokens: Annotated[int, arg(metavar="N", aliases=["-n"])] = 100,
    temperature: Annotated[float, arg(metavar="X")] = 0.8,
    top_k: Annotated[int, arg(metavar="K")] = 0,
    top_p: Annotated[float, arg(metavar="P")] = 1.0,
    seed: Annotated[int, arg(metavar="N")] = 0,
) -> int:
    """Continue a text with a language model, in one process.

    Args:
        prompt: How the text begins; `-` reads it from standard input.
        model: embedded, embedded:draft, the folder of a tuned run, a Hugging Face folder or id,
            or a llama2.c .bin file.
        max_tokens: The most tokens to add.
        temperature: 0 always takes the likeliest token.
        top_k: Only among the k likeliest tokens; 0: all.
        top_p: Only among the likeliest tokens that reach this probability.
        seed: Of the draws; the same seed gives the same text.
    """
    import torch

    from isthmus.errors import InputError
    from isthmus.models.decode import Law, stream
    from isthmus.run.saved import language_of

    if max_tokens < 1:
        raise InputError("max-tokens", max_tokens, "1 or more")
    law = Law(temperature=temperature, top_k=top_k, top_p=top_p)
    language = language_of(model)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = language.encode(text)
    if not len(ids):
        ids = torch.tensor([language.tokenizer.eos_token_id])
    room = language.context - len(ids)
    if room < 1:
        raise InputError("prompt", f"{len(ids)} tokens", f"fewer than {language.context} tokens")
    sys.stdout.write(text)
    shown, tokens = "", list[int]()
    steps = stream(
        language.model, [ids], min(max_tokens, room), law, seeds.key(seed), stop=language.stop
    )
    for step in steps:
        tokens.append(int(step.tokens[0]))
        whole = language.decode(tokens)
        if not whole.endswith("\ufffd"):  # a character whose bytes are not all there yet
            sys.stdout.write(whole[len(shown) :])
            sys.stdout.flush()
            shown = whole
    sys.stdout.write("\n")
    return 0
