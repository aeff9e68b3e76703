"""From a request to the ids that a text continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from isthmus.errors import InputError, need

if TYPE_CHECKING:
    from isthmus.inference.server.openai import Message
    from isthmus.models.language import Language


def plain(messages: Sequence[Message]) -> str:
    r"""A chat as one text, for models that were taught no template.

    What the assistant said goes on where the message before it ended, as the model wrote it;
    every other message begins a new paragraph.

    >>> from isthmus.inference.server.openai import Message
    >>> said = [("user", "The sky"), ("assistant", " is blue."), ("user", "Grass")]
    >>> plain([Message(role=role, content=text) for role, text in said])
    'The sky is blue.\n\nGrass'
    """
    text = ""
    for message in messages:
        new = text and message.role != "assistant"
        text += ("\n\n" if new else "") + message.text()
    return text


def of_chat(language: Language, messages: Sequence[Message]) -> list[int]:
    """The ids of a chat: by the tokenizer's own template, else `plain`.

    Raises `InputError` for messages that the template refuses.
    """
    tokenizer = language.tokenizer
    if not tokenizer.chat_template:
        return of_text(language, plain(messages))
    wrong = need("jinja2.exceptions", "serve").TemplateError
    rows = [{"role": message.role, "content": message.text()} for message in messages]
    try:
        text = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    except wrong as error:
        raise InputError("messages", str(error), "what the model's template takes") from None
    ids: Any = tokenizer.encode(str(text), add_special_tokens=False)
    return [int(i) for i in ids]


def of_text(language: Language, text: str) -> list[int]:
    """The ids of a prompt; the mark that ends texts stands for an empty one."""
    ids: Any = language.encode(text).tolist() or [language.tokenizer.eos_token_id]
    return ids


def fitting(
    language: Language, messages: Sequence[Message], room: int
) -> tuple[list[int], Sequence[Message]]:
    """The ids of a chat without as many of its oldest messages as makes it `room` ids or fewer,
    and the messages left; the last one always stays."""
    ids = of_chat(language, messages)
    while len(ids) > room and len(messages) > 1:
        messages = messages[1:]
        ids = of_chat(language, messages)
    return ids, messages
