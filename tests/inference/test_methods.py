"""The serving methods: what they send, what they cost, what they refuse, how they are related."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.inference.pure import PLAIN, Pair, shared, tables
from torch import Tensor

from isthmus import catalogue
from isthmus.errors import InputError
from isthmus.inference.chance import chances
from isthmus.inference.draft import Ids
from isthmus.inference.method import Case, Draft, Judged, Kept, Method, Told, method_of
from isthmus.inference.methods.dssd import Dssd
from isthmus.inference.methods.tk_slt import TkSlt
from isthmus.models.decode import Law, draw
from isthmus.wire.message import Message, WireError, decode, encode

V = 14
DRAFT, TARGET = tables(V, seed=14)
EDGES = ("full-row", "tk-slt", "dssd")
START = 3
"""From here the draft's likeliest words are the target's at some places of the chain only."""


def pair(name: str, law: Law = PLAIN, **settings: Any) -> Pair:
    return Pair(method_of(name, V, settings), DRAFT, TARGET, law)


def draft_of(method: Method, g: int, seed: int = 0, void: bool = False) -> tuple[Message, Kept]:
    """An offer of the likeliest tokens of g random rows, a void one last if asked for."""
    numbers = torch.Generator().manual_seed(seed)
    logits = torch.randn(g, method.vocab, dtype=torch.float64, generator=numbers)
    logits[:, seed % method.vocab] += 12.0
    q = method.drafting(Law())(logits)
    ids = q.argmax(-1) if g else torch.empty(0, dtype=torch.int64)
    u = torch.zeros(g, dtype=torch.float64)
    if void:
        u[-1] = 1 - 2.0**-53
    return method.offer(9, 1, ids, q, u)


def rows_of(method: Method, n: int, seed: int = 1) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(n, method.vocab, dtype=torch.float64, generator=numbers).softmax(-1)


def verdict_of(method: Method, offer: Message, accept: float, correct: float = 0.5) -> Message:
    n = len(method.drafted(offer).ids)
    u, v = (torch.full((n + 1,), x, dtype=torch.float64) for x in (accept, correct))
    return method.judge(rows_of(method, n + 1), offer, u, v).verdict


# ------------------------------------------------------------ how the methods are related


def test_tk_slt_with_all_words_is_full_row_bit_for_bit() -> None:
    whole, top = pair("full-row"), pair("tk-slt", K=V, adapt=False)
    for key in range(40):
        one, two = (subject.text(12, 3, shared(key)) for subject in (whole, top))
        assert one[:2] == two[:2]
        assert [done.down[12:] for done in one[2]] == [done.down[12:] for done in two[2]]
    rows = whole.method.drafting(Law())(DRAFT)
    assert torch.equal(top.method.drafting(Law())(DRAFT), rows)
    assert not torch.equal(pair("tk-slt", K=V - 1).q, rows)


@pytest.mark.parametrize(
    ("grid", "row"), [("fp16", "fp16"), ("exact", "exact"), ("4", "fp16"), ("2", "fp32")]
)
def test_dssd_says_what_full_row_says(grid: str, row: str) -> None:
    origins = set()
    for key in range(25):
        one = pair("full-row", grid=grid, row=row).text(12, 4, shared(key))
        two = pair("dssd", grid=grid, row=row).text(12, 4, shared(key))
        assert one[:2] == two[:2]
        origins |= set(one[1])
    assert origins >= {"accepted", "corrected"} and ("bonus" in origins or len(grid) == 1)


@pytest.mark.parametrize("name", EDGES)
def test_greedy_texts_are_the_chain_of_the_target(name: str) -> None:
    chain, last = [], START
    for _ in range(15):
        last = int(TARGET[last].argmax())
        chain.append(last)
    for more in ({}, {"grid": "1"}):
        text, origins, _ = pair(name, Law(temperature=0.0), **more).text(
            15, 4, shared(5), start=START
        )
        assert text[:15] == chain
        assert {"corrected", "accepted"} <= set(origins)


@pytest.mark.parametrize("name", [*EDGES, "cloud-only"])
@pytest.mark.parametrize("law", [Law(), Law(temperature=0.7, top_k=5), Law(top_p=0.8)])
def test_without_drafts_a_text_is_that_of_plain_decoding(name: str, law: Law) -> None:
    key, text = 77, [2]
    while len(text) <= 20:
        u = chances(key, "correct", len(text), 1)[0]
        text.append(int(draw(law(TARGET[text[-1]]), u)))
    said, origins, _ = pair(name, law).text(20, 0, shared(key), start=2)
    assert said == text[1:]
    assert set(origins) == {"target"}


@pytest.mark.parametrize("name", EDGES)
def test_a_draft_that_is_the_target_always_stands(name: str) -> None:
    same = {"grid": "exact", "row": "exact"} | ({"K": V} if name == "tk-slt" else {})
    subject = Pair(method_of(name, V, same), TARGET, TARGET)
    _, origins, rounds = subject.text(40, 4, shared(3))
    assert set(origins) == {"accepted", "bonus"}
    assert all(done.settled.accepted == 4 for done in rounds)


def test_the_truncated_law_keeps_the_largest() -> None:
    method = method_of("tk-slt", V, {"K": 3})
    q = method.drafting(Law(temperature=0.5))(DRAFT)
    full = Law(temperature=0.5)(DRAFT)
    for row, whole in zip(q, full, strict=True):
        assert set(row.nonzero()[:, 0].tolist()) == set(whole.topk(3).indices.tolist())
        assert row.max() / row.sum() == pytest.approx(whole.max() / whole.topk(3).values.sum())
    again = method_of("tk-slt", V, {"K": 3}).drafting(Law(temperature=0.5))
    assert again == method.drafting(Law(temperature=0.5)), "equal laws are computed together"
    raw = method_of("tk-slt", V, {"K": 3, "form": "raw"})
    assert torch.equal(raw.drafting(Law(temperature=0.5))(DRAFT), full)


def test_outside_of_the_raw_top_every_token_is_void() -> None:
    method = method_of("tk-slt", V, {"K": 3, "form": "raw", "grid": "exact"})
    q = Law()(DRAFT)
    for word in range(V):
        zero = torch.zeros(1, dtype=torch.float64)
        offer, kept = method.offer(1, 0, torch.tensor([word]), q[:1], zero)
        assert kept.void == (word not in q[0].topk(3).indices)
        assert method.drafted(offer) == (None, [] if kept.void else [word], kept.void)


# ------------------------------------------------------------ void tokens


@pytest.mark.parametrize("name", EDGES)
def test_a_draft_ends_at_its_first_void_token(name: str) -> None:
    method = method_of(name, V, {"grid": "3"})
    q = method.drafting(Law())(DRAFT[:4])
    ids = q.argmax(-1)
    u = torch.tensor([0.0, 1 - 2.0**-53, 0.0, 1 - 2.0**-53], dtype=torch.float64)
    offer, kept = method.offer(5, 1, ids, q, u)
    assert kept.void and torch.equal(kept.ids, ids[:2]) and len(kept.s) == 2
    assert offer.tensors["ids"].tolist() == [int(ids[0]), 65535]
    assert method.drafted(offer)[1:] == ([int(ids[0])], True)
    accept = torch.zeros(2, dtype=torch.float64)
    judged = method.judge(rows_of(method, 2), offer, accept, accept)
    told = method.settle(kept, judged.verdict, torch.zeros(3, dtype=torch.float64))
    assert judged.accepted == 1 and told.accepted == 1 and told.origin == "corrected"


@pytest.mark.parametrize("name", EDGES)
def test_no_coin_is_tossed_where_nothing_was_rounded_off(name: str) -> None:
    method = method_of(name, V, {"grid": "exact"})
    _, kept = draft_of(method, 6, void=True)
    assert not kept.void and len(kept.ids) == 6


# ------------------------------------------------------------ what it costs


def test_the_table_of_bytes() -> None:
    """Paper-style bytes of a round of 4 at 32000 words, exactly: ids of 15 bits."""
    words, g = 32000, 4
    paper = {
        ("full-row", ()): -(-g * (16 * words + 15) // 8),
        ("tk-slt", (("K", 32),)): -(-g * (32 * (16 + 15) + 15) // 8),
        ("dssd", ()): -(-(g * (16 + 15) + 15) // 8),
        ("dssd", (("grid", "6"),)): -(-(g * (6 + 15) + 15) // 8),
    }
    assert list(paper.values()) == [256008, 504, 18, 13]
    for (name, chosen), wanted in paper.items():
        method = method_of(name, words, dict(chosen))
        offer, _ = draft_of(method, g)
        assert method.values(offer) == wanted
        stands, rejects = (verdict_of(method, offer, u) for u in (0.0, 1 - 2.0**-53))
        assert method.values(stands) == -(-(8 + 15) // 8)
        row = 1 + 2 * words if name == "dssd" else 3
        assert method.values(rejects) == row
    top = method_of("tk-slt", words)
    assert isinstance(top, TkSlt)
    assert top.probabilities(draft_of(top, g)[0]) == g * 32 * 2
    cloud = method_of("cloud-only", words)
    offer, _ = draft_of(cloud, 0)
    assert (cloud.values(offer), cloud.values(verdict_of(cloud, offer, 0.0))) == (0, 2)


@pytest.mark.parametrize(
    ("name", "knobs", "up", "stands", "rejects"),
    [
        # 4 `at`; sizes as varints of 1 to 3 bytes; ids of 2 bytes; numbers of 2, 4, 8 or bits
        ("full-row", {}, lambda g, v: 4 + 1 + 1 + 2 * g + 2 * g * v, 7, 7),
        ("full-row", {"grid": "5"}, lambda g, v: 4 + 1 + 2 + 2 * g + -(-5 * g * v // 8), 7, 7),
        ("tk-slt", {"K": 8}, lambda g, v: 4 + 1 + 1 + 1 + 2 * g + 2 * g * 8 + 2 * g * 8, 7, 7),
        ("tk-slt", {"K": 8, "grid": "3"}, lambda g, v: 4 + 3 + 2 * g + 2 * g * 8 + 3 * g, 7, 7),
        ("dssd", {}, lambda g, v: 4 + 2 + 1 + 1 + 2 * g + 2 * g, 8, 9 + 2 * 300),
        ("dssd", {"row": "fp32"}, lambda g, v: 4 + 2 + 1 + 1 + 2 * g + 2 * g, 8, 9 + 4 * 300),
        ("dssd", {"grid": "10"}, lambda g, v: 4 + 2 + 2 + 2 * g + -(-10 * g // 8), 8, 609),
    ],
)
def test_messages_are_as_long_as_declared(
    name: str, knobs: dict[str, Any], up: Any, stands: int, rejects: int
) -> None:
    method = method_of(name, 300, knobs)
    for g in (1, 5):
        offer, _ = draft_of(method, g)
        data = encode(offer, method.up, "compact")
        # The size of packed rows is a varint: one byte below 128.
        short = knobs.get("grid") == "5" and -(-5 * g * 300 // 8) < 128
        assert len(data) == 12 + up(g, 300) - short
        for accept, length in ((0.0, stands), (1 - 2.0**-53, rejects)):
            verdict = verdict_of(method, offer, accept)
            assert len(encode(verdict, method.down, "compact")) == 12 + length


def test_dssd_never_sends_a_row_up() -> None:
    """Its offers are equally long for any vocabulary, and no entry of theirs is a row."""
    small, large = method_of("dssd", 1000), method_of("dssd", 60_000)
    for g in (0, 1, 4, 64):
        one, two = (encode(draft_of(x, g)[0], x.up, "compact") for x in (small, large))
        assert len(one) == len(two) == 12 + 4 + 2 + 1 + 1 + 4 * g
    _, _, rounds = pair("dssd").text(60, 4, shared(1))
    for done in rounds:
        assert len(done.up) == 12 + 4 + 2 + 1 + 1 + 4 * done.drafted
        assert {name: x.ndim for name, x in done.offer.tensors.items()} == {"ids": 1, "s": 1}
        row = done.settled.origin == "corrected"
        assert len(done.verdict.tensors["row"]) == (V if row else 0)


def test_every_schema_has_its_own_number_and_room_for_64_tokens() -> None:
    numbers = []
    for name in ("full-row", "tk-slt", "dssd", "cloud-only"):
        method = method_of(name, 70_000, {"K": 100} if name == "tk-slt" else {})
        numbers += [method.up.number, method.down.number]
        assert (method.up.kind, method.down.kind) == ("offer", "verdict")
        assert method.up.fields["at"].dtype == method.down.fields["at"].dtype == "u32"
    assert sorted(numbers) == list(range(32, 40))
    for name in EDGES:
        method = method_of(name, 300, {"grid": "exact"} | ({"K": 300} if name == "tk-slt" else {}))
        offer, _ = draft_of(method, 64)
        data = encode(offer, method.up, "compact")
        assert len(method.drafted(decode(data, method.up)).ids) == 64
        assert method.up.max_bytes < len(data) + 100


# ------------------------------------------------------------ vocabularies and settings


@pytest.mark.parametrize(
    ("words", "width", "void", "bits"),
    [
        (1, 2, 65535, 0),
        (2, 2, 65535, 1),
        (65535, 2, 65535, 16),
        (65536, 4, 2**32 - 1, 16),
        (65537, 4, 2**32 - 1, 17),
        (1 << 31, 4, 2**32 - 1, 31),
    ],
)
def test_ids_are_wide_enough_and_the_void_mark_is_no_word(
    words: int, width: int, void: int, bits: int
) -> None:
    ids = Ids(words)
    assert (ids.width, ids.void, ids.bits) == (width, void, bits)
    assert ids.void >= words
    kept = Kept(torch.tensor([words - 1, 0]), torch.empty(2, 0), False)
    assert ids.read("ids", ids.pack(kept)) == ([words - 1, 0], False)
    assert ids.read("ids", ids.pack(kept._replace(void=True))) == ([words - 1], True)
    with pytest.raises(WireError, match="ids"):
        ids.read("ids", torch.tensor([ids.void, 0]).to(ids.dtype))
    if words < void:
        with pytest.raises(WireError, match="ids"):
            ids.read("ids", torch.tensor([words, 0]).to(ids.dtype))


@pytest.mark.parametrize("words", [0, -3, (1 << 31) + 1])
def test_other_vocabularies_are_refused(words: int) -> None:
    with pytest.raises(InputError, match="vocab"):
        method_of("dssd", words)


@pytest.mark.parametrize("name", EDGES)
def test_the_last_word_of_65536_is_no_void_mark(name: str) -> None:
    for words in (65535, 65536):
        method = method_of(name, words)
        q = torch.zeros(1, words, dtype=torch.float64)
        q[0, words - 1] = 1.0
        zero = torch.zeros(2, dtype=torch.float64)
        offer, kept = method.offer(1, 0, torch.tensor([words - 1]), q, zero[:1])
        back = decode(encode(offer, method.up, "compact"), method.up)
        assert method.drafted(back)[1:] == ([words - 1], False)
        p = torch.cat([q, q])
        verdict = method.judge(p, back, zero, zero).verdict
        data = encode(verdict, method.down, "compact")
        told = method.settle(kept, decode(data, method.down), zero)
        assert told == (1, words - 1, "bonus")


@pytest.mark.parametrize(
    ("name", "knobs", "field"),
    [
        ("dssd", {"gamma": 65}, "settings.gamma"),
        ("dssd", {"gamma": -1}, "settings.gamma"),
        ("dssd", {"grid": "fp8"}, "settings.grid"),
        ("full-row", {"grid": 33}, "settings.grid"),
        ("full-row", {"row": "8"}, "settings.row"),
        ("tk-slt", {"K": 0}, "settings.K"),
        ("tk-slt", {"form": "both"}, "settings.form"),
        ("cloud-only", {"gamma": 2}, "settings.gamma"),
        ("device-only", {"gamma": 1}, "settings.gamma"),
        ("full-row", {"K": 2}, "settings"),
    ],
)
def test_other_settings_are_refused(name: str, knobs: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        method_of(name, V, knobs)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_settings_are_found_again_in_their_json() -> None:
    method = method_of("tk-slt", V, {"grid": 6, "K": 99})
    assert method.knobs.grid == "6"
    again = type(method).Settings.model_validate_json(method.knobs.model_dump_json())
    assert again == method.knobs
    assert method.up.tensors is not None and method.up.tensors["top"].shape == (None, V)


def test_what_each_method_says_of_itself() -> None:
    kinds = {name: catalogue.find("serving", name) for name in catalogue.names("serving")}
    traits = {
        "full-row": (True, True, False, True),
        "tk-slt": (True, True, False, True),
        "dssd": (True, True, False, True),
        "cloud-only": (False, True, True, True),
        "device-only": (True, False, False, False),
    }
    for name, wanted in traits.items():
        kind = kinds[name]
        assert (kind.drafts, kind.edge, kind.streams, kind.lossless) == wanted
        assert kind(V).knobs == kind.Settings()


# ------------------------------------------------------------ what crosses is not trusted


def edited(message: Message, **changes: Any) -> Message:
    fields = {name: changes.get(name, value) for name, value in message.fields.items()}
    tensors = {name: changes.get(name, value) for name, value in message.tensors.items()}
    return Message(message.kind, fields, tensors)


def u16(*ids: int) -> Tensor:
    return torch.tensor(ids).to(torch.uint16)


def half(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float16)


TOP = torch.tensor([[0, 3, 5], [1, 2, 4]]).to(torch.uint16)
TOPS = half(0.5, 0.25, 0.125, 0.5, 0.25, 0.125).view(2, 3)
ROWS = torch.full((2, V), 1 / 16, dtype=torch.float16)
BAD_OFFERS: list[tuple[str, dict[str, Any], str]] = [
    ("full-row", {"ids": u16(1, V)}, "ids"),
    ("full-row", {"ids": u16(65535, 1)}, "ids"),
    ("full-row", {"ids": u16(1)}, "rows"),
    ("full-row", {"ids": u16(*[0] * 65)}, "ids"),
    ("full-row", {"rows": ROWS[:1]}, "rows"),
    ("full-row", {"rows": torch.full((2, V), 0.5, dtype=torch.float16)}, "rows"),
    ("full-row", {"rows": ROWS.index_fill(1, torch.tensor([1]), 0.0)}, "rows"),
    ("full-row", {"rows": ROWS.index_fill(1, torch.tensor([5]), -0.125)}, "rows"),
    ("full-row", {"rows": ROWS.index_fill(1, torch.tensor([5]), 1.5)}, "rows"),
    ("full-row", {"rows": ROWS.index_fill(1, torch.tensor([5]), torch.nan)}, "rows"),
    ("tk-slt", {"ids": u16(V, 1)}, "ids"),
    ("tk-slt", {"ids": u16(0)}, "top"),
    ("tk-slt", {"ids": u16(0, 5)}, "s"),
    ("tk-slt", {"top": TOP[:1]}, "top"),
    ("tk-slt", {"top": u16(5, 3, 0, 4, 2, 1).view(2, 3)}, "top"),
    ("tk-slt", {"top": u16(0, 3, 3, 1, 2, 4).view(2, 3)}, "top"),
    ("tk-slt", {"top": u16(0, 3, V, 1, 2, 4).view(2, 3)}, "top"),
    ("tk-slt", {"s": TOPS[:1]}, "s"),
    ("tk-slt", {"s": -TOPS}, "s"),
    ("tk-slt", {"s": 2 * TOPS}, "s"),
    ("tk-slt", {"s": TOPS * torch.nan}, "s"),
    ("dssd", {"last": V}, "last"),
    ("dssd", {"ids": u16(1, 65534)}, "ids"),
    ("dssd", {"ids": u16(65535, 65535)}, "ids"),
    ("dssd", {"ids": u16(1, 2, 3)}, "s"),
    ("dssd", {"ids": u16(1, 65535)}, "s"),
    ("dssd", {"s": half(0.5)}, "s"),
    ("dssd", {"s": half(0.5, 0.0)}, "s"),
    ("dssd", {"s": half(0.5, 1.001)}, "s"),
    ("dssd", {"s": half(-0.5, 0.5)}, "s"),
    ("dssd", {"s": half(0.5, torch.nan)}, "s"),
]


@pytest.mark.parametrize(("name", "changes", "field"), BAD_OFFERS)
def test_an_offer_that_no_device_sends(name: str, changes: dict[str, Any], field: str) -> None:
    sound = {
        "full-row": ({"at": 7}, {"ids": u16(1, 2), "rows": ROWS}),
        "tk-slt": ({"at": 7}, {"ids": u16(0, 4), "top": TOP, "s": TOPS}),
        "dssd": ({"at": 7, "last": 3}, {"ids": u16(1, 2), "s": half(0.5, 1.0)}),
    }
    method = method_of(name, V, {"K": 3} if name == "tk-slt" else {})
    offer = Message("offer", *sound[name])
    assert len(method.drafted(offer).ids) == 2
    with pytest.raises(WireError) as caught:
        method.drafted(edited(offer, **changes))
    assert caught.value.field == field


def test_rows_of_another_width_are_no_offer() -> None:
    for name, k in (("tk-slt", 4), ("full-row", V + 1)):
        method = method_of(name, V, {"K": 3} if name == "tk-slt" else {})
        other = method_of(name, V if name == "tk-slt" else k, {"K": k} if name == "tk-slt" else {})
        data = encode(draft_of(other, 2)[0], other.up, "compact")
        with pytest.raises(WireError):
            decode(data, method.up)


NO_ROW = half()
ROW = half(*[1.0] * V)
BAD_VERDICTS: list[tuple[str, dict[str, Any], str]] = [
    ("full-row", {"accepted": 3}, "accepted"),
    ("full-row", {"token": V}, "token"),
    ("full-row", {"token": 65535}, "token"),
    ("tk-slt", {"accepted": 64}, "accepted"),
    ("tk-slt", {"token": V + 1}, "token"),
    ("cloud-only", {"token": V}, "token"),
    ("dssd", {"accepted": 3}, "accepted"),
    ("dssd", {"accepted": 2}, "row"),
    ("dssd", {"row": NO_ROW}, "row"),
    ("dssd", {"row": ROW[1:]}, "row"),
    ("dssd", {"row": 0 * ROW}, "row"),
    ("dssd", {"row": -ROW}, "row"),
    ("dssd", {"row": 1.25 * ROW}, "row"),
    ("dssd", {"row": ROW * torch.nan}, "row"),
    ("dssd", {"token": 3}, "token"),
    ("dssd", {"token": 3, "row": NO_ROW}, "token"),
    ("dssd", {"token": 3, "accepted": 2}, "token"),
    ("dssd", {"token": V, "accepted": 2, "row": NO_ROW}, "token"),
]


@pytest.mark.parametrize(("name", "changes", "field"), BAD_VERDICTS)
def test_a_verdict_that_no_edge_sends(name: str, changes: dict[str, Any], field: str) -> None:
    method = method_of(name, V)
    _, kept = draft_of(method, 0 if name == "cloud-only" else 2)
    fields, tensors = {"at": 9, "accepted": 1, "token": 4}, {}
    if name == "dssd":
        fields, tensors = {"at": 9, "accepted": 1, "token": 65535}, {"row": ROW}
    verdict = Message("verdict", fields, tensors)
    chance = torch.full((3,), 0.5, dtype=torch.float64)
    assert 0 <= method.settle(kept, verdict, chance).token < V
    with pytest.raises(WireError) as caught:
        method.settle(kept, edited(verdict, **changes), chance)
    assert caught.value.field == field


@pytest.mark.parametrize("name", EDGES)
def test_a_void_token_cannot_stand(name: str) -> None:
    method = method_of(name, V, {"grid": "3"})
    offer, kept = draft_of(method, 2, void=True)
    assert kept.void
    verdict = verdict_of(method, offer, 0.0)
    with pytest.raises(WireError, match="accepted: 2 of 1"):
        method.settle(kept, edited(verdict, accepted=2), torch.zeros(3, dtype=torch.float64))


@given(
    st.sampled_from(EDGES),
    st.sampled_from(["exact", "fp32", "fp16", "1", "5", "12"]),
    st.integers(2, 40),
    st.integers(0, 9),
    st.integers(1, 50),
    st.booleans(),
    st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_offers_and_verdicts_cross_whole(
    name: str, grid: str, words: int, g: int, k: int, void: bool, seed: int
) -> None:
    method = method_of(name, words, {"grid": grid} | ({"K": k} if name == "tk-slt" else {}))
    offer, kept = draft_of(method, g, seed, void and g > 0)
    data = encode(offer, method.up, "compact", session=3, sequence=8)
    back = decode(data, method.up)
    assert encode(back, method.up, "compact", session=3, sequence=8) == data
    drafted = method.drafted(back)
    assert drafted.ids == kept.ids.tolist()[: len(kept.ids) - kept.void]
    assert (drafted.void, back.fields["at"]) == (kept.void, 9)
    n, numbers = len(drafted.ids), torch.Generator().manual_seed(seed)
    u, v = torch.rand(2, g + 1, dtype=torch.float64, generator=numbers)
    p = rows_of(method, n + 1, seed)
    judged = method.judge(p, back, u[: n + 1], v[: n + 1])
    same = method.judge(p, offer, u[: n + 1], v[: n + 1])
    data = encode(judged.verdict, method.down, "compact")
    assert data == encode(same.verdict, method.down, "compact")
    told = method.settle(kept, decode(data, method.down), v)
    assert told.accepted == judged.accepted and judged.token in (None, told.token)
    for message in (offer, judged.verdict):
        honest = encode(message, method.up if message is offer else method.down, "compact")
        assert 0 <= method.values(message) <= len(honest)


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed behind the framing, cut off or added."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(12, len(out)) if len(out) > 12 else 0
        match rng.randrange(6):
            case 0 | 1 | 2 if at:
                out[at] = rng.choice((0, 255, 127, rng.randrange(256)))
            case 3 if at:
                out[at] ^= 1 << rng.randrange(8)
            case 4:
                del out[at : at + rng.randint(1, 3)]
            case _:
                out[at:at] = rng.randbytes(rng.randint(1, 3))
    return bytes(out)


@pytest.mark.parametrize("name", [*EDGES, "cloud-only"])
def test_10000_spoilt_messages_only_raise_wire_errors(name: str) -> None:
    """2500 of each method; what is read all the same is judged and settled within bounds."""
    rng, read = random.Random(name), 0
    for grid in ("fp16", "3"):
        knobs = {} if name == "cloud-only" else {"grid": grid}
        method = method_of(name, V, knobs | ({"K": 3} if name == "tk-slt" else {}))
        offer, kept = draft_of(method, 0 if name == "cloud-only" else 3)
        up = encode(offer, method.up, "compact", 1, 2)
        down = encode(verdict_of(method, offer, 0.8), method.down, "compact", 1, 2)
        u = torch.full((70,), 0.3, dtype=torch.float64)
        for turn in range(1250):
            try:
                if turn % 2:
                    told = method.settle(kept, decode(spoilt(down, rng), method.down), u[:4])
                    assert 0 <= told.token < V and 0 <= told.accepted <= len(kept.ids) - kept.void
                else:
                    heard = decode(spoilt(up, rng), method.up)
                    n = len(method.drafted(heard).ids)
                    judged = method.judge(rows_of(method, n + 1), heard, u[: n + 1], u[: n + 1])
                    assert 0 <= judged.accepted <= n <= 64
                read += 1
            except WireError as error:
                assert error.field and error.problem
    assert 0 < read < 2500


def rounds_of(method: Method) -> list[tuple[Draft, Tensor, Tensor, Tensor]]:
    """Drafts of 0 to 5 tokens, some with a void one, and the target's rows and chances for each;
    over all of them drafts are rejected at several places, and some stand whole."""
    found: list[tuple[Draft, Tensor, Tensor, Tensor]] = []
    for seed in range(24):
        numbers = torch.Generator().manual_seed(seed)
        g = seed % 6
        q = torch.randn(g, V, dtype=torch.float64, generator=numbers).mul(2).softmax(-1)
        u = torch.zeros(g, dtype=torch.float64)
        if g and seed % 4 == 3:
            u[seed % g] = 1 - 2.0**-53
        p = torch.randn(g + 1, V, dtype=torch.float64, generator=numbers).mul(2).softmax(-1)
        if seed % 3:
            p[:g] = q
        accept, correct = torch.rand(2, g + 1, dtype=torch.float64, generator=numbers)
        found.append((Draft(9 + seed, seed % V, q.argmax(-1), q, u), p, accept, correct))
    return found


@pytest.mark.parametrize("grid", ["fp16", "exact", "3"])
@pytest.mark.parametrize("name", EDGES)
def test_many_at_once_are_each_alone(name: str, grid: str) -> None:
    method = method_of(name, V, {"grid": grid})
    rounds = rounds_of(method)
    offers = method.offers([draft for draft, *_ in rounds])
    cases: list[Case] = []
    for (draft, p, accept, correct), (offer, kept) in zip(rounds, offers, strict=True):
        alone, own = method.offer(*draft)
        assert encode(alone, method.up, "compact") == encode(offer, method.up, "compact")
        assert kept.void == own.void and kept.ids.equal(own.ids) and kept.s.equal(own.s)
        n = len(method.drafted(offer).ids) + 1
        cases.append(Case(p[:n], offer, accept[:n], correct[:n]))
    answers = method.judges(cases)
    told: list[Told] = []
    for case, answer, (_, kept), (*_, correct) in zip(cases, answers, offers, rounds, strict=True):
        alone = method.judge(*case)
        assert alone[:2] == answer[:2]
        down = (encode(one.verdict, method.down, "compact") for one in (alone, answer))
        assert len(set(down)) == 1
        told.append(Told(kept, answer.verdict, correct))
    settled = method.settles(told)
    assert settled == [method.settle(*each) for each in told]
    assert {each.origin for each in settled} == {"target", "corrected", "bonus"}
    assert len({each.accepted for each in settled}) > 3
    assert any(kept.void for _, kept in offers) == (grid != "exact")


def test_a_hook_of_ones_own_is_asked_for_many_as_well() -> None:
    class Stern(Dssd):
        def judge(self, p: Tensor, offer: Message, accept: Tensor, correct: Tensor) -> Judged:
            return super().judge(p, offer, torch.ones_like(accept), correct)

    method = method_of(Stern, V, {})
    (draft, p, _, correct), zero = rounds_of(method)[4], torch.zeros(5, dtype=torch.float64)
    offer, _ = method.offer(*draft)
    case = Case(p * 0.5 + 0.5 / V, offer, zero, correct)
    assert method_of("dssd", V).judges([case])[0].accepted == 4
    assert method.judges([case])[0].accepted == method.judge(*case).accepted < 4
