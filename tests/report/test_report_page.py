"""The HTML file: policy, escaping, size, nothing from a network."""

import base64
import gzip
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import example_runs as example
import numpy as np
import plotly.graph_objects as go
import pytest
from example_evals import ExamplePlan
from plotly.offline import get_plotlyjs_version

from actsparse.errors import ActsparseError
from actsparse.report.bundle import VERSION, plotly_js, unwrapped
from actsparse.report.economy import Economy, array_of
from actsparse.report.page import LARGEST, drawings_of, fitted, render
from actsparse.report.payloads import embedded, unpacked
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


def figures_of(html: str) -> dict[str, dict[str, Any]]:
    """The figures that a page carries, by name."""
    return unpacked(next(text for attrs, text in Elements(html).scripts if attrs.get("id") == "figures"))


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
    kinds = {trace["type"] for figure in figures_of(html).values() for trace in figure["data"]}
    assert kinds == {"scatter", "bar", "heatmap"}


def test_every_figure_has_titled_axes_a_caption_help_and_csv(html: str) -> None:
    elements = Elements(html)
    figures = [attrs["data-figure"] for tag, attrs in elements.found if "data-figure" in attrs]
    assert len(figures) >= 20
    for kind in ("data-csv-figure", "data-numbers", "data-svg-figure"):
        assert [attrs[kind] for _, attrs in elements.found if kind in attrs] == figures
    labels = [str(attrs["aria-label"]) for _, attrs in elements.found if "data-figure" in attrs]
    assert all(re.search(r"\. .+\.$", label, re.DOTALL) for label in labels)
    carried = figures_of(html)
    assert list(carried) == figures
    for one in carried.values():
        layout = one["layout"]
        assert layout["xaxis"]["title"]["text"]
        assert layout["yaxis"]["title"]["text"] or layout["yaxis"]["type"] == "category"
        assert one["rows"] == len(next(iter(one["columns"].values())))


def test_size(html: str) -> None:
    assert len(html.encode()) < 2_000_000


@pytest.fixture(scope="module")
def ten_large(tmp_path_factory: pytest.TempPathFactory) -> ReportView:
    """Five profiles and five evaluations of models with 80 layers and 64 heads, long prompts, 12 plans each."""
    root = tmp_path_factory.mktemp("large")
    plans = tuple(
        ExamplePlan(plan=f"{name}@{amount / 10:g}", ppl=22.0 + amount, speed=1 + amount / 20)
        for name in ("griffin", "cats", "teal", "wina")
        for amount in (2, 4, 5)
    )
    model = replace(example.SMOLLM2, layers=80, heads=64, kv_heads=8, intermediate_size=200)
    first = (
        example.profile_run(root / "p0", model=model),
        example.eval_run(root / "e0", model=model, plans=plans, prompt="a long prompt " * 500),
    )
    return build_view(ReportSpec(runs=first + tuple(_other(run, place) for place in range(1, 5) for run in first)))


def _other(run: Path, place: int) -> Path:
    """The same run of another model."""
    path = run.with_name(f"{run.name[0]}{place}")
    shutil.copytree(run, path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model"] |= {"resolved": f"large/model-{place}", "weights_sha256": f"{place:064d}"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture(scope="module")
def drawings(ten_large: ReportView) -> dict[str, Any]:
    return drawings_of(ten_large)


def test_ten_large_runs_stay_under_six_megabytes(ten_large: ReportView, drawings: dict[str, Any]) -> None:
    html = fitted(ten_large, drawings, LARGEST)
    assert len(html.encode()) < 6_000_000
    assert "more than one page should" not in html
    assert list(figures_of(html)) == [figure.id for figure in ten_large.figures]


def test_what_does_not_fit_is_left_out_evenly_and_said(ten_large: ReportView, drawings: dict[str, Any]) -> None:
    small = fitted(ten_large, drawings, 1_700_000)
    assert len(small.encode()) <= 1_700_000
    assert "These runs hold more than one page should" in small
    assert "--figures DIR" in small
    carried = figures_of(small)
    assert 0 < len(carried) <= len(ten_large.figures)
    heads = carried["heads-0"]
    assert heads["rows"] == 80 * 64
    assert len(heads["columns"]["layer"]) < 500
    assert (heads["columns"]["layer"][0], heads["columns"]["layer"][-1]) == (0, 79)
    drawn = [attrs["data-figure"] for _, attrs in Elements(small).found if "data-figure" in attrs]
    assert drawn == list(carried)


def test_what_never_fits_is_refused(ten_large: ReportView, drawings: dict[str, Any]) -> None:
    with pytest.raises(ActsparseError, match="do not fit"):
        fitted(replace(ten_large, sections=ten_large.sections[:1]), drawings, 500_000)


def test_a_thinned_line_keeps_its_ends_and_its_menu() -> None:
    x = np.arange(1000, dtype=np.float32)
    figure = go.Figure()
    figure.add_scatter(x=x, y=x**2, customdata=[str(value) for value in x], error_y={"array": x / 10})
    figure.add_heatmap(z=np.arange(120.0 * 90).reshape(120, 90), x=list(range(90)), y=list(range(120)))
    wanted = [{"label": "half", "axis": "y", "values": [(x / 2).tolist(), None], "errors": [{"array": x}, None]}]
    figure.update_layout(meta={"variants": {"name": "which", "choices": wanted}})
    drawn = figure.to_plotly_json()
    data, layout = Economy(points=50, side=30).thinned(drawn["data"], drawn["layout"])
    line, heat = data
    x, y, bars = (array_of(part) for part in (line["x"], line["y"], line["error_y"]["array"]))
    assert len(x) == len(y) == len(line["customdata"]) == 50
    assert (x[0], x[-1]) == (0.0, 999.0)
    assert np.allclose(y, x**2)
    assert np.allclose(bars, x / 10)
    assert array_of(heat["z"]).shape == (30, 30)
    assert array_of(heat["z"])[-1][-1] == 120 * 90 - 1
    choice = layout["meta"]["variants"]["choices"][0]
    assert np.allclose(choice["values"][0], x / 2)
    assert choice["values"][1] is None


def test_hostile_text_makes_no_element(html: str, hostile_html: str) -> None:
    tags = {tag for tag, _ in Elements(html).found}
    found = Elements(hostile_html)
    assert {tag for tag, _ in found.found} <= tags | {"ins", "label", "select", "option"}
    assert "img" not in {tag for tag, _ in found.found}
    assert not any("onerror" in attrs for _, attrs in found.found)
    assert "&lt;/script&gt;&lt;img" in hostile_html


def test_hostile_text_stays_inside_its_json(hostile_html: str) -> None:
    data = [(attrs, text) for attrs, text in Elements(hostile_html).scripts if attrs.get("type") == "application/json"]
    assert len(data) == 1
    for _, text in data:
        assert "<" not in text
        json.loads(text)
    packed = next(text for attrs, text in Elements(hostile_html).scripts if attrs.get("id") == "figures")
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", packed)
    assert len(unpacked(packed)) > 10


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
