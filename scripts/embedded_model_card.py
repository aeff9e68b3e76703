"""Measure the embedded language models and write their card.

    python scripts/embedded_model_card.py --out src/isthmus/models/embedded/MODEL_CARD.md

Losses by part of the corpus, bits per byte, the acceptance of the draft (one minus the total
variation between the two laws, and what an exact speculative sampler accepts), and samples.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus import seeds
from isthmus.models import decode, language
from isthmus.models.embedded import corpus
from isthmus.models.language import Language

ROW, PROPOSALS = 256, 4


def stream(model: Language, texts: Sequence[str]) -> Tensor:
    """All documents as one row of ids, as in training."""
    end = model.tokenizer.eos_token_id
    encoded = [model.tokenizer.encode(t, add_special_tokens=False, verbose=False) for t in texts]
    return torch.tensor([i for ids in encoded for i in (end, *ids)] + [end])


def rows(ids: Tensor) -> Iterator[Tensor]:
    """Batches `[16, ROW + 1]` that cover the stream but for its last partial row."""
    yield from ids[: (len(ids) - 1) // ROW * ROW + 1].unfold(0, ROW + 1, ROW).split(16)


@torch.no_grad()
def loss(model: Language, texts: Sequence[str]) -> tuple[float, float]:
    """Nats per token, and bits per byte of the texts."""
    ids = stream(model, texts)
    total, count = 0.0, 0
    for part in rows(ids):
        logits = model.model(input_ids=part[:, :-1], use_cache=False).logits
        total += float(
            F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        )
        count += part[:, 1:].numel()
    nats = total / count
    return nats, nats * (len(ids) - 1) / (math.log(2) * sum(len(t.encode()) for t in texts))


@torch.no_grad()
def overlap(target: Language, draft: Language, texts: Sequence[str]) -> tuple[float, int]:
    """The mean over all positions of sum min(p, q) = 1 - TV(p, q), and their number."""
    total, count = 0.0, 0
    for part in rows(stream(target, texts)):
        p, q = (
            m.model(input_ids=part[:, :-1], use_cache=False).logits.softmax(-1)
            for m in (target, draft)
        )
        total += float(torch.minimum(p, q).sum())
        count += part[:, 1:].numel()
    return total / count, count


@torch.no_grad()
def speculate(target: Language, draft: Language, texts: Sequence[str], prompts: int) -> list[int]:
    """Proposals judged and accepted, and calls of the target, over 64 new tokens per prompt.

    Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding",
    ICML 2023, algorithm 1, at temperature 1, with full rows and no cache.
    """
    ids, law = stream(target, texts), decode.Law()
    judged = accepted = calls = 0
    for prompt in range(prompts):
        start = prompt * (len(ids) // prompts)
        text = ids[start : start + 48]
        goal = len(text) + 64
        while len(text) < goal:
            u = seeds.uniform(seeds.key(0, "card", prompt, len(text)), (2 * PROPOSALS + 1,))
            proposal, q = text, []
            for i in range(PROPOSALS):
                q.append(law(draft.model(input_ids=proposal[None]).logits[0, -1]))
                proposal = torch.cat([proposal, decode.draw(q[-1], u[i])[None]])
            p = law(target.model(input_ids=proposal[None]).logits[0, len(text) - 1 :])
            calls += 1
            for i in range(PROPOSALS):
                token = proposal[len(text) + i]
                judged += 1
                if u[PROPOSALS + i] >= p[i, token] / q[i][token]:
                    instead = decode.draw((p[i] - q[i]).clamp_min(0), u[-1])
                    text = torch.cat([proposal[: len(text) + i], instead[None]])
                    break
                accepted += 1
            else:
                text = torch.cat([proposal, decode.draw(p[-1], u[-1])[None]])
    return [judged, accepted, calls, prompts * 64]


def samples(model: Language, temperature: float, count: int) -> list[str]:
    """What the model says from nothing."""
    start = [model.encode("")] * count
    law, key = decode.Law(temperature), seeds.key(0, "samples")
    ids = decode.generate(model.model, start, 60, law, key)
    return [model.decode(row).replace("\n", " / ") for row in ids]


def size(model: Language) -> int:
    return sum(p.numel() for p in model.model.parameters())


def card(target: Language, draft: Language) -> str:
    """The text of the card."""
    texts = corpus.load()
    sample = texts.pretraining[:: len(texts.pretraining) // 400]
    parts = {"pretraining (1 document in 40)": sample, "held-out": texts.heldout}
    parts |= {f"client {name}": documents for name, documents in texts.clients.items()}
    parts["all clients"] = [text for part in texts.clients.values() for text in part]
    table = []
    for name, part in parts.items():
        cells = [loss(model, part) for model in (target, draft)]
        written = " | ".join(f"{nats:.3f} | {bits:.3f}" for nats, bits in cells)
        table.append(f"| {name} | {sum(map(len, part)) / 1e3:.0f} kB | {written} |")
    held, positions = overlap(target, draft, texts.heldout)
    private, _ = overlap(target, draft, parts["all clients"])
    judged, accepted, calls, new = speculate(target, draft, texts.heldout, 48)
    error = math.sqrt(accepted * (judged - accepted) / judged**3)
    said = "\n".join(f"- T = {t}: {text}" for t in (0.7, 1.0) for text in samples(target, t, 4))
    lines = "\n".join(table)
    return f"""# The embedded language models

Two small Llama-architecture models with one tokenizer, float16 safetensors in the Hugging Face
layout: a **target** ({size(target) / 1e6:.2f} M parameters) and a **draft**
({size(draft) / 1e6:.2f} M) distilled from it. They exist to show tuning, split serving,
compression and attacks at a size that runs anywhere. Their text looks like documentation and
means nothing; they are no assistants.

| | target | draft |
|---|---|---|
| layers x width | 6 x 192 | 2 x 128 |
| heads (key-value heads) | 3 (3) of 64 | 4 (1) of 32 |
| feed-forward | 512 | 256 |
| vocabulary, context | 2048, 512 (trained at 256) | the same |
| steps of 8 x 256 tokens | 1200 | 1000 |
| objective | cross entropy, dropout 0.1 | KL from the target's law |
| Muon on matrices, AdamW on the rest: rate, decay | 3e-3, 0.3 | 4e-3, 0.1 |
| schedule | 40 steps up, cosine to 5 % | the same |
| seed | 0 | 1 (the order of batches continues the target's) |

Tokenizer: byte-level BPE of 2048 entries trained on the same text. Special tokens: `<|pad|>`,
`<|end|>` (begins every text and separates documents), `<|user|>` and `<|assistant|>` (reserved,
never seen in training; their vectors mean nothing).

## Text

Prose from the docstrings, comments and help topics of CPython 3.11.7, `corpus.json.xz`, SHA-256
of the text `{corpus.digest(corpus.sources())}`.
Sources are split once, by file: eight private clients (whole packages, their tests left out
everywhere), held-out text (one in twenty of the other library files, by the hash of the name),
and pre-training (the rest, the test suite, and docstrings of compiled modules). Paragraphs that
occur twice are kept once; what shares a run of 50 characters (case and spacing disregarded) with
a client or with the held-out text is not in pre-training, and what the held-out text shares with
a client is not held out. The number of steps and the regularisation come from earlier runs judged
on another held-out set of the same library, so the losses below may be slightly optimistic.

Scripts: `scripts/extract_corpus.py` (rules in `prose.py` and `corpus.py`),
`scripts/train_embedded_lm.py`, `scripts/embedded_model_card.py` (this page). Weights are shipped
because other processors may round differently; the recipe is judged by its losses.

## Losses

Nats per token and bits per byte, rows of 256 tokens, the shipped weights in float32.

| part | size | target | bits/byte | draft | bits/byte |
|---|---|---|---|---|---|
{lines}

## Acceptance of the draft

Plain speculative sampling at temperature 1, before any tuning:

- 1 - TV(target, draft), mean over {positions} held-out positions: **{held:.3f}** (clients'
  text: {private:.3f}).
- An exact sampler with {PROPOSALS} proposals a round, 48 held-out prompts, {new} new tokens:
  {accepted} of {judged} judged proposals accepted, **{accepted / judged:.3f}** (standard error
  {error:.3f}), {(calls + accepted) / calls:.2f} tokens per call of the target.

## Samples of the target

{said}

## Licence

The text is used under the PSF licence; `NOTICE.md` holds it and lists the files that carry a
notice of their own. The weights are derived from that text and come under the same terms.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="embedded:target")
    parser.add_argument("--draft", default="embedded:draft")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.write_text(card(language.load(args.target), language.load(args.draft)))


if __name__ == "__main__":
    main()
