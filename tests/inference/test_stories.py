"""A real pretrained model in the llama2.c layout, served by every method."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from isthmus import seeds
from isthmus.inference.together import decode
from isthmus.models.decode import Law, generate
from isthmus.models.language import Language, load

DATA = Path(os.environ.get("ISTHMUS_DATA", "")).expanduser()
FOUND = sorted(DATA.rglob("stories260K.bin")) if os.environ.get("ISTHMUS_DATA") else []


@pytest.mark.skipif(not FOUND, reason="stories260K.bin is not in $ISTHMUS_DATA")
@pytest.mark.parametrize("method", ["cloud-only", "device-only", "full-row", "tk-slt", "dssd"])
def test_stories_by_every_method(method: str) -> None:
    """It drafts for itself: greedy text is its own, and hardly a sampled draft is rejected."""
    language = load(FOUND[0])
    exact = Language(language.model.double(), language.tokenizer, language.name)
    prompt = exact.encode("Once upon a time, a little")
    greedy = decode(
        exact, exact, [prompt], method=method, law=Law(0.0), max_new_tokens=24, link="lte"
    )[0]
    whole = generate(exact.model, [prompt], 24, Law(0.0), seeds.key(0))[0]
    assert greedy.ids == whole[len(prompt) :].tolist()[: len(greedy.ids)]
    sampled = decode(exact, exact, [prompt], method=method, max_new_tokens=48, seed=1)[0]
    assert sampled.finished in ("stop", "length") and sampled.ids
    if method in ("full-row", "dssd"):
        judged = sum(min(r.accepted + 1, r.drafted) for r in sampled.rounds)
        assert sum(r.accepted for r in sampled.rounds) >= 0.95 * judged
    assert torch.tensor(sampled.ids).max() < exact.model.config.vocab_size
