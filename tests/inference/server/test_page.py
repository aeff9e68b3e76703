"""The page: it loads nothing, every eye can tell its colours apart, and it works in Chromium."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from tests.inference.server.served import served

from isthmus.inference.server.page import about, page
from isthmus.inference.server.service import Service
from isthmus.models.language import Language

ORIGINS = ("accepted", "corrected", "bonus", "target", "device")
TOKEN = "sixteen-or-more-signs"


# ------------------------------------------------------------------ as a file


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_is_one_file_that_loads_nothing_and_runs_only_its_script() -> None:
    html, policy = page()
    tags = Tags(html).seen
    loads = {"src", "srcset", "href", "action", "data", "poster", "formaction", "ping"}
    assert [a["href"] for _, a in tags if loads & set(a)] == ["data:,"]  # the absent icon
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    code = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{code}'" in policy and "default-src 'none'" in policy
    assert "connect-src 'self'" in policy and "unsafe-eval" not in policy
    assert "innerHTML" not in script and "/*s" not in html
    assert {a["data-origin"] for _, a in tags if "data-origin" in a} == set(ORIGINS)
    labelled = {a["for"] for tag, a in tags if tag == "label" and "for" in a}
    assert {"text", "token"} <= labelled


def test_what_the_page_offers(service: Service) -> None:
    told = about(service)
    assert [one["name"] for one in told["methods"]] == list(service.methods)
    assert {one["name"]: one["gamma"] for one in told["methods"]}.items() >= {
        "cloud-only": None, "device-only": None, "dssd": 4,
    }.items()  # fmt: skip
    assert all(one["told"] for one in told["methods"] + told["links"])
    assert told["method"] == "dssd" and told["link"] == told["links"][0]["name"] == "wifi"


def _schemes() -> list[dict[str, str]]:
    style = page()[0].partition("<style>")[2].partition("</style>")[0]
    blocks = re.findall(r":root\{color-scheme:(\w+);(.*?)\}", style, re.S)
    assert [name for name, _ in blocks] == ["light", "dark"]
    return [dict(re.findall(r"--([\w-]+):\s*(#\w{6})", block)) for _, block in blocks]


# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", IEEE TVCG 2009: full protanopia, deuteranopia, tritanopia, in linear sRGB.
SEEN_BY = {
    "all cones": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def _linear(colour: str) -> Any:
    part = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def _lab(linear: Any) -> Any:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ linear.clip(0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _contrast(a: str, b: str) -> float:
    low, high = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ _linear(c)) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", _schemes(), ids=["light", "dark"])
def test_colours_are_legible_and_keep_apart_for_every_eye(colours: dict[str, str]) -> None:
    paper = colours["paper"]
    for name in (*ORIGINS, "ink", "quiet", "link"):
        assert _contrast(colours[name], paper) >= 4.5, name
    assert _contrast(colours["on-link"], colours["link"]) >= 4.5
    for name in ("edge", "up", "down"):  # borders of fields, bars
        assert _contrast(colours[name], paper) >= 3, name
    for seen in SEEN_BY.values():
        labs = [_lab(np.array(seen) @ _linear(colours[name])) for name in ORIGINS]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)) > 20


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: Playwright's own, else the system's."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = own if os.path.exists(own) else shutil.which("chromium")
        if not found:
            pytest.skip("no Chromium: apt install chromium, or playwright install chromium")
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, address: str, **settings: Any) -> Iterator[Any]:
    """The page; afterwards, that it said nothing to the console and asked nobody else."""
    context = browser.new_context(**settings)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_default_timeout(8_000)
    tab.goto(address)
    yield tab
    assert said == [] and asked
    assert all(url.startswith((address, "data:")) for url in asked), asked
    context.close()


def fits(tab: Any) -> bool:
    wide, width = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    return wide <= width


def settings(tab: Any) -> Any:
    """The form of settings, unfolded where it is folded."""
    if not tab.locator("#form").is_visible():
        tab.click("#settings summary")
    return tab.locator("#form")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 860), (380, 760)], ids=["wide", "narrow"])
def test_a_talk(browser: Any, address: str, scheme: Any, size: tuple[int, int]) -> None:
    viewport = {"width": size[0], "height": size[1]}
    colours = dict(zip(["light", "dark"], _schemes(), strict=True))[scheme]
    with opened(browser, address, viewport=viewport, color_scheme=scheme) as tab:
        tab.wait_for_selector("#examples button")
        assert tab.inner_text("h1") == "embedded" and fits(tab)
        assert tab.locator("#form").is_visible() == (size[0] > 899)
        assert tab.inner_text("#up") == "–"

        tab.type("#text", "If the file")
        tab.press("#text", "Enter")
        tab.locator(".note").first.wait_for()
        spans = tab.locator(".told span")
        kinds = {spans.nth(i).get_attribute("class") for i in range(spans.count())}
        assert kinds >= {"accepted"} and kinds <= {"accepted", "corrected", "bonus", "target"}
        for kind in kinds:
            shown = tab.locator(f".told .{kind}").first.evaluate("e => getComputedStyle(e).color")
            wanted = tuple(int(colours[kind][i : i + 2], 16) for i in (1, 3, 5))
            assert tuple(map(int, re.findall(r"\d+", shown))) == wanted
        counts = [int(tab.inner_text(f"[data-origin={name}] b")) for name in ORIGINS]
        note = tab.inner_text(".note")
        assert f"dssd over wifi, seed 0: {sum(counts)} tokens" in note and counts[0] > 0
        for figure in ("up", "down", "accepted", "virtual", "real", "joules"):
            assert re.search(r"\d", tab.inner_text(f"#{figure}")), figure
        # A round ends with a token of the edge, but for the last one, which the text may end in.
        assert tab.locator("#trace rect").count() - 2 * sum(counts[1:4]) in (0, 2)
        assert fits(tab)

        form = settings(tab)
        assert fits(tab)
        form.locator("#method").select_option("cloud-only")
        form.locator("#link").select_option("3g")
        form.locator("#seed").fill("1")
        assert form.locator("#gamma").is_disabled()
        assert "60 ms" in tab.inner_text("#link-told")
        tab.fill("#text", "This function")
        tab.click("#send")
        tab.locator(".note").nth(1).wait_for()
        assert "cloud-only over 3g, seed 1" in tab.inner_text(".note >> nth=1")
        second = tab.locator(".turn").nth(1).locator(".told span")
        assert {second.nth(i).get_attribute("class") for i in range(second.count())} == {"target"}
        assert int(tab.inner_text("[data-origin=target] b")) >= second.count() > 0
        assert tab.inner_text("#accepted") == "–" and fits(tab)

        tab.click("[data-origin=accepted]")
        assert tab.get_attribute("[data-origin=accepted]", "aria-pressed") == "true"
        assert tab.locator(".told .target").first.evaluate("e => getComputedStyle(e).opacity") < "1"
        box = tab.locator("#send").bounding_box()
        assert box["y"] + box["height"] <= size[1]
        tab.click("#clear")
        assert tab.locator(".turn").count() == 0 and tab.inner_text("#up") == "–"


def test_keys_stop_and_the_links_pace(browser: Any, address: str) -> None:
    with opened(browser, address, viewport={"width": 1000, "height": 700}) as tab:
        tab.wait_for_selector("#examples button")
        assert tab.evaluate("document.activeElement.id") == "text"
        tab.keyboard.press("Enter")  # nothing is written yet
        assert tab.locator(".turn").count() == 0
        tab.keyboard.type("one")
        tab.keyboard.press("Shift+Enter")
        assert tab.input_value("#text") == "one\n"
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.id") == "send"
        tab.select_option("#link", "lora")  # about a second a round: the pace can be seen
        tab.select_option("#method", "tk-slt")
        tab.fill("#text", "If the file")
        tab.press("#text", "Enter")
        tab.locator(".told span").first.wait_for()
        assert tab.inner_text("#send") in ("Stop", "Show all")
        tab.wait_for_selector("#send:text('Show all')")
        early = tab.locator(".told span").count()
        tab.keyboard.press("Escape")
        tab.locator(".note").wait_for()
        assert tab.locator(".told span").count() > early
        assert tab.inner_text("#send") == "Send"
        tab.fill("#temperature", "9")
        tab.fill("#text", "x")
        tab.press("#text", "Enter")
        assert tab.locator(".turn").count() == 1  # the field says what it takes
        assert tab.evaluate("document.activeElement.id") == "temperature"


def test_the_page_asks_for_the_token_and_tells_errors(
    browser: Any, pair: tuple[Language, Language]
) -> None:
    from isthmus.inference.server.app import make_app

    service = Service(*pair, at_once=1)
    with served(make_app(service, TOKEN)) as address:
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(address)
        for given in ("wrong", TOKEN):
            tab.wait_for_selector("dialog[open]")
            tab.fill("#token", given)
            tab.press("#token", "Enter")
        tab.wait_for_selector("#examples button")
        assert tab.locator("dialog[open]").count() == 0
        service.judging.memory.extend = lambda *args: 1 / 0  # type: ignore[method-assign]
        tab.click("#examples button >> nth=0")
        assert "defect" in tab.locator(".wrong").inner_text()
        assert tab.inner_text("#send") == "Send"
        context.close()
