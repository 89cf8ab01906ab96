"""The HTML file: policy, escaping, size, nothing from a network."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import example_runs as example
import pytest
from plotly.offline import get_plotlyjs_version

from actsparse.report.bundle import VERSION, plotly_js, unwrapped
from actsparse.report.page import embedded, render
from actsparse.report.view import ReportView, build_view
from actsparse.specs import ReportSpec


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._open: dict[str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self._open = dict(attrs)
            self.scripts.append((self._open, ""))

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._open = None


@pytest.fixture(scope="module")
def html(view: ReportView) -> str:
    return render(view)


@pytest.fixture(scope="module")
def hostile_html(hostile: tuple[Path, ...]) -> str:
    return render(build_view(ReportSpec(runs=hostile)))


def policy_of(elements: Elements) -> str:
    return next(
        str(attrs["content"])
        for tag, attrs in elements.found
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    )


def test_the_policy_allows_the_pages_own_scripts_by_hash_and_no_network(html: str) -> None:
    elements = Elements(html)
    policy = policy_of(elements)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    executed = [text for attrs, text in elements.scripts if "type" not in attrs]
    assert len(executed) == 2
    for script in executed:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.count("sha256-") == 2


def test_no_element_loads_anything(html: str) -> None:
    for tag, attrs in Elements(html).found:
        assert "src" not in attrs, (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        if "href" in attrs:
            assert str(attrs["href"]).startswith("#")


def test_plotly_is_inside_compressed(html: str) -> None:
    text = next(text for attrs, text in Elements(html).scripts if attrs.get("id") == "plotly")
    assert f"plotly.js (cartesian - minified) v{VERSION}".encode() in gzip.decompress(base64.b64decode(text))[:200]


def test_the_shipped_plotly_fits_the_package_that_draws() -> None:
    assert get_plotlyjs_version() == VERSION
    assert unwrapped(plotly_js()) != plotly_js()
    assert unwrapped("(() => 1)()") == "(() => 1)()"


def test_no_figure_uses_webgl(html: str) -> None:
    kinds = set()
    for attrs, text in Elements(html).scripts:
        if str(attrs.get("id", "")).startswith("data-"):
            kinds |= {trace["type"] for trace in json.loads(text)["data"]}
    assert kinds == {"scatter", "bar", "heatmap"}


def test_every_figure_has_titled_axes_a_caption_help_and_csv(html: str) -> None:
    elements = Elements(html)
    figures = [attrs["data-figure"] for tag, attrs in elements.found if "data-figure" in attrs]
    assert len(figures) >= 20
    for kind in ("data-csv-figure", "data-numbers", "data-svg-figure"):
        assert [attrs[kind] for _, attrs in elements.found if kind in attrs] == figures
    labels = [str(attrs["aria-label"]) for _, attrs in elements.found if "data-figure" in attrs]
    assert all(re.search(r"\. .+\.$", label, re.DOTALL) for label in labels)
    for attrs, text in elements.scripts:
        if str(attrs.get("id", "")).startswith("data-"):
            layout = json.loads(text)["layout"]
            assert layout["xaxis"]["title"]["text"]
            assert layout["yaxis"]["title"]["text"] or layout["yaxis"]["type"] == "category"


def test_size(html: str, tmp_path: Path) -> None:
    assert len(html.encode()) < 2_000_000
    from dataclasses import replace

    big = replace(example.SMOLLM2, layers=80, heads=64, kv_heads=8, intermediate_size=1000, weights_sha256="80" * 32)
    runs = (example.profile_run(tmp_path / "p", model=big), example.eval_run(tmp_path / "e", model=big))
    assert len(render(build_view(ReportSpec(runs=runs))).encode()) < 6_000_000


def test_hostile_text_makes_no_element(html: str, hostile_html: str) -> None:
    tags = {tag for tag, _ in Elements(html).found}
    found = Elements(hostile_html)
    assert {tag for tag, _ in found.found} <= tags | {"ins", "label", "select", "option"}
    assert "img" not in {tag for tag, _ in found.found}
    assert not any("onerror" in attrs for _, attrs in found.found)
    assert "&lt;/script&gt;&lt;img" in hostile_html


def test_hostile_text_stays_inside_its_json(hostile_html: str) -> None:
    data = [(attrs, text) for attrs, text in Elements(hostile_html).scripts if attrs.get("type") == "application/json"]
    assert len(data) > 10
    for _, text in data:
        assert "<" not in text
        json.loads(text)


def test_no_control_character_reaches_the_page(hostile_html: str) -> None:
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", hostile_html)


def test_embedded_json_has_no_markup_and_no_nan() -> None:
    text = embedded({"a": "</script><!--", "b": [float("nan"), float("inf"), 1.5], "c": "\u2028"})
    assert json.loads(text) == {"a": "</script><!--", "b": [None, None, 1.5], "c": "\u2028"}
    assert not set("<>&\u2028") & set(text)


def test_the_same_runs_make_the_same_page(runs: tuple[Path, ...]) -> None:
    spec = ReportSpec(runs=runs)
    made = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC")
    assert made.sub("", render(build_view(spec))) == made.sub("", render(build_view(spec)))
