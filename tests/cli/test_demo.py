"""The demo's second act: a tuned model is served, kept, told and shown."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from isthmus import report
from isthmus.cli import demo
from isthmus.errors import InputError
from isthmus.models import language
from isthmus.run import api
from isthmus.run.config import Config
from isthmus.tasks import own


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Act one in small: one step of the smallest model."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    given = {**demo.TUNED, "model": "tiny", "rounds": 1, "steps": 1, "batch": 1}
    api.start(Config.make(given | {"evaluate_items": 1, "method": "fedit"}), folder)
    return folder


def test_act_two(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TOKENS", 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that the number of threads stays as it is
    out = io.StringIO()
    demo._serve(Console(file=out), tuned, own.find("text", language="embedded"), seed=0)
    progress = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in progress] == list(demo.SERVED)
    assert all(": 40 tokens, " in line for line in progress)
    (run,) = report.read_all([tuned])
    assert [one.method for one in run.serving] == list(demo.SERVED)
    assert [one.lossless for one in run.serving] == [True, True, True, True, False]
    asked = [[(a.owner, a.prompt) for a in one.answers] for one in run.serving]
    assert asked == asked[:1] * 5 and len(set(asked[0])) == 8
    said = " ".join(out.getvalue().split())
    assert "lte (5 Mbit/s up, 20 Mbit/s down, 30 ms each way)" in said
    assert all(f" {method}: " in said for method in demo.SERVED)


def test_prompts_are_the_beginnings_of_unseen_documents() -> None:
    target = language.load("embedded")
    task = own.find("text", language="embedded")
    prompts = demo._prompts(task, target, seed=1)
    splits = task.synthesise(1)
    assert [prompt.owner for prompt in prompts] == sorted(set(splits.test.group))
    special = set(target.tokenizer.all_special_ids)
    for owner, ids in ((prompt.owner, list(prompt.ids)) for prompt in prompts):
        assert len(ids) == demo.PROMPT and ids[0] == target.tokenizer.eos_token_id
        assert not special & set(ids[1:])
        own_text = [
            row
            for row, group in zip(
                splits.test.columns["tokens"].tolist(), splits.test.group, strict=True
            )
            if group == owner
        ]
        assert any(ids == row[i : i + len(ids)] for row in own_text for i in range(len(row)))


def test_the_folder_is_the_given_one_or_the_first_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo._free(None) == Path("runs/demo")
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo-2").mkdir()
    assert demo._free(None) == Path("runs/demo-3")
    assert demo._free(Path("runs/demo")) == Path("runs/demo")
    Path("runs/demo/file").write_text("")
    with pytest.raises(InputError, match="new or empty"):
        demo._free(Path("runs/demo"))
