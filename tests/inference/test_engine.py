"""The engine against the model alone: every row, every drafted token, every count of forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.inference.engine import Engine
from isthmus.models import decode
from isthmus.models.decode import Law, draw

V, CONTEXT = 37, 96
LAWS = [Law(0.8), Law(1.3, top_k=6), Law(0.0), Law(0.7, top_p=0.9)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Random, in float64: batching must not tip a token over a rounding error."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        initializer_range=0.4, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def forwards(model: LlamaForCausalLM) -> Iterator[list[tuple[int, int]]]:
    """The shapes of the ids of each forward."""
    seen: list[tuple[int, int]] = []
    handle = model.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    yield seen
    handle.remove()


def prompt(i: int, n: int) -> list[int]:
    return (seeds.uniform(100 + i, (n,)) * V).long().tolist()


@torch.no_grad()
def plain(model: Any, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0].double()


def drafted(
    model: Any, ids: list[int], law: Callable[[Tensor], Tensor], u: Tensor
) -> tuple[list[int], Tensor]:
    """What a session alone would draw, by a whole forward for each token."""
    text, rows = list(ids), []
    for each in u:
        row = law(plain(model, text)[-1])
        rows.append(row)
        text.append(int(draw(row, each)))
    return text[len(ids) :], torch.stack(rows)


def chances(i: int, n: int) -> Tensor:
    return seeds.uniform(900 + i, (n,), torch.float64)


def test_rows_are_those_of_the_model(model: Any, forwards: list[Any]) -> None:
    engine = Engine(model)
    texts = [prompt(i, n) for i, n in enumerate((7, 3, 12, 5))]
    slots = [engine.open() for _ in texts]
    pending = [
        engine.rows(slot, ids, last)
        for slot, ids, last in zip(slots, texts, (2, 3, 1, 5), strict=True)
    ]
    assert not forwards and not any(each.done for each in pending)
    found = [each.get() for each in pending]
    assert forwards == [(4, 12)]
    for ids, rows, last in zip(texts, found, (2, 3, 1, 5), strict=True):
        assert rows.shape == (last, V) and rows.dtype == torch.float64
        torch.testing.assert_close(rows, plain(model, ids)[-last:], rtol=0, atol=1e-10)
        rows += 1.0  # the asker's own
    assert [engine.length(slot) for slot in slots] == [7, 3, 12, 5]
    assert pending[0].get() is found[0] and len(forwards) == 4 + 1


def test_drafts_are_those_of_each_session_alone(model: Any, forwards: list[Any]) -> None:
    """Different prompts, laws and counts, in as many forwards as the longest draft has tokens."""
    engine = Engine(model)
    counts = [4, 2, 6, 4, 1, 3]
    texts = [prompt(i, 3 + i) for i in range(6)]
    laws = [LAWS[i % 4] for i in range(6)]
    slots = [engine.open() for _ in texts]
    pending = [
        engine.propose(slot, ids, n, law, chances(i, n))
        for i, (slot, ids, n, law) in enumerate(zip(slots, texts, counts, laws, strict=True))
    ]
    found = [each.get() for each in reversed(pending)][::-1]
    assert forwards == [(6, 8), (5, 1), (4, 1), (3, 1), (1, 1), (1, 1)]
    for i, (ids, n, law, proposal) in enumerate(zip(texts, counts, laws, found, strict=True)):
        tokens, rows = drafted(model, ids, law, chances(i, n))
        assert proposal.ids.tolist() == tokens and proposal.ids.dtype == torch.int64
        assert proposal.rows.dtype == torch.float64
        torch.testing.assert_close(proposal.rows, rows, rtol=0, atol=1e-10)
        assert engine.length(slots[i]) == len(ids) + n - 1
    assert len({tuple(proposal.ids.tolist()) for proposal in found}) == 6


def test_rounds_of_drafting_and_forgetting(model: Any) -> None:
    """After a crop a text goes on as one that was never anything else."""
    engine = Engine(model)
    texts = [prompt(i, 4 + 2 * i) for i in range(3)]
    slots = [engine.open() for _ in texts]
    for turn in range(5):
        pending = []
        for i, (slot, text) in enumerate(zip(slots, texts, strict=True)):
            fed = text[engine.memory.length(slot) :]
            pending.append(engine.propose(slot, fed, 3, LAWS[0], chances(10 * turn + i, 3)))
        for i, each in enumerate(pending):
            tokens, _ = drafted(model, texts[i], LAWS[0], chances(10 * turn + i, 3))
            assert each.get().ids.tolist() == tokens
            kept = (i + turn) % 4
            texts[i] += [*tokens[:kept], (7 * i + turn) % V]
            if kept < 3:
                engine.crop(slots[i], len(texts[i]) - 1)


def test_sampling_and_greedy_equal_plain_generation(model: Any) -> None:
    ids, key = prompt(1, 5), 77
    for law in (Law(0.9), Law(0.0)):
        expected = decode.generate(model, [ids], 20, law, [key], stop=())[0, 5:]
        engine = Engine(model)
        slot = engine.open()
        u = seeds.uniform(key, (25,), torch.float64)[5:]
        proposal = engine.propose(slot, ids, 20, law, u).get()
        assert torch.equal(proposal.ids, expected)
        torch.testing.assert_close(proposal.rows.sum(-1), torch.ones(20, dtype=torch.float64))
        if law.greedy:
            assert torch.equal(proposal.rows.argmax(-1), expected)
            assert set(proposal.rows.unique().tolist()) == {0.0, 1.0}


def test_rows_and_drafts_share_the_first_forward(model: Any, forwards: list[Any]) -> None:
    engine = Engine(model)
    a, b, c = (engine.open() for _ in range(3))
    texts = [prompt(i, n) for i, n in enumerate((4, 6, 5))]
    first = engine.propose(a, texts[0], 3, LAWS[0], chances(0, 3))
    rows = engine.rows(b, texts[1], 6)
    last = engine.propose(c, texts[2], 2, LAWS[0], chances(1, 2))
    found = rows.get()
    assert forwards == [(3, 6), (2, 1), (1, 1)]
    torch.testing.assert_close(found, plain(model, texts[1]), rtol=0, atol=1e-10)
    assert first.get().ids.tolist() == drafted(model, texts[0], LAWS[0], chances(0, 3))[0]
    assert last.get().ids.tolist() == drafted(model, texts[2], LAWS[0], chances(1, 2))[0]


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ([5, 90, 5, 4, 6, 5], [(5, 6), (1, 90)]),
        ([5, 90, 5], [(2, 5), (1, 90)]),
        ([30, 90], [(2, 90)]),  # 60 columns of padding are less than another forward
        ([90, 20, 85, 80, 25, 20], [(3, 25), (3, 90)]),
        ([9, 10, 11, 12] * 4, [(16, 12)]),
    ],
)
def test_long_prompts_do_not_pad_short_ones(
    model: Any,
    forwards: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    shapes: list[tuple[int, int]],
) -> None:
    engine = Engine(model)
    slots = [engine.open() for _ in lengths]
    asked = [(s, engine.rows(s, prompt(s, lengths[s]), 2)) for s in reversed(slots)]
    pending = [each for _, each in sorted(asked, key=lambda pair: pair[0])]
    order: list[list[int]] = []
    extend = engine.memory.extend
    monkeypatch.setattr(engine.memory, "extend", lambda s, *a: (order.append(s), extend(s, *a))[1])
    found = [each.get() for each in pending]
    assert forwards == shapes
    # Side by side, so that neighbours can be read in place.
    assert (
        all(each == sorted(each) for each in order)
        and sorted(s for each in order for s in each) == slots
    )
    for slot, n, rows in zip(slots, lengths, found, strict=True):
        torch.testing.assert_close(rows, plain(model, prompt(slot, n))[-2:], rtol=0, atol=1e-10)


@dataclass(frozen=True)
class Counting:
    """Equal to others of its name; notes the shapes it is asked for."""

    name: str
    seen: tuple[list[tuple[str, int]]]

    def __hash__(self) -> int:
        return hash(self.name)

    def __call__(self, logits: Tensor) -> Tensor:
        self.seen[0].append((self.name, len(logits)))
        return logits.softmax(-1)


def test_equal_laws_are_asked_once_a_step(model: Any) -> None:
    engine, seen = Engine(model), ([],)
    for i, name in enumerate("xyxxy"):
        law = Counting(name, seen)
        pending = engine.propose(engine.open(), prompt(i, 4), 3, law, chances(i, 3))
    pending.get()
    assert sorted(seen[0]) == [("x", 3)] * 3 + [("y", 2)] * 3


def test_requests_of_one_slot_follow_each_other(model: Any) -> None:
    engine = Engine(model)
    a, b = engine.open(), engine.open()
    one = engine.rows(a, prompt(0, 4), 1)
    two = engine.propose(a, prompt(1, 3), 3, LAWS[0], chances(0, 3))
    other = engine.rows(b, prompt(2, 5), 1)
    ids = prompt(0, 4) + prompt(1, 3)
    assert two.get().ids.tolist() == drafted(model, ids, LAWS[0], chances(0, 3))[0]
    torch.testing.assert_close(one.get(), plain(model, prompt(0, 4))[-1:], rtol=0, atol=1e-10)
    assert other.done
    # What is asked of a slot comes before what is done to it.
    three = engine.rows(b, prompt(3, 4), 2)
    assert not three.done and engine.length(a) == 9 and not three.done
    assert engine.length(b) == 9 and three.done
    engine.rows(b, prompt(4, 2), 1)
    engine.crop(b, 10)
    assert engine.length(b) == 10


def test_one_bad_request_does_not_harm_the_others(model: Any) -> None:
    def broken(logits: Tensor) -> Tensor:
        raise ArithmeticError("no law")

    engine = Engine(model)
    texts = [prompt(i, 4 + i) for i in range(8)]
    slots = [engine.open() for _ in texts]
    for slot, ids in zip(slots, texts, strict=True):
        engine.rows(slot, ids, 1)
    more = prompt(50, 3)
    bad = {
        0: (engine.rows(slots[0], [3, V], 1), f"ids: .* 0 to {V - 1}"),
        1: (engine.rows(slots[1], [0] * (CONTEXT - 4), 1), f"text: {CONTEXT + 1} tokens"),
        2: (engine.rows(slots[2], more, 4), "ids: 3 ids given, allowed: 4 or more"),
        3: (engine.propose(slots[3], more, 2, broken, chances(3, 2)), "no law"),
        4: (engine.propose(slots[4], [1] * (CONTEXT - 9), 3, LAWS[0], chances(0, 3)), "text: 97"),
        5: (engine.rows(slots[5], [], 1), "ids: 0 ids"),
        9: (engine.rows(99, more, 1), "slot: 99"),
    }
    good = engine.propose(slots[6], more, 2, LAWS[1], chances(6, 2))
    fine = engine.rows(slots[7], more, 2)
    tokens, _ = drafted(model, texts[6] + more, LAWS[1], chances(6, 2))
    assert good.get().ids.tolist() == tokens
    torch.testing.assert_close(fine.get(), plain(model, texts[7] + more)[-2:], rtol=0, atol=1e-10)
    for pending, message in bad.values():
        for _ in range(2):
            with pytest.raises((InputError, ArithmeticError), match=message):
                pending.get()
    # Their texts are as they were, and go on.
    pending = [engine.rows(slot, more, 1) for slot in slots[:6]]
    for each, ids in zip(pending, texts, strict=False):
        torch.testing.assert_close(each.get(), plain(model, ids + more)[-1:], rtol=0, atol=1e-10)


def test_a_law_that_fails_in_mid_draft_leaves_the_text_as_it_was(model: Any) -> None:
    calls = []

    def tiring(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError("tired")
        return logits.softmax(-1)

    engine = Engine(model)
    a, b = engine.open(), engine.open()
    bad = engine.propose(a, prompt(0, 5), 4, tiring, chances(0, 4))
    good = engine.propose(b, prompt(1, 3), 4, LAWS[0], chances(1, 4))
    assert good.get().ids.tolist() == drafted(model, prompt(1, 3), LAWS[0], chances(1, 4))[0]
    with pytest.raises(ArithmeticError, match="tired"):
        bad.get()
    assert engine.length(a) == 0


def test_a_forward_that_fails_is_told_to_all_and_changes_no_text(model: Any) -> None:
    engine = Engine(model)
    a, b = engine.open(), engine.open()
    engine.rows(a, prompt(0, 5), 1).get()

    for room in (0, 1, 2):  # forwards that succeed before one that fails
        left = [room]

        def fail(*_: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError("no room")

        one = engine.propose(a, [1, 2], 3, LAWS[0], chances(0, 3))
        two = engine.propose(b, [3], 4, LAWS[0], chances(1, 4))
        handle = model.register_forward_pre_hook(fail)
        for each in (two, one):
            with pytest.raises(MemoryError, match="no room"):
                each.get()
        handle.remove()
        assert (engine.length(a), engine.length(b)) == (5, 0)
    row = engine.rows(a, [1, 2], 1).get()
    torch.testing.assert_close(row, plain(model, [*prompt(0, 5), 1, 2])[-1:], rtol=0, atol=1e-10)


def test_closing_drops_what_was_asked(model: Any, forwards: list[Any]) -> None:
    engine = Engine(model)
    a, b = engine.open(), engine.open()
    dropped, kept = engine.rows(a, prompt(0, 9), 1), engine.rows(b, prompt(1, 4), 1)
    engine.close(a)
    with pytest.raises(InputError, match="slot: 0 given, allowed: an open one"):
        dropped.get()
    assert not kept.done and engine.open() == a
    new = engine.rows(a, prompt(2, 3), 1)
    torch.testing.assert_close(new.get(), plain(model, prompt(2, 3))[-1:], rtol=0, atol=1e-10)
    assert forwards[0] == (2, 4) and kept.done


def test_proposals_need_their_chances(model: Any) -> None:
    engine = Engine(model)
    slot = engine.open()
    for n in (0, 3):
        with pytest.raises(InputError, match=r"u: [02] numbers"):
            engine.propose(slot, [1], n, LAWS[0], chances(0, 2 if n else 0))
    with pytest.raises(InputError, match="last: 0"):
        engine.rows(slot, [1], 0).get()
    with pytest.raises(TypeError, match="unhashable"):
        engine.propose(slot, [1], 1, [], chances(0, 1))  # type: ignore[arg-type]
    assert engine.length(slot) == 0


def test_recurrent_models_draft_and_judge_alike() -> None:
    config = MambaConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.4
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model: Any = MambaForCausalLM(config).double().eval()
    engine = Engine(model)
    texts = [prompt(0, 6), prompt(1, 3)]
    slots = [engine.open() for _ in texts]
    for turn in range(3):
        drafts = []
        for i, (slot, text) in enumerate(zip(slots, texts, strict=True)):
            fed = text[engine.length(slot) :]
            drafts.append(engine.propose(slot, fed, 2 + i, LAWS[0], chances(10 * turn + i, 2 + i)))
        for i, each in enumerate(drafts):
            tokens, rows = drafted(model, texts[i], LAWS[0], chances(10 * turn + i, 2 + i))
            assert each.get().ids.tolist() == tokens
            torch.testing.assert_close(each.get().rows, rows, rtol=0, atol=1e-5)
            engine.crop(slots[i], len(texts[i]) + 1)
            texts[i] += [tokens[0], 5 + turn]
    row = engine.rows(slots[0], texts[0][engine.length(slots[0]) :], 1).get()
    torch.testing.assert_close(row.double(), plain(model, texts[0])[-1:], rtol=0, atol=1e-4)


def test_limits_are_the_models(model: Any) -> None:
    engine = Engine(model)
    assert (engine.vocab, engine.context) == (V, CONTEXT)
    slot = engine.open()
    proposal = engine.propose(slot, prompt(0, 90), 7, LAWS[0], chances(0, 7)).get()
    assert engine.length(slot) == CONTEXT == 90 + len(proposal.ids) - 1
    with pytest.raises(InputError, match=f"text: {CONTEXT + 1} tokens"):
        engine.rows(slot, [1], 1).get()
