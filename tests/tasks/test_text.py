"""The text task: rows, labels and byte counts by hand, the metric by its formulas, real layouts."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from isthmus.errors import InputError
from isthmus.models.embedded import corpus
from isthmus.tasks.items import Batch
from isthmus.tasks.losses import IGNORE
from isthmus.tasks.text import LENGTH, PerplexityAndBits, Text, causal_mask
from isthmus.tasks.text.documents import Document


@pytest.fixture(scope="module")
def task() -> Text:
    return Text()


def ids(task: Text, text: str) -> list[int]:
    return task.tokenizer.encode(text, add_special_tokens=False)


def documents(owner: str, count: int) -> list[Document]:
    return [Document(f"The {owner} document number {i} is here.", owner) for i in range(count)]


def test_rows_join_documents_and_shift(task: Text) -> None:
    texts = documents("only", 20)
    splits = task.splits(texts, seed=3, length=16)
    end = task.tokenizer.eos_token_id
    seen = []
    for items in splits[:3]:
        tokens, labels = items.columns["tokens"], items.columns["labels"]
        assert tokens.shape[1] == 16 and items.group == ["only"] * len(items)
        counted = tokens[:, 1:] != task.tokenizer.pad_token_id
        assert torch.equal(tokens[:, 1:][counted], labels[:, :-1][counted])
        whole = [int(tokens[0, 0]), *labels[labels != IGNORE].tolist()]
        assert whole[0] == end == whole[-1]
        said = task.tokenizer.decode(whole).split("<|end|>")
        seen.append([text for text in said if text])
    assert [len(part) for part in seen] == [15, 1, 4]
    assert sorted(text for part in seen for text in part) == sorted(text.text for text in texts)
    assert seen[0] == sorted(seen[0], key=lambda t: int(t.split()[4]))  # order within a part stays
    other = task.splits(texts, seed=4, length=16)
    assert not torch.equal(other.test.columns["tokens"], splits.test.columns["tokens"])


def test_bytes_are_those_that_the_counted_tokens_spell(task: Text) -> None:
    texts = [Document(text, "a") for text in ("naïve café ☃ says hello", "plain words here")] * 10
    train = task.splits(texts, seed=0, length=9).train
    spelt = train.columns["bytes"]
    labels = train.columns["labels"]
    total = sum(
        len(task.tokenizer.decode(labels[labels != IGNORE]).replace("<|end|>", "").encode())
        for labels in [labels.flatten()]
    )
    assert int(spelt.sum()) == total
    assert len(set(spelt.tolist())) > 2


def test_only_the_response_of_an_instruction_is_learned(task: Text, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Name number {i}.", "context": "" if i % 2 else "Numbers have names.",
         "response": f"It is called {i}.", "category": "open_qa" if i < 12 else "closed_qa"}
        for i in range(24)
    ]  # fmt: skip
    (tmp_path / "dolly_4k.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    splits = task.load(tmp_path, length=48)
    assert [len(part) for part in splits[:3]] == [18, 0, 6]
    for part in splits[:3]:
        for i in range(len(part)):
            row = part[i]
            labels = row["labels"]
            said = task.tokenizer.decode(labels[labels != IGNORE])
            number = said.removesuffix("<|end|>").removeprefix("It is called ").removesuffix(".")
            n = int(number)
            assert row["group"] == rows[n]["category"]
            prompt = f"{rows[n]['instruction']}"
            if n % 2 == 0:
                prompt += "\nNumbers have names."
            told = task.tokenizer.decode(row["tokens"])
            assert told.startswith(f"<|end|>Question: {prompt}\nAnswer: It is called {n}.<|pad|>")
            assert int(row["bytes"]) == len(f"It is called {n}.")


def test_a_long_prompt_leaves_room_for_the_response(task: Text) -> None:
    texts = [Document("Yes, it is.", "a", "word " * 200 + "Answer: ")] * 8
    row = task.splits(texts, 0, 32).train[0]
    labels = row["labels"]
    assert task.tokenizer.decode(labels[labels != IGNORE]) == "Yes, it is.<|end|>"
    assert "Answer: Yes" in task.tokenizer.decode(row["tokens"])


def test_speakers_own_their_speeches(task: Text, tmp_path: Path) -> None:
    speeches = [f"{('ANNA', 'Second Guard')[i % 3 == 0]}:\nI say {i}\nand more." for i in range(40)]
    play = "\n\n".join([*speeches, "Rare One:\nOnly once."])
    (tmp_path / "tinyshakespeare.txt").write_text(play)
    splits = task.load(tmp_path, length=24)
    assert set(splits.train.group) == {"ANNA", "Second Guard"}
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text(
        "\n\n".join(f"Note {i} says so." for i in range(30))
    )
    splits = task.load(tmp_path, length=24)
    assert set(splits.train.group) == {"notes"}
    assert set(task.load(tmp_path, file="tinyshakespeare.txt").test.group) == {
        "ANNA",
        "Second Guard",
    }


def test_errors_name_what_is_missing_or_wrong(task: Text, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"text/\*\.jsonl"):
        task.load(tmp_path)
    with pytest.raises(InputError, match=r"holds text/mine\.jsonl"):
        task.load(tmp_path, file="text/mine.jsonl")
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "mine.jsonl"
    for bad in ('{"text": 3}', "[1]", "{", '{"instruction": "x"}'):
        path.write_text('{"text": "fine"}\n' + bad)
        with pytest.raises(InputError, match=r"mine\.jsonl line 2"):
            task.load(tmp_path)
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(InputError, match="UTF-8"):
        task.load(tmp_path)


def test_the_metric_is_its_formulas() -> None:
    metric = PerplexityAndBits("labels")
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([[1, 2, IGNORE, 6], [0, 0, 0, 0], [5, IGNORE, IGNORE, IGNORE]])
    targets = {"labels": labels, "bytes": torch.tensor([9, 13, 4])}
    weight = torch.tensor([1.0, 2.0, 0.0])
    values = metric.finish(metric.update(metric.init(), logits, targets, weight))
    each = -logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    nll = float(each[0, [0, 1, 3]].sum() + 2 * each[1].sum())
    assert values["loss"] == pytest.approx(nll / 11, rel=1e-12)
    assert values["perplexity"] == pytest.approx(math.exp(nll / 11), rel=1e-12)
    assert values["bits_per_byte"] == pytest.approx(nll / math.log(2) / 35, rel=1e-12)
    hits = (logits.argmax(-1) == labels).double()
    expected = float(hits[0, [0, 1, 3]].sum() + 2 * hits[1].sum()) / 11
    assert values["accuracy"] == pytest.approx(expected)


def test_the_loss_weighs_tokens(task: Text) -> None:
    model = task.build("tiny", 0)
    tokens = torch.randint(4, 2048, (2, 16), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1, 1).clone()
    labels[0, 3:] = IGNORE
    columns = {"tokens": tokens, "labels": labels, "bytes": torch.tensor([1, 1])}
    loss, _ = task.loss(model, Batch(columns, torch.ones(2)))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    torch.testing.assert_close(
        loss.detach(), F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    )


def test_nothing_is_predicted_from_the_future(task: Text) -> None:
    model = task.build("tiny", 0)
    tokens = torch.randint(4, 2048, (1, 16), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 9] += 1
    with torch.no_grad():
        a, b = (task.predict(model, {"tokens": t})[0] for t in (tokens, changed))
    assert torch.equal(a[:9], b[:9]) and not torch.allclose(a[9:], b[9:])
    mask = causal_mask(3, torch.float32, torch.device("cpu"))[0, 0]
    assert (mask == 0).tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_the_shipped_task(task: Text) -> None:
    splits = task.synthesise(0)
    assert set(splits.train.group) == set(corpus.CLIENTS) == set(splits.test.group)
    assert splits.train.columns["tokens"].shape[1] == LENGTH["small"]
    sizes = [len(part) for part in task.partition(splits.train, 8, "natural")]
    assert len(sizes) == 8 and min(sizes) > 50
    model = task.build("small", 0)
    part = splits.test.take(range(0, len(splits.test), 12))
    with torch.no_grad():
        outputs = task.predict(model, task.inputs(part.columns))
    state = task.metric.update(
        task.metric.init(), outputs, task.targets(part.columns), torch.ones(len(part))
    )
    values = task.metric.finish(state)
    assert 20 < values["perplexity"] < 110 and 1.4 < values["bits_per_byte"] < 2.4
    assert values["accuracy"] > 0.25


def test_real_texts(task: Text) -> None:
    root = os.environ.get("ISTHMUS_DATA")
    if not root or not (Path(root) / "dolly_4k.jsonl").is_file():
        pytest.skip("dolly_4k.jsonl is not in $ISTHMUS_DATA")
    splits = task.load(root, file="dolly_4k.jsonl")
    assert len(set(splits.train.group)) == 8 and len(splits.train) == 3000
    assert bool((splits.train.columns["labels"] != IGNORE).any(1).all())
