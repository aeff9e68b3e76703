"""A griffe extension: examples in docstrings are shown as code.

An example is a line that starts with `>>>` and what follows it up to an empty line. Without a
fence Markdown would take it for a quotation.
"""

from __future__ import annotations

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

EXAMPLE = re.compile(r"^(?P<indent>[ \t]*)>>> (?:.+\n?)+", re.MULTILINE)


def fence(text: str) -> str:
    """`text` with every example between fences.

    >>> fence("One line.\\n\\n>>> 1 + 1\\n2\\n\\nMore.").splitlines()[2:]
    ['```pycon', '>>> 1 + 1', '2', '```', '', 'More.']
    """
    return EXAMPLE.sub(
        lambda found: f"{found['indent']}```pycon\n{found[0].rstrip()}\n{found['indent']}```\n",
        text,
    )


class FenceDoctests(griffe.Extension):
    """Fences the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)
