"""The embedded models, their corpus, and the loader of names."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from isthmus.errors import InputError
from isthmus.models import decode, language
from isthmus.models.bind import bind, tensors_of
from isthmus.models.embedded import corpus, prose
from isthmus.tree import stack

FOLDER = Path(language.__file__).parent / "embedded"


@pytest.fixture(scope="module")
def target() -> language.Language:
    return language.load("embedded")


@pytest.fixture(scope="module")
def draft() -> language.Language:
    return language.load("embedded:draft")


@pytest.fixture(scope="module")
def rows(target: language.Language) -> torch.Tensor:
    """Held-out text as `[n, 257]`."""
    end = target.tokenizer.eos_token_id
    encoded = [target.tokenizer.encode(t, add_special_tokens=False) for t in corpus.load().heldout]
    ids = torch.tensor([i for each in encoded for i in (end, *each)])
    return ids.unfold(0, 257, 256)[:24]


def test_the_parts_of_the_corpus_share_nothing() -> None:
    texts = corpus.load()
    parts = {
        "pretraining": texts.pretraining,
        "clients": [text for part in texts.clients.values() for text in part],
        "heldout": texts.heldout,
    }
    lines = {
        name: {corpus.normalise(x) for t in part for x in t.split("\n")}
        for name, part in parts.items()
    }
    files = {name: set() for name in parts}
    for source in corpus.sources():
        files[source.part if source.part in parts else "clients"].add(source.file)
    clients = set().union(*(corpus.shingles(text) for text in parts["clients"]))
    heldout = set().union(*(corpus.shingles(text) for text in parts["heldout"]))
    assert clients.isdisjoint(heldout)
    for text in parts["pretraining"]:
        plain = corpus.normalise(text)
        for i in range(len(plain) - corpus.OVERLAP + 1):
            run = plain[i : i + corpus.OVERLAP]
            assert run not in clients and run not in heldout, run
    for a, b in (("pretraining", "clients"), ("pretraining", "heldout"), ("clients", "heldout")):
        assert not lines[a] & lines[b] and not files[a] & files[b]
    assert sum(map(len, texts.pretraining)) > 2e6 and sum(map(len, texts.heldout)) > 5e4
    assert all(3e4 < sum(map(len, part)) < 6e4 for part in texts.clients.values())


def test_the_corpus_is_the_recorded_one() -> None:
    digest = corpus.digest(corpus.sources())
    assert digest == corpus.DIGEST
    for page in ("NOTICE.md", "MODEL_CARD.md"):
        assert digest in (FOLDER / page).read_text()
    assert all(source.part == corpus.part_of(source.file) for source in corpus.sources())
    assert corpus.FILE.stat().st_size < 1_500_000


def test_separate_removes_what_parts_share() -> None:
    shared = "Return the number of items that are in both of the given lists of numbers."
    rows = [
        corpus.Source("pretraining", "a.py", ["Only here, in the first part.\n" + shared.upper()]),
        corpus.Source("pretraining", "b.py", ["xx " + shared[:49], "yy " + shared[:50] + " zz"]),
        corpus.Source("heldout", "c.py", [shared, "Kept for later."]),
        corpus.Source("http", "http/d.py", ["Kept for  LATER.", "Border of one", "line and more."]),
        corpus.Source("pretraining", "e.py", ["Kept for later."]),
    ]
    kept = {row.file: row.documents for row in corpus.separate(rows)}
    assert kept == {
        "a.py": ["Only here, in the first part."],
        "b.py": ["xx " + shared[:49]],
        "c.py": [shared],
        "http/d.py": ["Kept for  LATER.", "Border of one", "line and more."],
    }


def test_prose_is_told_from_code() -> None:
    source = '''def read(name):
    """Open the file that is named and return what it holds.

    >>> open("x")
    <file>

    A :class:`~io.Reader` is given back to the caller::

        code = that(is, left) + out

    name    default   what this table says in its third wide column of words
    size    12        and another row of the very same table

    * the first of the points that are listed here is about ``names``
    * the second point is about something else that the reader wants
    """
    # This comment says in two full lines why the code that
    # follows does what it does, and it is kept as one document.
    x = 1  # a comment behind code is never kept, however long it may be

    # Copyright 1999 of somebody who has all the rights of this and that.
    # Permission is granted to do what you like with it, as they say.
'''
    assert prose.documents(source) == [
        "Open the file that is named and return what it holds.\n"
        "A io.Reader is given back to the caller:\n"
        "- the first of the points that are listed here is about names\n"
        "- the second point is about something else that the reader wants",
        "This comment says in two full lines why the code that follows does what it does, "
        "and it is kept as one document.",
    ]


def test_files_are_small_and_name_no_machine() -> None:
    total = 0
    for part in ("target", "draft"):
        for path in (FOLDER / part).iterdir():
            total += path.stat().st_size
            if path.suffix == ".json":
                text = path.read_text()
                json.loads(text)
                assert not re.search(r"/(?:home|tmp|root|work|Users)/|_name_or_path", text)
    assert total < 7_600_000
    assert (FOLDER / "target/tokenizer.json").read_bytes() == (
        FOLDER / "draft/tokenizer.json"
    ).read_bytes()


def test_shapes_and_dtypes(target: language.Language, draft: language.Language) -> None:
    count = [sum(p.numel() for p in m.model.parameters()) for m in (target, draft)]
    assert count == [3_049_920, 541_312]
    assert not target.model.training and target.context == 512 and target.stop == (1,)
    assert {p.dtype for p in target.model.parameters()} == {torch.float32}
    half = language.load("embedded:draft", torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_text_survives_the_tokenizer(target: language.Language) -> None:
    for text in ("Return the sum.", "naïve ☃\tof  two\nlines", ""):
        ids = target.encode(text)
        assert int(ids[0]) == target.tokenizer.bos_token_id == 1
        assert target.decode(ids) == text
    assert len(target.encode(corpus.load().heldout[0])) < len(corpus.load().heldout[0]) / 2.5


@torch.no_grad()
def test_losses_are_those_of_trained_models(
    target: language.Language, draft: language.Language, rows: torch.Tensor
) -> None:
    def loss(model: language.Language, inputs: torch.Tensor, labels: torch.Tensor) -> float:
        logits = model.model(input_ids=inputs).logits
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    inputs, labels = rows[:, :-1], rows[:, 1:]
    order = torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(0))
    large, small = loss(target, inputs, labels), loss(draft, inputs, labels)
    assert large < small < 4.4 < math.log(2048) - 3
    assert large < 4.1
    assert loss(target, inputs, labels.flatten()[order].view_as(labels)) > large + 3


@torch.no_grad()
def test_the_draft_is_accepted(
    target: language.Language, draft: language.Language, rows: torch.Tensor
) -> None:
    p, q = (m.model(input_ids=rows[:, :-1]).logits.softmax(-1) for m in (target, draft))
    assert float(torch.minimum(p, q).sum(-1).mean()) > 0.6
    uniform = torch.full_like(p[..., :1], 1 / 2048)
    assert float(torch.minimum(p, uniform).sum(-1).mean()) < 0.2


def test_vmap_over_clients_equals_each_client(draft: language.Language, rows: torch.Tensor) -> None:
    """A stack of clients' weights, with the 4-D mask handed in, gives each client's gradients."""
    own = tensors_of(draft.model)
    clients = [{n: x * (1 + 0.02 * i) for n, x in own.items()} for i in range(3)]
    tokens = rows[:6, :33].reshape(3, 2, 33)
    mask = torch.full((32, 32), torch.finfo(torch.float32).min).triu(1)[None, None]

    def loss(tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        model = bind(draft.model, tensors)
        logits = model(input_ids=ids[:, :-1], attention_mask=mask, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    together = torch.vmap(torch.func.grad(loss))(stack(clients), tokens)
    name = "model.layers.0.self_attn.k_proj.weight"
    for i in range(3):
        alone = torch.func.grad(loss)(clients[i], tokens[i])
        torch.testing.assert_close(together[name][i], alone[name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(together[name][0], together[name][1])
    with torch.no_grad():
        masked = draft.model(input_ids=tokens[0, :, :-1], attention_mask=mask).logits
        torch.testing.assert_close(masked, draft.model(input_ids=tokens[0, :, :-1]).logits)


def test_dropout_is_gone(tmp_path: Path, target: language.Language) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=2048, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    model = language.load(tmp_path).model.train()
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("embedded:drat", "nearest: embedded:draft"),
        ("./nowhere", "a folder that exists"),
        ("a/b/c", "a folder that exists"),
    ],
)
def test_unknown_names(name: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        language.load(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="Hugging Face layout"):
        language.load(tmp_path)


def test_an_id_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kw: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.model_info", fail)
    with pytest.raises(InputError, match=r"some/model given.*can be reached") as caught:
        language.load("some/model")
    assert "\n" not in str(caught.value)


def test_embedded_greedy_equals_generate(target: language.Language) -> None:
    prompts = [target.encode(text) for text in ("Return the", "Raise an error if the given value")]
    batch, real = decode.pad(prompts)
    expected = target.model.generate(
        input_ids=batch, attention_mask=real.long(), max_new_tokens=24, do_sample=False
    )
    assert torch.equal(decode.generate(target.model, prompts, 24, decode.Law(0.0)), expected)
