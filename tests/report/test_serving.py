"""Serving in the report: read from files alone, added up exactly, shown escaped."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tests.report.serving_files import ALONE, DSSD, write_serving
from tests.report.test_page import Page

from isthmus import report
from isthmus.errors import InputError
from isthmus.report import RunData, chapter, race, read_all, serving
from isthmus.report.read import served


@pytest.fixture
def run(tmp_path: Path, write_run: Callable[..., Path]) -> Path:
    """A run that was served by two methods."""
    folder = write_run(tmp_path / "run", "fedmomentum", "FedMomentum")
    write_serving(folder, "device-only", ALONE, 1)
    write_serving(folder, "dssd", DSSD, 0)
    return folder


def test_the_closing_table_is_added_up_by_hand(run: Path) -> None:
    dssd, alone = serving.closing_table(served(read_all([run])))
    assert (dssd.method, dssd.texts, dssd.tokens, dssd.lossless) == ("dssd", 2, 8, True)
    assert dssd.per_second == 8 / 1.25
    assert (dssd.bytes_up, dssd.bytes_down) == (400 / 8, 1100 / 8)
    # Judged are the tokens up to the first rejection: 3 of (4, 2), 2 of (2, 2), 1 of (4, 0).
    assert (dssd.judged, dssd.accepted, dssd.acceptance) == (6, 4, 4 / 6)
    assert dssd.target_calls == 4 / 8
    assert dssd.joules == (0.5 + 0.125 + 0.25 + 0.25 + 0.75 + 0.375) / 8
    assert dssd.joules_source == "modelled"
    assert (alone.method, alone.lossless, alone.acceptance) == ("device-only", False, None)
    assert (alone.bytes_up, alone.target_calls, alone.per_second) == (0, 0, 16)


def test_the_race_counts_the_tokens_there_by_each_time(run: Path) -> None:
    dssd, alone = served(read_all([run]))
    assert serving.race(dssd) == [(0, 0), (0.25, 2), (0.5, 3.5), (0.75, 4)]
    assert serving.race(alone) == [(0, 0), (0.0625, 1), (0.125, 2)]


def test_the_charts_hold_all_tokens_and_all_bytes(run: Path) -> None:
    shown = served(read_all([run]))
    charts = race.charts(shown)
    assert set(charts) == {"race", "bytes-per-token"}
    drawn = charts["bytes-per-token"].to_dict()["datasets"].values()
    bars = next(rows for rows in drawn if "part" in rows[0])
    assert {(b["lane"], b["part"]): b["value"] for b in bars} == {
        ("up", "open"): 300 / 8,
        ("up", "offer"): 100 / 8,
        ("down", "opened"): 100 / 8,
        ("down", "verdict"): 1000 / 8,
    }
    assert "dssd 4.00 tokens in 750 ms" in charts["race"].to_dict()["description"]
    for chart in charts.values():
        assert vl_convert.vegalite_to_vega(chart.to_dict())["marks"]
    assert race.charts([]) == {}


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=9),
    st.lists(st.integers(1, 12), min_size=9, max_size=9),
)
def test_names_above_their_ends_never_cover_each_other(ends: list[float], sizes: list[int]) -> None:
    names = {chr(97 + i) * sizes[i]: end for i, end in enumerate(ends)}
    places = race._places(names, 1.0)
    total = max(48, sum(len(name) + 2 for name in names))
    spans = sorted(
        (at - (len(name) + 2) / total / 2, at + (len(name) + 2) / total / 2)
        for name, at in places.items()
    )
    assert spans[0][0] >= -1e-9 and spans[-1][1] <= 1 + 1e-9
    assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
    order = sorted(names, key=lambda name: names[name])
    assert [places[name] for name in order] == sorted(places.values())


def test_the_page_shows_every_token_with_origin_and_time(run: Path, tmp_path: Path) -> None:
    page = Page(report.write([run], tmp_path / "report.html"))
    tokens = [(a["class"], a["title"]) for tag, a in page.elements if tag == "span"]
    assert tokens == [
        ("accepted", "accepted, 250 ms"), ("accepted", "accepted, 250 ms"),
        ("corrected", "corrected, 250 ms"), ("accepted", "accepted, 500 ms"),
        ("accepted", "accepted, 500 ms"), ("bonus", "bonus, 500 ms"),
        ("device", "device, 62.5 ms"), ("device", "device, 125 ms"),
        ("corrected", "corrected, 250 ms"), ("target", "target, 750 ms"),
    ]  # fmt: skip
    spoken = "".join(text for tag, text in page.texts if tag in ("dd", "span"))
    assert spoken == " a time, indeed!? the end"
    assert page.inside("q") == ["Once upon", "Return"]
    assert {"race", "bytes-per-token"} <= {
        a["data-chart"] for _, a in page.elements if "data-chart" in a
    }
    said = "".join(page.inside("p"))
    assert "5 Mbit/s up, 20 Mbit/s down" in said and "seed 3" in said
    assert "Served two ways, a token of an answer moved: dssd 188 B, device-only 0 B." in said


def test_without_serving_the_page_says_nothing_of_it(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    folder = write_run(tmp_path / "run", "fedit")
    (folder / "serving" / "dssd").mkdir(parents=True)  # one that is being served
    (folder / "serving" / "dssd" / "ledger.jsonl").write_text('{"what": "work"}\n')
    page = Page(report.write([folder], tmp_path / "report.html"))
    assert chapter.section(read_all([folder])) is None
    assert not any(a.get("id") == "serving" or tag == "dd" for tag, a in page.elements)
    assert "Served" not in "".join(page.inside("p"))
    out = io.StringIO()
    report.terminal_serving(read_all([folder]), Console(file=out))
    assert out.getvalue() == ""


def test_what_models_and_files_say_is_inert(run: Path, tmp_path: Path) -> None:
    evil = "</script ><img src=x onerror=alert(1)>{{7*7}}\x1b[2J'\""
    answer = {"owner": evil, "prompt": evil, "seconds": 1.0, "rounds": [],
              "tokens": [(evil, "target", 1.0)]}  # fmt: skip
    write_serving(run, "cloud-only", [answer], 2, method=f"a\n{evil}", link=evil, target=evil)
    page = Page(report.write([run], tmp_path / "report.html"))
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in page.elements)
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert evil in page.inside("span") and evil in page.inside("q")
    assert f"a {evil}" in "".join(page.inside("dt"))
    out = io.StringIO()
    report.terminal_serving(read_all([run]), Console(file=out, force_terminal=True, width=200))
    assert "\x1b[2J" not in out.getvalue()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"origin": "red"}, "origin: red given"),
        ({"origin": ["accepted"]}, "origin"),
        ({"t": -1.0}, "time of -1.0"),
        ({"t": float("nan")}, "time of nan"),
        ({"t": 10**400}, "too large"),
        ({"t": "soon"}, "soon"),
    ],
)
def test_broken_answers_are_one_line_that_names_the_file(
    run: Path, change: dict[str, Any], said: str
) -> None:
    path = run / "serving" / "dssd" / "texts.jsonl"
    rows = [json.loads(line) for line in path.open()]
    rows[0]["tokens"][1] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"texts\.jsonl") as caught:
        RunData.read(run)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_more_accepted_than_drafted_is_refused(run: Path) -> None:
    path = run / "serving" / "dssd" / "texts.jsonl"
    path.write_text(path.read_text().replace('"drafted": 2', '"drafted": 1'))
    with pytest.raises(InputError, match="2 accepted of 1 drafted"):
        RunData.read(run)


@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cut=st.floats(0, 1))
def test_texts_cut_anywhere_give_their_whole_lines(run: Path, cut: float) -> None:
    path = run / "serving" / "dssd" / "texts.jsonl"
    whole = (path.with_name("whole") if path.with_name("whole").exists() else path).read_bytes()
    path.with_name("whole").write_bytes(whole)
    kept = whole[: int(cut * len(whole))]
    path.write_bytes(kept)
    data = RunData.read(run)
    tail = kept.rpartition(b"\n")[2]
    complete = tail in whole.split(b"\n")
    assert len(data.serving[0].answers) == kept.count(b"\n") + (tail != b"" and complete)
    assert data.unfinished == (not complete)


def test_methods_of_several_runs_go_by_their_runs_too(
    run: Path, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    other = write_run(tmp_path / "other", "fedit", "FedIT")
    write_serving(other, "dssd", DSSD[1:])
    shown = served(read_all([run, other]))
    assert [one.title for one in shown] == ["dssd, FedMomentum", "device-only", "dssd, FedIT"]
    talks = chapter._talks(shown)
    assert [(talk.title, [voice.name for voice in talk.voices]) for talk in talks] == [
        ("anna", ["dssd, FedMomentum", "device-only"]),
        ("ben", ["dssd, FedMomentum", "dssd, FedIT"]),
    ]
    assert [talk.folded for talk in talks] == [False, True]


def test_the_chapter_says_what_is_the_same_for_all(run: Path) -> None:
    (dssd, _) = served(read_all([run]))
    assert chapter._lead([dssd]).endswith(
        "The same for all: 2 prompts; target runs/x on edge-server; draft embedded:draft on phone; "
        "link lte (5 Mbit/s up, 20 Mbit/s down, 30 ms each way); seed 3."
    )
    both = chapter._lead(served(read_all([run])))
    assert "prompt" not in both and both.endswith("30 ms each way); seed 3.")
    write_serving(run, "tk-slt", DSSD, 2, link="wifi", seed=4, edge="server", device="laptop")
    assert chapter._lead(served(read_all([run]))).endswith("to judge a drafted token.")


def test_many_prompts_are_cut_and_the_page_says_so(run: Path) -> None:
    many = [{**DSSD[0], "prompt": f"prompt {i}"} for i in range(20)]
    write_serving(run, "full-row", many, 2)
    section = chapter.section(read_all([run]))
    assert section is not None and len(section.talks) == 12
    assert section.talks_title.endswith("the first 12 of 22 prompts")


def _printed(run: Path, **options: Any) -> list[str]:
    out = io.StringIO()
    report.terminal_serving(read_all([run]), Console(file=out, **options))
    return out.getvalue().splitlines()


def test_the_closing_table_in_words_and_as_a_table(run: Path) -> None:
    assert _printed(run, width=40) == [
        "dssd: 6.40 tokens/s; a token: 50 B up, 138 B down, 0.50 target calls, 281 mJ modelled; "
        "67% accepted, the target's law kept",
        "device-only: 16.0 tokens/s; a token: 0 B up, 0 B down, 0.00 target calls, "
        "188 mJ modelled; the target's law not kept",
    ]
    lines = _printed(run, width=80, force_terminal=True, color_system=None)
    cells = [line.split() for line in lines]
    assert ["dssd", "6.40", "50", "B", "138", "B", "67%", "0.50", "281", "mJ", "yes"] in cells
    assert ["device-only", "16.0", "0", "B", "0", "B", "–", "0.00", "188", "mJ", "no"] in cells
    whole = io.StringIO()
    report.terminal(read_all([run]), Console(file=whole))
    assert whole.getvalue().splitlines()[1:] == _printed(run)


def test_csv_holds_every_token_and_every_entry(run: Path, tmp_path: Path) -> None:
    written = report.export([run], tmp_path / "out", ("csv",))
    assert [path.stem for path in written][-3:] == ["serving", "tokens", "serving-ledger"]

    def table(name: str) -> list[dict[str, str]]:
        with (tmp_path / "out" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    assert [(row["method"], float(row["bytes_up"])) for row in table("serving")] == [
        ("dssd", 50.0), ("device-only", 0.0),
    ]  # fmt: skip
    told = table("tokens")
    assert "".join(row["text"] for row in told) == " a time, indeed the end!?"
    assert [int(row["place"]) for row in told] == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1]
    assert sum(int(row["bytes"]) for row in table("serving-ledger")) == 1500
