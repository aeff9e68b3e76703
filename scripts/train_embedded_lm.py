"""Train the embedded language models: a tokenizer, a target, and a draft distilled from it.

    python scripts/train_embedded_lm.py --out build/embedded

Reads the frozen extract of the package (part `pretraining` only) and writes `target/` and
`draft/` in the Hugging Face layout, float16 safetensors. About a quarter of an hour on two cores
with bfloat16 arithmetic. Same seed and same machine give the same bits; other processors may differ
in the last ones, so the package ships the weights and this recipe is judged by its losses.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from isthmus.models.embedded import corpus

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
PAD, END = 0, 1
VOCABULARY, CONTEXT, ROW, BATCH = 2048, 512, 256, 8
TARGET_STEPS, DRAFT_STEPS = 1200, 1000
TARGET = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 512,
}
DRAFT = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 256,
}


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<|end|>` begins every text and separates documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[END]} $A", special_tokens=[(SPECIAL[END], END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[END],
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[PAD],
        extra_special_tokens=list(SPECIAL[2:]),
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All documents as one row of ids (int64 `[n]`), each preceded by `<|end|>`, one at the end."""
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return torch.tensor([i for e in encoded for i in (END, *e.ids)] + [END])


def build(shape: dict[str, Any], seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        pad_token_id=PAD, bos_token_id=END, eos_token_id=END, **shape,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def add_dropout(
    model: LlamaForCausalLM, rate: float, generator: torch.Generator
) -> list[RemovableHandle]:
    """Dropout on the embeddings and on what every block adds to the residual stream."""

    def drop(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor | None:
        if not model.training:
            return None
        keep = torch.empty_like(output).bernoulli_(1 - rate, generator=generator)
        return output * keep / (1 - rate)

    places: list[Any] = [model.model.embed_tokens]
    layer: Any
    for layer in model.model.layers:
        places += [layer.self_attn.o_proj, layer.mlp.down_proj]
    return [place.register_forward_hook(drop) for place in places]


def batches(ids: Tensor, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches int64 `[BATCH, ROW + 1]`: passes over rows cut at a random offset."""
    rows = torch.empty(0, ROW + 1, dtype=torch.int64)
    for _ in range(steps):
        if len(rows) < BATCH:
            start = int(torch.randint(ROW, (1,), generator=generator))
            cut = ids[start:].unfold(0, ROW + 1, ROW)
            rows = torch.cat([rows, cut[torch.randperm(len(cut), generator=generator)]])
        yield rows[:BATCH]
        rows = rows[BATCH:]


def optimise(
    model: LlamaForCausalLM,
    ids: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    rate: float,
    decay: float,
    generator: torch.Generator,
    check: Callable[[], float],
    warmup: int = 40,
) -> None:
    """Muon on the matrices, AdamW on embeddings and norms; cosine to 5 % of the rate.

    Muon: Jordan et al. 2024, with the update scaled to AdamW's size (Liu et al., "Muon is
    scalable for LLM training", arXiv:2502.16982, section 2.2).
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    tables = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimisers = [
        torch.optim.Muon(
            matrices, lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [{"params": tables}, {"params": norms, "weight_decay": 0.0}],
            lr=rate, weight_decay=decay, betas=(0.9, 0.95),
        ),
    ]  # fmt: skip

    def share(t: int) -> float:
        return min((t + 1) / warmup, 0.525 + 0.475 * math.cos(math.pi * t / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, share) for o in optimisers]
    begun, mean = time.perf_counter(), 0.0
    for step, rows in enumerate(batches(ids, steps, generator)):
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        value = loss(logits.float(), rows)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
        mean += (value.item() - mean) / min(step + 1, 50)
        if (step + 1) % 300 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - begun
            losses = f"train {mean:.3f}  held out {check():.3f}"
            print(f"step {step + 1:5}  {losses}  {seconds:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits `[n, V]` and next ids `[n]` of consecutive rows, in batches."""
    model.eval()
    rows = ids[: (len(ids) - 1) // ROW * ROW + 1].unfold(0, ROW + 1, ROW)
    for part in rows.split(16):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        yield logits.flatten(0, 1), part[:, 1:].flatten()


def loss_on(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Mean cross entropy in nats per token."""
    sums = [(F.cross_entropy(z, y, reduction="sum"), len(y)) for z, y in logits_of(model, ids)]
    return float(sum(s for s, _ in sums) / sum(n for _, n in sums))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights as float16 safetensors, configuration and tokenizer."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-steps", type=int, default=TARGET_STEPS)
    parser.add_argument("--draft-steps", type=int, default=DRAFT_STEPS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    texts = corpus.load()
    tokenizer = train_tokenizer(texts.pretraining)
    ids, heldout = stream(tokenizer, texts.pretraining), stream(tokenizer, texts.heldout)
    print(f"{len(ids)} tokens of {sum(map(len, texts.pretraining))} bytes", flush=True)

    generator = torch.Generator().manual_seed(args.seed)
    target = build(TARGET, args.seed)
    hooks = add_dropout(target, 0.1, generator)
    optimise(
        target, ids, lambda z, rows: F.cross_entropy(z.flatten(0, 1), rows[:, 1:].flatten()),
        steps=args.target_steps, rate=3e-3, decay=0.3, generator=generator,
        check=lambda: loss_on(target, heldout),
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    save(target, tokenizer, args.out / "target")

    def distil(z: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            aim = target(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(z.flatten(0, 1), aim.float().softmax(-1).flatten(0, 1))

    draft = build(DRAFT, args.seed + 1)
    optimise(
        draft, ids, distil, steps=args.draft_steps, rate=4e-3, decay=0.1, generator=generator,
        check=lambda: loss_on(draft, heldout),
    )  # fmt: skip
    save(draft, tokenizer, args.out / "draft")


if __name__ == "__main__":
    main()
