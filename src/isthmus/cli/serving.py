"""What `serve`, `chat` and `generate` have in common: the token, and how tokens are told."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from isthmus.inference.session import Token
    from isthmus.inference.together import Reply
    from isthmus.models.language import Language

TOKEN = "ISTHMUS_TOKEN"
"""The environment variable that holds the token, so that no list of processes shows it."""

SMALL = 20_000_000
"""Parameters below which several threads are slower than one."""

STYLES = {
    "accepted": "cyan",
    "corrected": "yellow underline",
    "bonus": "green italic",
    "target": "magenta",
    "device": "blue bold",
}
"""How a terminal shows who produced a token."""


def token_of(given: str | None) -> str | None:
    """The token of the command line, else that of the environment, else none."""
    return given or os.environ.get(TOKEN) or None


def optional(name: str) -> Any:
    """The language model called `name`; none for `none`."""
    from isthmus.run.saved import language_of

    return None if name in ("", "none") else language_of(name)


def few_threads(*languages: Language | None) -> None:
    """Compute small models by one thread: theirs would only wait for each other. The variable
    OMP_NUM_THREADS, where it is set, is left to say otherwise."""
    import torch

    sizes = [sum(p.numel() for p in one.model.parameters()) for one in languages if one]
    if max(sizes, default=0) < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


class Voice:
    """Tells a text's tokens as they come, after the ids of its prompt: in colours by who produced
    them on a terminal, plain elsewhere. `text` is what was told."""

    def __init__(self, language: Language, after: Sequence[int], out: TextIO | None = None) -> None:
        from rich.console import Console

        from isthmus.inference.server.spelling import Spelling

        self.text = ""
        self._out = out or sys.stdout
        self._console = Console(file=self._out, highlight=False, markup=False, soft_wrap=True)
        self._spelling = Spelling(language.decode, after)

    def hear(self, index: int, token: Token) -> None:
        """Tell a token, as soon as its characters are whole."""
        self._say(self._spelling.add(token.id), token.origin)

    def end(self) -> str:
        """Tell what is left; the whole text."""
        self._say(self._spelling.rest(), "")
        return self.text

    def _say(self, text: str, origin: str) -> None:
        self.text += text
        if not self._console.is_terminal:
            self._out.write(text)
        elif text:
            self._console.print(printable(text), style=STYLES.get(origin), end="")
        self._out.flush()


def printable(text: str) -> str:
    """Text without the characters that would steer a terminal.

    >>> printable("a\\tb\\x1b[2Jc") == "a\\tb\\ufffd[2Jc"
    True
    """
    kept = {"\n", "\t"}
    return "".join(c if c in kept or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def closing(reply: Reply, clock: str) -> str:
    """What a text came to, in one line; `clock` says which seconds are meant."""
    from isthmus.report.units import bytes_text, seconds_text

    count = len(reply.tokens)
    judged = sum(min(round.accepted + 1, round.drafted) for round in reply.rounds)
    words = [f"{count} token{'s' * (count != 1)} in {seconds_text(reply.seconds)} {clock}"]
    if reply.rounds:
        up, down = (sum(way) for way in zip(*((r.up, r.down) for r in reply.rounds), strict=True))
        words.append(f"{bytes_text(up / count)} up and {bytes_text(down / count)} down per token")
    if judged:
        accepted = sum(round.accepted for round in reply.rounds)
        words.append(f"{accepted / judged:.0%} of {judged} judged drafts accepted")
    return ", ".join(words)
