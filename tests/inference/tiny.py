"""Small fresh models in float64, parties put together by hand, and a clock with bad lines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from isthmus import seeds
from isthmus.inference.edge import Edge, Limits
from isthmus.inference.engine import Engine
from isthmus.inference.method import Costs, method_of
from isthmus.inference.session import Session
from isthmus.models.decode import Law
from isthmus.models.language import Language
from isthmus.wire.clock import Clock, Event
from isthmus.wire.device import Device
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

VOCAB, CONTEXT = 48, 96
PLAIN = Law()
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 1}),
    "mistral": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
}


def fresh(kind: str = "llama", seed: int = 3, layers: int = 2) -> Any:
    """A random model in float64, where no batch tips a token over a rounding error."""
    config, model, more = KINDS[kind]
    shape = {"n_embd": 32, "n_inner": 48, "n_layer": layers, "n_head": 4, "n_positions": CONTEXT}
    if kind != "gpt2":
        shape = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
            "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
        }  # fmt: skip
    settings = config(
        vocab_size=VOCAB, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        attn_implementation="eager", **shape, **more,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(settings).double().eval()


def near(model: Any, seed: int = 5, scale: float = 0.05) -> Any:
    """A draft: the model with noise on its weights, so that some of what it says is accepted."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in draft.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight += scale * noise * weight.std()
    return draft


def language(model: Any) -> Language:
    """A model without a tokenizer."""
    return Language(model, None, "")  # type: ignore[arg-type]


def prompts(count: int, seed: int = 11) -> list[list[int]]:
    """Prompts of different lengths."""
    rng = seeds.rng(seed)
    return [rng.integers(2, VOCAB, 3 + (5 * i) % 11).tolist() for i in range(count)]


class Stage:
    """One edge and a session for each prompt on one clock; nobody has begun."""

    def __init__(
        self,
        target: Any,
        draft: Any,
        texts: Sequence[Sequence[int]],
        *,
        method: str = "dssd",
        settings: dict[str, Any] | None = None,
        law: Law = PLAIN,
        count: int = 20,
        stop: Sequence[int] = (),
        keys: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        numbers: Sequence[int] | None = None,
        link: Callable[[], Link] = Link,
        clock: Clock | None = None,
        ledger: Ledger | None = None,
        limits: Limits | None = None,
        timeout: float | None = 5.0,
        tries: int = 3,
        fallback: Any = "none",
        edge: Device | str = "edge-server",
        half: dict[str, Any] | None = None,
    ) -> None:
        self.clock = clock or Clock(ledger)
        self.target, self.draft = Engine(target), Engine(draft)
        mark = f"vocabulary of {VOCAB}"
        self.edge = Edge(self.target, limits=limits, fingerprint=mark, device=edge)
        self.clock.join(self.edge, self.edge.device)
        self.sessions: list[Session] = []
        kind = method_of(method, self.target.vocab, settings)
        for i, text in enumerate(texts):
            session = Session(
                kind, text, draft=self.draft if kind.drafts or fallback == "device" else None,
                name=names[i] if names else f"device/{i}",
                number=numbers[i] if numbers else i + 1, law=law,
                key=keys[i] if keys else seeds.keys(seeds.key(0), [i])[0].item(),
                max_new_tokens=count, stop=stop, fallback=fallback, timeout=timeout, tries=tries,
                fingerprint=self.edge.fingerprint, costs=Costs(draft=1e-4), **(half or {}),
            )  # fmt: skip
            self.clock.join(session)
            self.clock.connect(session.name, "edge", link())
            self.sessions.append(session)

    def begin(self) -> Stage:
        """Let every session begin now."""
        for session in self.sessions:
            self.clock.at(self.clock.now, session, Event("begin"))
        return self

    def run(self) -> list[list[int]]:
        """Begin, and answer all there is to answer: the new tokens of each."""
        self.begin().clock.run()
        return self.ids

    @property
    def ids(self) -> list[list[int]]:
        """The new tokens so far."""
        return [[token.id for token in session.tokens] for session in self.sessions]

    def clean(self) -> bool:
        """Whether nobody left anything: no text at the edge, all slots of both memories free."""
        free = [engine.open() for engine in (self.target, self.draft)]
        for engine, slot in zip((self.target, self.draft), free, strict=True):
            engine.close(slot)
        return not self.edge.texts and not self.edge._parties and free == [0, 0]


class Unruly(Clock):
    """A clock whose lines lose, repeat and delay messages, silently."""

    def __init__(
        self, seed: int, *, lose: float = 0.0, double: float = 0.0, delay: float = 0.0
    ) -> None:
        super().__init__()
        self.rng = seeds.rng(seed, "unruly")
        self.lose, self.double, self.delay = lose, double, delay
        self.lost = self.doubled = 0

    def _put(self, time: float, party: str, item: Any) -> None:
        if not isinstance(item, Event) or not item.data:
            return super()._put(time, party, item)
        if self.rng.random() < self.lose:
            self.lost += 1
            return None
        copies = 1 + int(self.rng.random() < self.double)
        self.doubled += copies - 1
        for _ in range(copies):
            late = self.rng.exponential(self.delay) if self.delay else 0.0
            super()._put(time + late, party, item)
        return None
