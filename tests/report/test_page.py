from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from isthmus import report
from isthmus.cli.report import command
from isthmus.errors import InputError, MissingExtra
from isthmus.report import closing_table, read_all, units

VOID = {"meta", "link", "br", "img", "input", "hr"}
LOADS = {"src", "href", "srcset", "action", "formaction", "poster", "data", "xlink:href", "ping"}


class Page(HTMLParser):
    """The elements of a page; every element must be closed, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def inside(self, tag: str) -> list[str]:
        return [text for owner, text in self.texts if owner == tag]

    @property
    def policy(self) -> str:
        metas = (attrs for tag, attrs in self.elements if tag == "meta")
        return next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, three_once: list[Path]) -> Path:
    out = tmp_path_factory.mktemp("page") / "new" / "report.html"
    return report.write(three_once, out, "Three ways")


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written)


def test_the_page_is_one_file_that_loads_nothing(page: Page, written: Path) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base")
        for name in LOADS & set(attributes):
            assert attributes[name] == "data:,"
        assert not any(name.startswith("on") for name in attributes)
    for style in [*page.inside("style"), *(a.get("style", "") for _, a in page.elements)]:
        assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page.policy
    assert not re.search(r"\bimport\s*\(", "".join(page.inside("script")))
    assert written.stat().st_size < 3_000_000


def test_only_the_scripts_of_the_page_may_run(page: Page) -> None:
    scripts = page.inside("script")
    assert len(scripts) == 3 == sum(tag == "script" for tag, _ in page.elements)
    allowed = set(re.findall(r"'sha256-([^']+)'", page.policy))
    assert "unsafe-eval" not in page.policy
    assert allowed == {
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts[1:]
    }
    charts = json.loads(scripts[0])["charts"]
    drawn = [a["data-chart"] for _, a in page.elements if "data-chart" in a]
    assert sorted(drawn) == sorted(charts) and len(drawn) == 7
    labels = [a["aria-label"] for _, a in page.elements if "data-chart" in a]
    assert all("FedIT" in label for label in labels)


def test_the_table_of_the_page_is_the_closing_table(page: Page, three_once: list[Path]) -> None:
    cells = [(t.strip()) for t in page.inside("td") if t.strip()]
    titles = {attrs["title"] for tag, attrs in page.elements if tag == "td" and "title" in attrs}
    for row in closing_table(read_all(three_once)):
        assert row.after is not None and row.worst is not None
        for value in (units.number(row.after), units.bytes_text(row.bytes_up)):
            assert value in cells
        assert units.exact(row.joules, "joules modelled") in titles
        assert units.exact(row.worst) in titles
        assert any(t.startswith(units.exact(row.bytes_down, "bytes")) for t in titles)
    assert page.inside("small").count("modelled") == 3


def test_text_from_files_is_inert(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    evil = "</script ><script >alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"
    folder = write_run(tmp_path / "run", "fedit", evil)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("client/anna", "client/" + json.dumps(evil)[1:-1]))
    (folder / "environment.json").write_text(json.dumps({evil: evil, "command": evil}))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config + f"# {evil}\n")
    page = Page(report.write([folder], tmp_path / "report.html"))
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert not set("<>&") & set(page.inside("script")[0])
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in page.elements)
    assert evil in "".join(page.inside("h1")) and evil in "".join(page.inside("pre"))
    assert "49" not in "".join(page.inside("h1"))
    assert evil in json.dumps(json.loads(page.inside("script")[0]), ensure_ascii=False).replace(
        '\\"', '"'
    )


def test_a_run_that_is_still_writing(three: list[Path], tmp_path: Path) -> None:
    whole = closing_table(read_all(three[:1]))[0]
    path = three[0] / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-25])
    page = Page(report.write(three, tmp_path / "report.html"))
    assert "Still being written" in "".join(page.inside("p"))
    assert closing_table(read_all(three[:1]))[0].bytes_up == whole.bytes_up
    assert closing_table(read_all(three[:1]))[0].joules == pytest.approx(whole.joules - 3.4)


def test_an_empty_run_and_one_run(three: list[Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("")
    page = Page(report.write([empty], tmp_path / "empty.html"))
    assert "no rounds yet" in "".join(page.inside("p"))
    assert not any("data-chart" in attrs for _, attrs in page.elements)
    both = Page(report.write([empty, three[1]], tmp_path / "both.html"))
    assert "empty has no result yet" in "".join(both.inside("p"))
    one = Page(report.write(three[1:2], tmp_path / "one.html"))
    assert one.inside("h1") == ["FedIT"]
    said = "".join(one.inside("p"))
    assert "One run: eight devices, five rounds." in said and "from 60.8 to 52.5" in said


def test_without_the_extra_the_terminal_still_works(
    three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("page", "sections", "figures", "marks"):
        monkeypatch.delitem(sys.modules, f"isthmus.report.{name}", raising=False)
        monkeypatch.delattr(f"isthmus.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingExtra, match=r"isthmus\[report\]"):
        report.write(three, three[0] / "report.html")
    assert len(closing_table(read_all(three))) == 3


def _printed(three: list[Path], **options: object) -> str:
    out = io.StringIO()
    report.terminal(read_all(three), Console(file=out, **options))  # type: ignore[arg-type]
    return out.getvalue()


def test_elsewhere_than_on_a_terminal_one_plain_line_a_run(three: list[Path]) -> None:
    text = _printed(three, width=40)
    assert "\x1b" not in text and len(text.splitlines()) == 3
    for line, row in zip(text.splitlines(), closing_table(read_all(three)), strict=True):
        assert line.startswith(f"{row.run}: perplexity {units.number(row.before)} -> ")
        assert f"{units.bytes_text(row.bytes_up)} up" in line
        assert line.endswith(f"{units.joules_text(row.joules)} modelled")


def test_the_table_on_a_terminal_and_titles_that_would_steer_it(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    folder = write_run(tmp_path / "run", "fedit", "[red]loud[/red]\x1b[2J")
    text = _printed([folder], force_terminal=True, width=120, color_system=None)
    assert "[red]loud[/red]\ufffd[2J" in text and "\x1b[2J" not in text
    assert "60.8 -> 52.5" in text and "5.27 MB" in text and "energy (modelled)" in text


def test_the_verb(three: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(three[:1], export=three[0] / "paper", formats=("csv",)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("FedMomentum: perplexity 60.8 -> 48.4")
    assert [Path(line).name for line in said[1:]] == [
        "report.html", "closing.csv", "devices.csv", "metrics.csv", "ledger.csv",
    ]  # fmt: skip
    assert all(Path(line).is_file() for line in said[1:])
    with pytest.raises(InputError, match="run folder"):
        command([three[0] / "paper"])
