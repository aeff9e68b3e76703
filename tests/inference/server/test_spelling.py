"""Text from tokens: whole characters, nothing lost, and nothing of a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isthmus.inference.server.spelling import Span, Spelling, Until
from isthmus.models.language import load

LANGUAGE = load("embedded:draft")
IDS = st.lists(st.integers(0, 2047), max_size=24)


@given(IDS, IDS)
def test_pieces_are_what_the_ids_add_to_the_text_before(before: list[int], ids: list[int]) -> None:
    spelling = Spelling(LANGUAGE.decode, before)
    told = [spelling.add(id) for id in ids] + [spelling.rest()]
    whole = LANGUAGE.decode([*before, *ids])
    if not LANGUAGE.decode(before).endswith("\ufffd"):
        assert LANGUAGE.decode(before) + "".join(told) == whole
    assert not any(piece.endswith("\ufffd") for piece in told[:-1])


@given(st.text(alphabet="aé漢🦀 ", min_size=1, max_size=12))
def test_a_character_of_several_tokens_comes_whole(text: str) -> None:
    ids = LANGUAGE.tokenizer.encode(text, add_special_tokens=False)
    spelling = Spelling(LANGUAGE.decode)
    told = [spelling.add(id) for id in ids]
    assert "".join(told) == text and spelling.rest() == ""
    assert all(text.startswith("".join(told[:n])) for n in range(len(told)))
    if any(ord(letter) > 0x7FF for letter in text):
        assert "" in told  # something had to wait


def test_a_character_that_is_never_whole_comes_at_the_end() -> None:
    crab = LANGUAGE.tokenizer.encode("🦀", add_special_tokens=False)
    spelling = Spelling(LANGUAGE.decode)
    assert [spelling.add(id) for id in crab[:-1]] == [""] * (len(crab) - 1)
    assert spelling.rest() == "\ufffd"


def _oracle(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first prefix of the text that ends with a stop string, without it."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


SHORT = st.text(alphabet="ab", min_size=1, max_size=4)


@given(st.lists(st.text(alphabet="ab", max_size=4), max_size=12), st.lists(SHORT, max_size=3))
def test_until_tells_what_the_oracle_tells_however_the_text_is_cut(
    parts: list[str], stops: list[str]
) -> None:
    until = Until(stops)
    told, text = "", ""
    wanted, stopped = _oracle("".join(parts), stops)
    for part in parts:
        text += part
        told += "".join(span.text for span in until.add(Span(part, "x")))
        assert wanted.startswith(told)
        if not until.stopped:
            held = text[len(told) :]  # only what may yet become a stop string waits
            assert not held or any(s.startswith(held) and s != held for s in stops)
    told += "".join(span.text for span in until.rest())
    assert (told, until.stopped) == (wanted, stopped)


@given(st.lists(st.text(alphabet="ab", max_size=3), max_size=8))
def test_every_letter_keeps_who_produced_it(parts: list[str]) -> None:
    until = Until(["abba", "bb"])
    told = [span for i, part in enumerate(parts) for span in until.add(Span(part, str(i)))]
    letters = [(letter, span.origin) for span in [*told, *until.rest()] for letter in span.text]
    given = [(letter, str(i)) for i, part in enumerate(parts) for letter in part]
    assert letters == given[: len(letters)]
    assert until.stopped or len(letters) == len(given)
