"""Language models by name: the embedded pair, Hugging Face folders and ids, llama2.c files.

Attention is `eager` unless asked otherwise: of the implementations that accept a 4-D mask it is
the one whose every operation `torch.vmap` batches (`sdpa` gives the same numbers there, but
runs one client after the other), and the one whose arithmetic FLOP counters see.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isthmus.errors import InputError, unknown
from isthmus.models import llama2c
from isthmus.models.decode import stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = ("target", "draft")


@dataclass(frozen=True)
class Language:
    """A causal language model in evaluation mode, its tokenizer and the name it was asked by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def context(self) -> int:
        """The most tokens that one text may have."""
        return int(self.model.config.max_position_embeddings)

    @property
    def stop(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return stop_tokens(self.model)

    def encode(self, text: str) -> Tensor:
        """The ids of a prompt (int64 `[L]`), after the mark that begins a text if any."""
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.int64)

    def decode(self, ids: Any) -> str:
        """The text of ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def load(
    name: str | Path, dtype: torch.dtype = torch.float32, attention: str = "eager"
) -> Language:
    """The model called `name`, with every dropout at 0.

    `embedded` or `embedded:target` and `embedded:draft` come with the package; a path ending in
    `.bin` is a llama2.c model with its tokenizer beside it; a folder or any other name is read
    by Hugging Face. Raises `InputError` in one line for what cannot be found or read.

    >>> draft = load("embedded:draft")
    >>> draft.decode(draft.encode("Return True if"))
    'Return True if'
    """
    text = str(name)
    if text.partition(":")[0] == "embedded":
        part = text.partition(":")[2] or "target"
        if part not in EMBEDDED:
            raise unknown("model", text, [f"embedded:{each}" for each in EMBEDDED])
        model, tokenizer = _pretrained(Path(__file__).parent / "embedded" / part, dtype, attention)
        text = f"embedded:{part}"
    elif text.endswith(".bin"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise InputError("model", text, "a llama2.c file that exists")
        model: Any = llama2c.read_model(path, attention)
        model = model.to(dtype)
        vocab, context = model.config.vocab_size, model.config.max_position_embeddings
        tokenizer = llama2c.read_tokenizer(llama2c.find_tokenizer(path, vocab), vocab, context)
    else:
        folder = Path(text).expanduser()
        if not folder.is_dir() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
            raise InputError("model", text, "a folder that exists")
        model, tokenizer = _pretrained(folder if folder.is_dir() else text, dtype, attention)
    return Language(without_dropout(model).eval(), tokenizer, text)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set every dropout rate of `model` to 0 in place, so that training mode draws nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model


def _pretrained(source: str | Path, dtype: torch.dtype, attention: str) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    here = isinstance(source, Path) or _cached(source)
    if not here:
        _reach(str(source))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=here,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=here)
    except (OSError, ValueError, SafetensorError) as error:
        allowed = "a causal language model in the Hugging Face layout, with safetensors"
        raise InputError("model", source, allowed) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model, tokenizer


def _cached(name: str) -> bool:
    """Whether an id was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _reach(name: str) -> None:
    """Ask for an id once: the loader itself would repeat the question for most of a minute."""
    from huggingface_hub import model_info

    try:
        model_info(name, timeout=10)
    except Exception as error:  # whatever the client of the day raises, the answer is no
        allowed = "embedded, embedded:draft, a folder, a .bin file, or an id that can be reached"
        raise InputError("model", name, allowed) from error
