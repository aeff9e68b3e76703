"""The page: sections, styles, charts and their scripts put into one file that opens offline.

All text is escaped by the template. The page's policy lets it load nothing and run only its own
scripts, named by their hash, so even text that slipped through would stay inert.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from isthmus.errors import need
from isthmus.report import story, theme
from isthmus.report.parts import Section
from isthmus.report.read import RunData, read_all
from isthmus.report.sections import SECTIONS


def write(folders: Sequence[Path | str], out: Path | str, title: str | None = None) -> Path:
    """Write the report of `folders` to the file `out` and return its path.

    InputError for a folder that is not a run; MissingExtra without the extra `report`.
    """
    runs = read_all(folders)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html(runs, title or story.heading(runs)), encoding="utf-8")
    return out


def html(runs: Sequence[RunData], title: str) -> str:
    """The whole page as text."""
    sections = [section for make in SECTIONS if (section := make(runs))]
    return page(title, story.summary(runs), story.notes(runs), sections)


def page(title: str, summary: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """A page of these sections as text: heading, a line of summary, notes below it."""
    jinja2 = need("jinja2", "report")
    charts = {figure.slug: figure.spec for part in sections for figure in part.figures}
    scripts = [_bundle(), _asset("page.js")] if charts else [_asset("page.js")]
    safe = jinja2.utils.markupsafe.Markup
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        _asset("page.html")
    )
    style = f"{theme.css()}\n:root{{--font:{theme.FONT}}}\n{_asset('page.css')}"
    return template.render(
        title=title,
        summary=summary,
        notes=notes,
        sections=sections,
        charts=safe(_inert({"config": theme.CONFIG, "charts": charts})),
        scripts=[safe(script) for script in scripts],
        style=safe(style),
        policy=_policy(scripts),
    )


def _inert(value: Any) -> str:
    """JSON that cannot end its script element: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is loaded, and only these scripts run."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{code}'" for code in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, in the version that the charts speak."""
    altair, convert = need("altair", "report"), need("vl_convert", "report")
    major, minor = altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2]
    offered: list[str] = convert.get_vegalite_versions()
    version = f"{major}.{minor}"
    bundle: str = convert.javascript_bundle(
        vl_version=version if version in offered else offered[-1]
    )
    return bundle.replace("\r", "").replace("</script", "<\\/script").replace("<!--", "<\\!--")


@cache
def _asset(name: str) -> str:
    return (resources.files("isthmus.report") / "assets" / name).read_text(encoding="utf-8")
