"""Reader for the llama2.c files: a model `.bin` (layout version 0) and its `tokenizer.bin`.

Model: seven little-endian int32 (dim, hidden, layers, heads, key-value heads, vocabulary,
context), then float32 tensors without names. A negative vocabulary size says that the
classifier is stored apart from the embeddings. The format rotates neighbouring pairs of a
head's coordinates, Hugging Face the two halves, so the rows of the query and key matrices are
reordered here.

Tokenizer: int32 longest piece, then for each id a float32 score, an int32 length and the
bytes. Text gets one leading space; the pair whose merge has the best score is joined first;
a character without a piece becomes its bytes, ids 3 to 258.

Files are not trusted: sizes are checked against the length of the file before anything is
allocated.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

UNKNOWN, BEGIN, END, BYTES = 0, 1, 2, 3
LONGEST = 256  # bytes of a piece; the work of finding its parts grows with the square
TOKENIZERS = ("tok{vocab}.bin", "tokenizer.bin")


class Header(NamedTuple):
    """The seven numbers at the start of a model file; `vocab` < 0: own classifier."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int


def _shapes(h: Header) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors, in the order of the file."""
    head = h.dim // h.heads
    kv, vocab = h.kv_heads * head, abs(h.vocab)
    shapes = [
        ("embed_tokens", (vocab, h.dim)),
        ("input_layernorm", (h.layers, h.dim)),
        ("self_attn.q_proj", (h.layers, h.dim, h.dim)),
        ("self_attn.k_proj", (h.layers, kv, h.dim)),
        ("self_attn.v_proj", (h.layers, kv, h.dim)),
        ("self_attn.o_proj", (h.layers, h.dim, h.dim)),
        ("post_attention_layernorm", (h.layers, h.dim)),
        ("mlp.gate_proj", (h.layers, h.hidden, h.dim)),
        ("mlp.down_proj", (h.layers, h.dim, h.hidden)),
        ("mlp.up_proj", (h.layers, h.hidden, h.dim)),
        ("norm", (h.dim,)),
        ("rotary", (2, h.context, head // 2)),  # tables of cosines and sines, recomputed here
    ]
    return [*shapes, ("lm_head", (vocab, h.dim))] if h.vocab < 0 else shapes


def _header(path: Path, data: bytes) -> Header:
    if len(data) < 28:
        raise InputError(path.name, f"{len(data)} bytes", "a llama2.c model of 28 bytes or more")
    h = Header(*struct.unpack("<7i", data[:28]))
    for name, value in zip(h._fields, h, strict=True):
        if not (value > 0 or (name == "vocab" and value < 0)):
            raise InputError(f"{path.name}: {name}", value, "1 or more")
    if h.dim % h.heads or (h.dim // h.heads) % 2:
        raise InputError(f"{path.name}: heads", h.heads, f"heads of even size that divide {h.dim}")
    if h.heads % h.kv_heads:
        raise InputError(f"{path.name}: kv_heads", h.kv_heads, f"a divisor of {h.heads}")
    return h


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * size) from neighbouring pairs to two halves, head by head."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def read_model(path: str | Path, attention: str = "eager") -> LlamaForCausalLM:
    """The model of a llama2.c file, float32, in evaluation mode.

    Raises `InputError` naming the file for a header that makes no sense, a file that is shorter
    or longer than its header says, and values that are not finite.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    path = Path(path)
    with path.open("rb") as file:
        h = _header(path, file.read(28))
    shapes = _shapes(h)
    expected = 28 + 4 * sum(math.prod(shape) for _, shape in shapes)
    if path.stat().st_size != expected:
        raise InputError(path.name, f"{path.stat().st_size} bytes", f"{expected}, by its header")
    values = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=28).astype(np.float32))
    if not bool(torch.isfinite(values).all()):
        raise InputError(path.name, "values that are not finite", "finite weights")
    tensors: dict[str, Tensor] = {}
    parts = values.split([math.prod(shape) for _, shape in shapes])
    for (name, shape), part in zip(shapes, parts, strict=True):
        tensors[name] = part.view(shape)

    state = {
        "model.embed_tokens.weight": tensors["embed_tokens"],
        "model.norm.weight": tensors["norm"],
        "lm_head.weight": tensors.get("lm_head", tensors["embed_tokens"]),
    }
    for name, _ in shapes[1:10]:
        for layer, weight in enumerate(tensors[name]):
            if name.endswith(("q_proj", "k_proj")):
                weight = _halves(weight, h.heads if name.endswith("q_proj") else h.kv_heads)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    chosen: Any = {"attn_implementation": attention}
    config = LlamaConfig(
        vocab_size=abs(h.vocab),
        hidden_size=h.dim,
        intermediate_size=h.hidden,
        num_hidden_layers=h.layers,
        num_attention_heads=h.heads,
        num_key_value_heads=h.kv_heads,
        max_position_embeddings=h.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=h.vocab > 0,
        pad_token_id=UNKNOWN,
        bos_token_id=BEGIN,
        eos_token_id=END,
        **chosen,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    # Either mark separates two texts in what these models were trained on.
    model.generation_config = GenerationConfig(
        bos_token_id=BEGIN, eos_token_id=[BEGIN, END], pad_token_id=UNKNOWN
    )
    return model.eval()


def read_tokenizer(path: str | Path, vocab: int, context: int = 512) -> PreTrainedTokenizerFast:
    """The tokenizer of a llama2.c file that holds exactly `vocab` pieces, as a Hugging Face one.

    Pairs are merged by the score of what they become; of equal scores the smaller id goes first.
    Raises `InputError` naming the file when it is cut off, has bytes left over, or holds a piece
    that is too long, repeated or no UTF-8.
    """
    path = Path(path)
    pieces, scores = _pieces(path, vocab)
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) != vocab:
        twice = next(piece for i, piece in enumerate(pieces) if ids[piece] != i)
        raise InputError(path.name, f"piece {twice!r} twice", "pieces that differ")
    merges = [
        (-scores[i], i, piece[:cut], piece[cut:])
        for i, piece in enumerate(pieces)
        if i >= BYTES + 256
        for cut in range(1, len(piece))
        if min(ids.get(piece[:cut], 0), ids.get(piece[cut:], 0)) >= BYTES + 256
    ]
    return _tokenizer(ids, [(left, right) for _, _, left, right in sorted(merges)], context)


def _pieces(path: Path, vocab: int) -> tuple[list[str], list[float]]:
    data = path.read_bytes()
    if vocab < BYTES + 256 or len(data) < 4 + 8 * vocab:
        raise InputError(path.name, f"{len(data)} bytes", f"a tokenizer of {vocab} pieces")
    longest = min(struct.unpack_from("<i", data)[0], LONGEST)
    at, pieces, scores = 4, [], []
    for i in range(vocab):
        score, length = struct.unpack_from("<fi", data, at) if at + 8 <= len(data) else (0.0, -1)
        at += 8
        if not 0 < length <= longest or at + length > len(data) or not math.isfinite(score):
            raise InputError(path.name, f"a broken piece {i}", f"{vocab} pieces with scores")
        try:
            pieces.append(data[at : at + length].decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(path.name, f"piece {i} that is no UTF-8", "UTF-8 pieces") from None
        scores.append(score)
        at += length
    if at != len(data):
        raise InputError(path.name, f"{len(data) - at} bytes left over", f"{vocab} pieces")
    for i in range(256):
        if pieces[BYTES + i] != f"<0x{i:02X}>":
            raise InputError(path.name, f"piece {BYTES + i}: {pieces[BYTES + i]!r}", f"<0x{i:02X}>")
    return pieces, scores


def _tokenizer(
    ids: dict[str, int], merges: list[tuple[str, str]], context: int
) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    names = sorted(ids, key=ids.__getitem__)
    unknown, begin, end = names[UNKNOWN], names[BEGIN], names[END]
    model = models.BPE(vocab=ids, merges=merges, unk_token=unknown, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Prepend(" ")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    special: dict[str, Any] = {"unk_token": unknown, "bos_token": begin, "eos_token": end}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=unknown,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **special,
    )


def find_tokenizer(path: str | Path, vocab: int) -> Path:
    """The tokenizer beside a model file: `tok<vocabulary>.bin`, else `tokenizer.bin`."""
    folder = Path(path).parent
    names = [name.format(vocab=vocab) for name in TOKENIZERS]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError("model", path, f"a .bin file with {' or '.join(names)} beside it")
