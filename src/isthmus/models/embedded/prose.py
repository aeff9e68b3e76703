"""Rules that turn source files into paragraphs of prose; nothing is imported or executed.

A *document* is one docstring, one comment or one help topic: its paragraphs, one a line.
Sources are read with `ast` (docstrings) and `tokenize` (comments).
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator

_TYPOGRAPHY = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-",
     "\u2026": "...", "\u00a0": " "}
)  # fmt: skip
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    a about after all also an and any are as at be because been before but by can could do
    does each else for from given has have if in instead into is it its may more most must no
    not of on once one only or other otherwise out over same should so some such than that the
    their them then there these they this to two under until up use used using was we were
    what when where whether which while will with within without would you your
    """,
    )
)
_BULLET = re.compile(r"(?:[-*+o]|\d{1,2}[.)]|\([a-z\d]\)) +(?=\S)")
_ROLE = re.compile(r":[\w:]+:`~?([^`<]+?)(?: <[^`]*>)?`")
_QUOTED = re.compile(r"``?([^`]+?)``?_?")
_SIGNATURE = re.compile(r"[\w.]+\([^()]*(?:\([^()]*\)[^()]*)*\)(?: *(?:->|=|--).*)?")
_RULE = re.compile(r"\W{3,}$")
_FIELD = re.compile(r"(?::\w+[\w ]*:|\.\. )")
_WIDE = re.compile(r"\S {3,}\S")
_ADDRESS = re.compile(r"://|www\.|\S@\S+\.\w")
_LEGAL = re.compile(
    r"copyright|licen[cs]e|all rights reserved|warrant(?:y|ies)|permission to", re.I
)
# Any one row admits a paragraph: least share of stop words, least share of letters, most symbols.
_THRESHOLDS = ((0.25, 0.76, 0.10), (0.16, 0.82, 0.07), (0.10, 0.88, 0.04))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is a sentence of English rather than code, a table or a notice.

    Eight words or more must pass one row of thresholds; three to seven must be a capitalised
    sentence. Text that is not ASCII, that holds an address, or that is legal is never kept.

    >>> is_prose("Return the index of the first item that is equal to the value.")
    True
    >>> is_prose("x = f(y); return {k: v for k, v in z.items() if v > 0}")
    False
    """
    if not paragraph.isascii() or _ADDRESS.search(paragraph) or _LEGAL.search(paragraph):
        return False
    words = paragraph.split()
    solid = "".join(words)
    if len(words) < 3 or not solid:
        return False
    letters = sum(c.isalpha() for c in solid) / len(solid)
    symbols = sum(not c.isalnum() and c not in ".,;:'\"-" for c in solid) / len(solid)
    if len(words) < 8:
        sentence = paragraph[0].isupper() and paragraph.endswith(".")
        return sentence and letters >= 0.82 and symbols <= 0.07
    stops = sum(word.strip(".,;:'\"()").lower() in _STOP_WORDS for word in words) / len(words)
    return any(stops >= s and letters >= a and symbols <= b for s, a, b in _THRESHOLDS)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of prose of one docstring, comment or topic, unwrapped to one line each.

    Doctests, literal blocks, tables, signatures, underlines and directives are left out; roles
    and back quotes lose their marks; bullets become `- `.
    """
    kept: list[str] = []
    literal: int | None = None  # the indentation of the paragraph that ended in `::`
    for block in re.split(r"\n[ \t]*\n", inspect.cleandoc(text).translate(_TYPOGRAPHY)):
        lines = [line.rstrip() for line in block.expandtabs().splitlines() if line.strip()]
        if not lines:
            continue
        indent = len(lines[0]) - len(lines[0].lstrip())
        if literal is not None and indent > literal:
            continue
        literal = indent if lines[-1].endswith("::") else None
        for paragraph in _unwrap(lines):
            if is_prose(paragraph):
                kept.append(paragraph)
    return kept


def _unwrap(lines: list[str]) -> Iterator[str]:
    """The paragraphs of one block of lines that holds no blank line."""
    if lines[0].lstrip().startswith(".. ") or sum(bool(_WIDE.search(x)) for x in lines) * 2 > len(
        lines
    ):
        return
    current: list[str] = []
    for line in (line.strip() for line in lines):
        if line.startswith(">>>"):
            break
        bullet = _BULLET.match(line)
        dropped = _RULE.fullmatch(line) or _FIELD.match(line) or _SIGNATURE.fullmatch(line)
        if (bullet or dropped) and current:
            yield _plain(" ".join(current))
            current = []
        if not dropped:
            current.append("- " + line[bullet.end() :] if bullet else line)
    if current:
        yield _plain(" ".join(current))


def _plain(paragraph: str) -> str:
    paragraph = _QUOTED.sub(r"\1", _ROLE.sub(r"\1", paragraph))
    paragraph = re.sub(r"::$", ":", paragraph)
    return re.sub(r"\s+", " ", paragraph).strip()


def documents(source: str) -> list[str]:
    """The documents of one Python source file, in the order of its lines.

    Raises SyntaxError (also for a file that cannot be tokenised).
    """
    found = [*_docstrings(source), *_comments(source)]
    return [text for _, text in sorted(found) if text]


def document(text: str) -> str:
    """The document that one docstring or topic gives: its paragraphs, one a line; may be empty."""
    return "\n".join(paragraphs(text))


def _docstrings(source: str) -> Iterator[tuple[int, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, document(text)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Runs of two or more full-line comments at one indentation, of eight words or more."""
    run: list[tuple[int, int, str]] = []

    def close() -> Iterator[tuple[int, str]]:
        text = "\n".join(body for _, _, body in run)
        if len(run) >= 2 and len(text.split()) >= 8 and not _LEGAL.search(text):
            yield run[0][0], document(text)
        run.clear()

    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            row, column = token.start
            if token.type != tokenize.COMMENT or token.line[:column].strip():
                continue
            if run and (row != run[-1][0] + 1 or column != run[-1][1]):
                yield from close()
            run.append((row, column, token.string.lstrip("#").rstrip()))
    except tokenize.TokenError as error:
        raise SyntaxError(str(error)) from error
    yield from close()


def topics(source: str) -> list[str]:
    """The documents of a module that assigns one dictionary of help topics."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            values = [v.value for v in node.values if isinstance(v, ast.Constant)]
            return [text for value in values if (text := document(str(value)))]
    return []
