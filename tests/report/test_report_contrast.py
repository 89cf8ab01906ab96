"""Contrast after WCAG AA, in both themes: 4.5:1 for text, 3:1 for what is drawn; from the colours that are shipped."""

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

from actsparse.report.looks import DARK_TWIN, INK, MUTED, ORACLE_BROWN, PAPER, PLAN_COLOURS, RANDOM_GREY, STATIC_GREYS
from actsparse.report.page import drawings_of
from actsparse.report.view import ReportView

TEXT, DRAWN = 4.5, 3.0
CSS = files("actsparse.report").joinpath("report.css").read_text(encoding="utf-8")
THEMES = ("light", "dark")


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def properties(theme: str) -> dict[str, str]:
    """The custom properties of the page that are colours, in one theme."""
    found = re.findall(r"--([a-z-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", CSS)
    return {name: (light, dark)[THEMES.index(theme)] for name, light, dark in found}


def shown(colour: str, theme: str) -> str:
    """A figure's colour as the theme shows it."""
    return DARK_TWIN.get(colour, colour) if theme == "dark" else colour


def text_colours(value: Any, key: str = "") -> Iterator[str]:
    """Every colour of text at any depth of a drawing."""
    if isinstance(value, dict):
        for name, part in value.items():
            if "font" in key.lower() and name == "color":
                yield part
            yield from text_colours(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from text_colours(part, key)


@pytest.mark.parametrize("theme", THEMES)
def test_text_of_the_page_is_readable(theme: str) -> None:
    colours = properties(theme)
    assert {"paper", "raised", "ink", "muted", "accent", "good", "bad", "warn", "warn-paper"} <= set(colours)
    pairs = [(name, "paper") for name in ("ink", "muted", "accent", "good", "bad", "warn")]
    pairs += [("ink", "raised"), ("muted", "raised"), *((name, "warn-paper") for name in ("ink", "muted", "warn"))]
    weak = {pair: ratio for pair in pairs if (ratio := contrast(colours[pair[0]], colours[pair[1]])) < TEXT}
    assert weak == {}


def test_every_colour_of_text_is_one_of_these_properties() -> None:
    """No rule sets a colour of its own that the test above would not see."""
    used = set(re.findall(r"(?<![-\w])color: ([^;}]+)", CSS))
    named = {f"var(--{name})" for name in ("ink", "muted", "accent", "good", "bad", "warn")}
    assert used <= named | {"inherit"}


@pytest.mark.parametrize("theme", THEMES)
def test_the_figures_stand_on_the_paper_of_the_page(theme: str) -> None:
    colours = properties(theme)
    assert (colours["paper"], colours["ink"], colours["muted"]) == tuple(
        shown(one, theme) for one in (PAPER, INK, MUTED)
    )


@pytest.mark.parametrize("theme", THEMES)
def test_text_in_every_figure_is_readable(theme: str, view: ReportView) -> None:
    paper, weak, seen = shown(PAPER, theme), {}, set()
    for name, drawing in drawings_of(view).items():
        for colour in text_colours(drawing):
            seen.add(colour)
            if contrast(shown(colour, theme), paper) < TEXT:
                weak[name] = colour
    assert weak == {}
    assert {INK, MUTED, *PLAN_COLOURS[:2]} <= seen


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("colour", [*PLAN_COLOURS, RANDOM_GREY, *STATIC_GREYS, ORACLE_BROWN])
def test_lines_and_points_stand_out(colour: str, theme: str) -> None:
    assert contrast(shown(colour, theme), shown(PAPER, theme)) >= DRAWN
