"""llama2.c files against a float64 forward pass in that format's own convention."""

from __future__ import annotations

import itertools
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import InputError
from isthmus.models import decode, language, llama2c

DIM, HIDDEN, LAYERS, HEADS, KV, CONTEXT = 24, 40, 2, 4, 2, 16
HEAD = DIM // HEADS
WORDS = ["th", "the", "he", " t", " the", "in", "ing", " a", "an", "and", "é", "éa", "aaa", "aa"]
LETTERS = [" ", *"abcdefghijklmnopqrstuvwxyz"]
VOCAB = 259 + len(LETTERS) + len(WORDS)


def weights(shared: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.4).astype("<f4")

    tensors = {
        "embed": draw(VOCAB, DIM),
        "norm1": 1 + draw(LAYERS, DIM),
        "q": draw(LAYERS, DIM, DIM),
        "k": draw(LAYERS, KV * HEAD, DIM),
        "v": draw(LAYERS, KV * HEAD, DIM),
        "o": draw(LAYERS, DIM, DIM),
        "norm2": 1 + draw(LAYERS, DIM),
        "w1": draw(LAYERS, HIDDEN, DIM),
        "w2": draw(LAYERS, DIM, HIDDEN),
        "w3": draw(LAYERS, HIDDEN, DIM),
        "norm": 1 + draw(DIM),
        "rotary": np.zeros((2, CONTEXT, HEAD // 2), "<f4"),
    }
    return tensors if shared else tensors | {"head": draw(VOCAB, DIM)}


def model_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    vocab = -VOCAB if "head" in tensors else VOCAB
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, vocab, CONTEXT)
    return header + b"".join(x.astype("<f4").tobytes() for x in tensors.values())


def pieces() -> list[tuple[str, float]]:
    special = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
    octets = [(f"<0x{i:02X}>", 0.0) for i in range(256)]
    order = [3, 0, 4, 1, 2, 9, 7, 5, 8, 6, 11, 10, 13, 12]  # scores are not in the order of ids
    words = [(word, -float(order[i])) for i, word in enumerate(WORDS)]
    return special + octets + [(letter, -1e9) for letter in LETTERS] + words


def tokenizer_bytes() -> bytes:
    raw = [(piece.encode(), score) for piece, score in pieces()]
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in raw)
    return struct.pack("<i", max(len(piece) for piece, _ in raw)) + body


def reference(w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Logits `[T, V]` in float64: neighbouring pairs rotate, groups of heads share a key."""
    w = {name: x.astype(np.float64) for name, x in w.items()}

    def rms(x: np.ndarray, g: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * g

    def turn(x: np.ndarray) -> np.ndarray:
        out = x.copy()
        for t in range(x.shape[0]):
            for i in range(0, HEAD, 2):
                angle = t / 10000.0 ** (i / HEAD)
                a, b = x[t, :, i], x[t, :, i + 1]
                out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
                out[t, :, i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return out

    n = len(tokens)
    x = w["embed"][tokens]
    for layer in range(LAYERS):
        h = rms(x, w["norm1"][layer])
        q = turn((h @ w["q"][layer].T).reshape(n, HEADS, HEAD))
        k = turn((h @ w["k"][layer].T).reshape(n, KV, HEAD))
        v = (h @ w["v"][layer].T).reshape(n, KV, HEAD)
        out = np.zeros((n, HEADS, HEAD))
        for head in range(HEADS):
            group = head // (HEADS // KV)
            for t in range(n):
                scores = k[: t + 1, group] @ q[t, head] / np.sqrt(HEAD)
                attention = np.exp(scores - scores.max())
                out[t, head] = attention / attention.sum() @ v[: t + 1, group]
        x = x + out.reshape(n, DIM) @ w["o"][layer].T
        h = rms(x, w["norm2"][layer])
        gate = h @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][layer].T)) @ w["w2"][layer].T
    return rms(x, w["norm"]) @ w.get("head", w["embed"]).T


def merged(text: str) -> list[int]:
    """The ids of a text by the rule itself: join the neighbours with the best score, again."""
    table = {piece: (i, score) for i, (piece, score) in enumerate(pieces())}
    ids: list[int] = []
    for letter in " " + text if text else "":
        known = table.get(letter)
        ids += [known[0]] if known else [byte + 3 for byte in letter.encode()]
    names = [piece for piece, _ in pieces()]
    while True:
        joins = [
            (table[names[a] + names[b]][1], -at)
            for at, (a, b) in enumerate(itertools.pairwise(ids))
            if names[a] + names[b] in table and min(a, b) >= 259
        ]
        if not joins:
            return ids
        at = -max(joins)[1]
        ids[at : at + 2] = [table[names[ids[at]] + names[ids[at + 1]]][0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama2c")
    for name, shared in (("shared.bin", True), ("own.bin", False)):
        (path / name).write_bytes(model_bytes(weights(shared)))
    (path / "tokenizer.bin").write_bytes(tokenizer_bytes())
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return llama2c.read_tokenizer(folder / "tokenizer.bin", VOCAB)


@pytest.mark.parametrize(("name", "shared"), [("shared.bin", True), ("own.bin", False)])
def test_logits_equal_the_reference(folder: Path, name: str, shared: bool) -> None:
    tokens = [1, 270, 4, 299, 260, 261, 1, 290, 33, 280]
    model = llama2c.read_model(folder / name).double()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    np.testing.assert_allclose(logits.numpy(), reference(weights(shared), tokens), atol=2e-5)
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied is shared


def test_pairs_must_become_halves(folder: Path) -> None:
    """Without the reordering of rows the same file gives other logits."""
    tokens = [1, 270, 4, 299, 260]
    model = llama2c.read_model(folder / "shared.bin").double()
    raw = torch.from_numpy(weights(True)["q"][0].astype(np.float64))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.copy_(raw)
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(logits - reference(weights(True), tokens)).max() > 1e-3


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="theingad é☃ \n<s>", max_size=24))
def test_text_becomes_the_ids_of_the_merge_rule(tokenizer: Any, text: str) -> None:
    assert tokenizer.encode(text, add_special_tokens=False) == merged(text)
    ids = tokenizer.encode(text)
    assert ids[0] == llama2c.BEGIN
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_path_is_a_language_model(folder: Path) -> None:
    model = language.load(folder / "own.bin")
    assert model.context == CONTEXT and model.stop == (1, 2)
    ids = decode.generate(model.model, [model.encode("the and"), model.encode("a")], 5)
    assert ids.shape[0] == 2 and model.decode(ids[0]).startswith("the and")


def test_broken_models_are_refused(tmp_path: Path) -> None:
    good = model_bytes(weights(True))
    path = tmp_path / "m.bin"

    def read(data: bytes, match: str) -> None:
        path.write_bytes(data)
        with pytest.raises(InputError, match=match):
            llama2c.read_model(path)

    def header(**change: int) -> bytes:
        fields = llama2c.Header(*struct.unpack("<7i", good[:28]))._replace(**change)
        return struct.pack("<7i", *fields) + good[28:]

    read(b"", "0 bytes")
    read(good[:27], "27 bytes")
    read(good[:-1], f"{len(good) - 1} bytes given, allowed: {len(good)}, by its header")
    read(good + b"\0\0\0\0", "by its header")
    read(header(layers=2**31 - 1, context=2**31 - 1), "by its header")
    read(header(dim=0), "dim: 0")
    read(header(hidden=-3), "hidden: -3")
    read(header(heads=5), "heads: 5")
    read(header(heads=24), "heads: 24")
    read(header(kv_heads=3), "kv_heads: 3")
    read(good[:-200] + b"\xff" * 200, "not finite")


def test_broken_tokenizers_are_refused(tmp_path: Path) -> None:
    good = tokenizer_bytes()
    path = tmp_path / "t.bin"

    def read(data: bytes, match: str, vocab: int = VOCAB) -> None:
        path.write_bytes(data)
        with pytest.raises(InputError, match=match):
            llama2c.read_tokenizer(path, vocab)

    read(b"\0", "1 bytes")
    read(good[:-2], f"broken piece {VOCAB - 1}")
    read(good + b"!", "1 bytes left over")
    read(good, "bytes left over", VOCAB - 1)
    read(good, "broken piece|tokenizer of", VOCAB + 1)
    read(good[:8] + struct.pack("<i", 10**9) + good[12:], "broken piece 0")
    read(good[:8] + struct.pack("<i", -4) + good[12:], "broken piece 0")
    read(good[:4] + struct.pack("<f", float("nan")) + good[8:], "broken piece 0")
    read(good.replace(b"\xc3\xa9", b"\xff\xff"), "no UTF-8")
    read(good.replace(b"ing", b"the"), "'the' twice")
    read(good.replace(b"<0x41>", b"<0x4Z>"), "<0x41>")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_random_bytes_are_refused(folder: Path, data: bytes, at: int) -> None:
    path = folder / "random.bin"
    for whole, read in (
        (data, llama2c.read_model),
        (model_bytes(weights(True))[:at] + data, llama2c.read_model),
        (tokenizer_bytes()[:at] + data, lambda p: llama2c.read_tokenizer(p, VOCAB)),
    ):
        path.write_bytes(whole)
        with pytest.raises(InputError):
            read(path)


def test_a_model_without_its_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes((folder / "own.bin").read_bytes())
    with pytest.raises(InputError, match=rf"tok{VOCAB}.bin or tokenizer.bin beside it"):
        language.load(tmp_path / "m.bin")
    with pytest.raises(InputError, match="that exists"):
        language.load(tmp_path / "none.bin")


def test_stories() -> None:
    path = Path(os.environ.get("ISTHMUS_DATA", "nowhere")) / "stories260K.bin"
    if not path.is_file():
        pytest.skip("stories260K.bin is not in $ISTHMUS_DATA")
    model = language.load(path)
    ids = decode.generate(model.model, [model.encode("")], 60, decode.Law(0.0))
    text = model.decode(ids[0])
    assert text.startswith("Once upon a time, there was a little girl named")
    words = set(text.lower().replace(".", " ").replace(",", " ").split())
    assert {"a", "she", "to", "was"} <= words
