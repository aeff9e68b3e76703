"""One pair of models and one service for all tests of the server; real sockets where needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.inference.server.served import served

from isthmus.inference.server.service import Service
from isthmus.inference.server.text import Ask, Piece
from isthmus.models import language
from isthmus.models.decode import Law
from isthmus.models.language import Language


@pytest.fixture(scope="session")
def pair() -> tuple[Language, Language]:
    """In float64: a batched product rounds otherwise than one alone, and in float32 that turns
    about one draw in a thousand."""
    names = ("embedded", "embedded:draft")
    target, draft = (language.load(name, torch.float64) for name in names)
    return target, draft


@pytest.fixture(scope="session")
def service(pair: tuple[Language, Language]) -> Iterator[Service]:
    service = Service(*pair, name="embedded", at_once=8)
    yield service
    service.close()


class Heard:
    """The pieces of one text as they come."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._ended = threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish:
            self._ended.set()

    def end(self) -> Heard:
        assert self._ended.wait(60)
        return self

    @property
    def text(self) -> str:
        return "".join(span.text for piece in self.pieces for span in piece.spans)


@pytest.fixture
def hear() -> Callable[..., Heard]:
    def start(service: Service, prompt: str, tokens: int = 24, **more: Any) -> Heard:
        ids = tuple(service.language.encode(prompt).tolist())
        heard = Heard()
        service.start(Ask(ids, tokens, **{"law": Law(0.8), **more}), heard)
        return heard

    return start


@pytest.fixture(scope="session")
def address(pair: tuple[Language, Language]) -> Iterator[str]:
    pytest.importorskip("fastapi")
    from isthmus.inference.server.app import make_app

    with served(make_app(Service(*pair, name="embedded"))) as address:
        yield address
