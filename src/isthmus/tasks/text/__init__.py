"""Next-token prediction on texts with owners: the language task of tuning and serving.

Offline the owners are the eight clients of the embedded corpus (each the prose of one part of
a library, so their vocabularies differ) and the model is the embedded target, which was never
trained on their texts. Each owner's documents are divided 75 / 5 / 20 into train, val and test
before they are joined, cut into rows and shifted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus import catalogue, seeds
from isthmus.errors import InputError
from isthmus.models import language
from isthmus.tasks.contract import Card, Compressible, Cut, Role, Size, Stage, Task
from isthmus.tasks.items import Batch, Items, Splits, weighted_mean
from isthmus.tasks.losses import IGNORE, counts, cross_entropy
from isthmus.tasks.metrics import Perplexity
from isthmus.tasks.text import documents
from isthmus.tasks.text.documents import Document
from isthmus.tree import Tree

LENGTH: dict[str, int] = {"tiny": 32, "small": 128, "paper": 256}
TINY_OWNERS, TINY_DOCUMENTS = 4, 120


class PerplexityAndBits(Perplexity):
    """Perplexity, accuracy and bits per byte: the sums of `Perplexity`, and `bytes`.

    Bits per byte = nll / (ln 2 * bytes) does not depend on the vocabulary. `bytes` `[b]` among the
    targets is the number of bytes that an item's counted tokens spell.
    """

    def init(self) -> Tree:
        return super().init() | {"bytes": torch.zeros((), dtype=torch.float64)}

    def update(
        self,
        state: Mapping[str, Tensor],
        outputs: Any,
        targets: Mapping[str, Tensor],
        weight: Tensor,
    ) -> Tree:
        spelt = (weight.double() * targets["bytes"]).sum()
        new = super().update(state, outputs, targets, weight)
        return new | {"bytes": state["bytes"].to(spelt.device) + spelt}

    def finish(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        spelt = float(state["bytes"])
        bits = float(state["nll"]) / (math.log(2) * spelt) if spelt > 0 else math.nan
        return super().finish(state) | {"bits_per_byte": bits}


@catalogue.register("text", place="task", status="verified")
class Text(Task):
    """Columns `tokens` `[L]`, `labels` `[L]` (the next tokens, -100: not counted), `bytes`.

    `language` is any name that `isthmus.models.language.load` knows. `build` gives that model
    with its own weights, except for `tiny`: a new model of two layers of width 64. L is 32, 128
    and 256 for `tiny`, `small` and `paper`; `tiny` takes 120 documents of four owners.
    """

    card = Card(
        "text",
        problem="language modelling",
        source="documentation of CPython 3.11.7; jsonl, plays and plain text",
        licence="PSF-2.0",
    )
    metric = PerplexityAndBits("labels")
    input_names = ("tokens",)
    target_names = ("labels", "bytes")

    def __init__(self, language: str = "embedded") -> None:
        self.language = language
        self._made: dict[tuple[int, str], Splits] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return language.load(self.language).tokenizer

    def synthesise(self, seed: int = 0, size: Size = "small") -> Splits:
        """The texts of the embedded corpus's clients; `seed` divides the documents."""
        if (seed, size) not in self._made:
            self._made[seed, size] = self._shipped(seed, size)
        return self._made[seed, size]

    def _shipped(self, seed: int, size: Size) -> Splits:
        texts = documents.shipped()
        if size == "tiny":
            owners = list(dict.fromkeys(text.owner for text in texts))[:TINY_OWNERS]
            chosen = ([t for t in texts if t.owner == o][:TINY_DOCUMENTS] for o in owners)
            texts = [text for part in chosen for text in part]
        return self.splits(texts, seed, LENGTH[size])

    def load(
        self,
        root: str | Path | None = None,
        seed: int = 0,
        file: str | None = None,
        length: int = LENGTH["small"],
    ) -> Splits:
        """Texts under `root`: `file`, else text/*.jsonl and text/*.txt, else a known file.

        jsonl rows are `{"text", "group"}` or `{"instruction", "context", "response",
        "category"}` (only the response is learned); a play's speakers own their speeches.
        """
        return self.splits(documents.read(root, file), seed, length)

    def export_real(self, root: str | Path) -> Path:
        """Write the shipped texts of the clients as jsonl that `load` reads; returns the file."""
        return documents.write(documents.shipped(), root)

    def splits(self, texts: Sequence[Document], seed: int, length: int) -> Splits:
        """Documents as rows of `length` tokens, divided within each owner by `seed`."""
        parts: list[list[tuple[str, list[Document]]]] = [[], [], []]
        by_owner = sorted(texts, key=lambda text: text.owner)
        for owner, group in groupby(by_owner, key=lambda text: text.owner):
            own = list(group)
            order = seeds.rng(seed, "text", owner).permutation(len(own))
            cuts = np.split(order, [len(own) * 15 // 20, len(own) * 16 // 20])
            for part, index in zip(parts, cuts, strict=True):
                part.append((owner, [own[i] for i in np.sort(index)]))
        train, val, test = (self._items(part, length) for part in parts)
        if not len(train):
            raise InputError("texts", f"{len(texts)} documents", "two or more of an owner")
        return Splits(train, val, test)

    def _items(self, owned: Sequence[tuple[str, list[Document]]], length: int) -> Items:
        rows: list[tuple[list[int], list[int]]] = []
        group: list[str] = []
        for owner, texts in owned:
            made = _rows(self.tokenizer, texts, length)
            rows += made
            group += [owner] * len(made)
        both = torch.tensor(rows, dtype=torch.int64).view(-1, 2, length)
        tokens, labels = both[:, 0].contiguous(), both[:, 1].contiguous()
        spelt = torch.where(labels == IGNORE, 0, _spelling(self.tokenizer)[labels.clamp_min(0)])
        columns = {"tokens": tokens, "labels": labels, "bytes": spelt.sum(1)}
        return Items(columns, group, [self.card.name] * len(group))

    def build(self, size: Size = "small", seed: int = 0) -> nn.Module:
        return _new(len(self.tokenizer), seed) if size == "tiny" else self.pretrained()

    def pretrained(self) -> nn.Module:
        """The language's model with its own weights."""
        return language.load(self.language).model

    def stages(self) -> list[Stage]:
        roles: tuple[tuple[str, Role], ...] = (("*inv_freq", "frozen"), ("*", "shared"))
        return [Stage("tune", self.loss, roles, optimiser="adamw", lr=3e-3, batch_size=8)]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy per counted token (nats), tokens of an item weighing as the item."""
        losses = cross_entropy(self.predict(model, self.inputs(batch.columns)), batch["labels"])
        weight = counts(batch.weight, batch["labels"]).to(losses.dtype)
        return weighted_mean(losses.reshape(-1), weight.reshape(-1)), {}

    def predict(self, model: Any, inputs: Mapping[str, Tensor], context: Any = None) -> Tensor:
        """Logits `[b, L, V]` for the token after each of `tokens` `[b, L]`."""
        tokens = inputs["tokens"]
        mask = causal_mask(tokens.shape[-1], model.dtype, tokens.device)
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    def labels(self, items: Items) -> np.ndarray:
        """The owner's number: partitions by label skew the mixture of owners."""
        return np.unique(items.group, return_inverse=True)[1]

    def compressible(self, model: nn.Module) -> Compressible:
        """All linear layers but the one over the vocabulary, which is tied to the embeddings."""
        head = [name for name, module in model.named_modules() if name.endswith("lm_head")]
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in head]
        tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
        return Compressible(tuple(linear), (*tables, *head), drop=1.0)

    def cut_points(self, size: Size = "small") -> list[Cut]:
        """After each block but the last, where `[L, width]` activations pass."""
        model: Any = self.build(size, 0)
        name, blocks = next(
            (n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)
        )
        shape = (LENGTH[size], int(model.config.hidden_size))
        return [Cut(f"{name}.{i}", shape) for i in range(len(blocks) - 1)]


@cache
def causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The additive mask `[1, 1, L, L]`: 0 on and below the diagonal, the least number above.

    Handed to the model, so that under vmap and in a graph it is a constant like any other.
    """
    return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)[
        None, None
    ]


def _rows(
    tokenizer: Any, texts: Sequence[Document], length: int
) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of one owner: texts joined and cut, each text with a prompt in its own row.

    The last row, and rows of prompts, are filled on the right, where a causal model needs no mask.
    """
    end, filler = tokenizer.eos_token_id, tokenizer.pad_token_id

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def row(tokens: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        short = length - len(tokens)
        return tokens + [filler] * short, labels + [IGNORE] * short

    joined = [i for text in texts if not text.prompt for i in (end, *ids(text.text))]
    rows = []
    if joined:
        joined.append(end)
        for start in range(0, len(joined) - 1, length):
            piece = joined[start : start + length + 1]
            rows.append(row(piece[:-1], piece[1:]))
    for text in texts:
        if text.prompt:
            answer = [*ids(text.text), end]
            kept = max(length // 2, length + 1 - len(answer))  # the prompt makes room, to a half
            prompt = [end, *ids(text.prompt)][-kept:]
            whole = (prompt + answer)[: length + 1]
            labels = [IGNORE] * (len(prompt) - 1) + whole[len(prompt) :]
            rows.append(row(whole[:-1], labels))
    return rows


@cache
def _spelling(tokenizer: Any) -> Tensor:
    """The number of bytes that each token spells (int64 `[V]`), special tokens none."""
    from tokenizers import decoders

    special = set(tokenizer.all_special_ids)
    exact = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    sizes = []
    for i, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if i in special:
            sizes.append(0)
        elif exact:  # one letter of the byte-level alphabet is one byte
            sizes.append(len(piece))
        elif piece.startswith("<0x") and len(piece) == 6:
            sizes.append(1)
        else:
            sizes.append(len(piece.replace("\u2581", " ").encode()))
    return torch.tensor(sizes)


def _new(vocabulary: int, seed: int) -> nn.Module:
    """A model of two layers of width 64, from a seed; the global generator is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    chosen: Any = {"attn_implementation": "eager"}
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **chosen,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
