"""What a forward costs: arithmetic and memory traffic of n tokens after a context.

Counted are matrix products and attention, 2 FLOPs a multiply-add, as eager attention computes
them (every new token with every position of its own text); norms, activations and the scans of
recurrent layers are left out. Traffic is every weight once a batch, however many texts share
it, and each text's keys and values once: what makes a batch cheaper than its parts. Models are
dense: an expert that is a plain `nn.Linear` counts for every token, others do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Shape(NamedTuple):
    """A model in the numbers that its cost depends on."""

    body: int
    """FLOPs of the matrix products of one token, without the head's."""
    head: int
    """FLOPs of one row of logits."""
    attention: int
    """FLOPs of one token attending to one position, in all layers."""
    weights: int
    """Bytes of the weights that a forward reads."""
    kv: int
    """Bytes of the keys and values of one token, in all layers."""
    dtype: str
    """The type it computes in, as `isthmus.wire.device` names it."""


class Cost(NamedTuple):
    """FLOPs, and bytes moved through memory."""

    flops: int
    bytes: int


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a model, from its linear layers, its heads and its parameters."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("attention" in kind and kind != "linear_attention" for kind in kinds)
    heads = getattr(config, "num_attention_heads", 0) if layers else 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    pairs = getattr(config, "num_key_value_heads", None) or heads

    tables: set[int] = set()
    products: dict[int, Tensor] = {}  # a weight that adapters wrap is met twice
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding):
            tables.add(id(weight))
        elif isinstance(weight, Tensor) and weight.ndim == 2:
            # A linear layer of either orientation: `nn.Linear`, or GPT-2's transposed `Conv1D`.
            products[id(weight)] = weight
    last: Any = model.get_output_embeddings()
    head = last.weight.numel()
    return Shape(
        body=2 * (sum(weight.numel() for weight in products.values()) - head),
        head=2 * head,
        attention=4 * layers * heads * size,
        weights=sum(
            p.nbytes for p in model.parameters() if id(p) in products or id(p) not in tables
        ),
        kv=2 * layers * pairs * size * model.dtype.itemsize,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def forward(shape: Shape, lengths: Sequence[tuple[int, int]], rows: int | None = None) -> Cost:
    """The cost of one forward of several texts, each (n new tokens, context tokens before them).

    `rows`: how many rows of logits each text asks for (at most n); all n without it.

    >>> tiny = Shape(body=100, head=10, attention=2, weights=400, kv=8, dtype="float32")
    >>> forward(tiny, [(1, 5), (2, 0)])
    Cost(flops=350, bytes=464)
    >>> forward(tiny, [(1, 5), (2, 0)], rows=1).flops
    340
    """
    tokens = out = pairs = held = 0
    for n, context in lengths:
        tokens += n
        out += n if rows is None else min(n, rows)
        pairs += n * (context + n)
        held += context + n
    return Cost(
        tokens * shape.body + out * shape.head + pairs * shape.attention,
        shape.weights + held * shape.kv,
    )
